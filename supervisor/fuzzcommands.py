"""`vmsup fuzz` and what goes with it: replay, minimize, cmin, coverage."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from devproc import jail
from devproc.catalog import CATALOG
from devproc.fuzz.inputs import Rep, to_text
from kvmcore.errors import ConfigError
from supervisor import fuzzcluster, fuzzreport
from supervisor.findings import FOUND, Finding, minimised
from supervisor.fuzz import Campaign, Plan, lookup, name_of, read_corpus, read_dictionary, read_input
from supervisor.subject import Died

Say = Callable[[str], None]


def command(args: argparse.Namespace, say: Say, status: Say) -> tuple[str, int]:
    """(text, exit code) of one `vmsup fuzz`; `say` takes lines to keep, `status` lines of the moment.

    Raises:
        ConfigError: what was named cannot be used.
        VmsupError: a process could not be started.
    """
    if not 1 <= args.workers <= 64:
        raise ConfigError("--workers must lie in [1, 64]")
    if not args.timeout > 0:
        raise ConfigError("--timeout must be more than 0")
    if isinstance(args.corpus, str):
        args.corpus = fuzzcluster.open_corpus(args.corpus)
    match args.target:
        case "replay":
            return _replay(args, say)
        case "minimize":
            return _minimize(args, say)
        case "cmin":
            return _cmin(args, say)
        case "coverage":
            return _coverage(args, say)
    if args.operands:
        raise ConfigError(f"unexpected {args.operands[0]!r} (see vmsup fuzz --help)")
    return _fuzz(args, say, status)


def _plan(args: argparse.Namespace, device: str) -> Plan:
    return Plan(
        device,
        corpus=args.corpus,
        crashes=args.crashes,
        time_s=args.time,
        runs=args.runs,
        workers=args.workers,
        seed=args.seed,
        words=read_dictionary(args.dict) if args.dict else (),
        mode=jail.Mode.NONE if args.no_jail else jail.Mode.FULL,
        timeout_s=args.timeout,
        compare=not args.no_compare,
        stop=args.stop,
    )


def _fuzz(args: argparse.Namespace, say: Say, status: Say) -> tuple[str, int]:
    if args.no_jail:
        say("WARNING: --no-jail: what a device does under its policy is not looked at")

    def keep(line: str) -> None:
        status("")
        say(line)

    plan = _plan(args, args.target)
    if args.scheduler is not None:
        result = fuzzcluster.fuzz(plan, args.scheduler, keep, status)
    else:
        with Campaign(plan, keep) as campaign:
            result = campaign.run(status)
    status("")
    if args.junit:
        _write(args.junit, fuzzreport.junit(result))
    if args.sarif:
        _write(args.sarif, fuzzreport.sarif(result))
    return f"{args.target}: {result.line()}", result.exit_code


def _inputs(args: argparse.Namespace) -> list[tuple[Path, Rep]]:
    if not args.operands:
        raise ConfigError(f"vmsup fuzz {args.target}: expected a FILE")
    return [(path, _input(path, args.device)) for path in map(Path, args.operands)]


def _input(path: Path, device: str | None) -> Rep:
    try:
        head = path.read_bytes()[:64].split()
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
    if head[:1] == [b"vmrep"] and len(head) > 2:
        device = head[2].decode(errors="replace")
    if device is None:
        raise ConfigError(f"{path}: bytes do not say which device they are for: give --device")
    return read_input(lookup(device), path)


def _replay(args: argparse.Namespace, say: Say) -> tuple[str, int]:
    lines = []
    found: list[Finding] = []
    for path, rep in _inputs(args):
        with _campaign_of(args, rep, say) as campaign:
            finding = campaign.verdict(rep.data)
        if finding is None:
            lines.append(f"{path}: nothing found")
            continue
        found.append(finding)
        lines.append(f"{path}: {finding.name}: {finding.kind}: {finding.why}")
        lines += [f"    {frame}" for frame in finding.frames]
    code = next((code for sort, code in FOUND.items() if any(f.sort == sort for f in found)), 0)
    return "\n".join(lines), code


def _campaign_of(args: argparse.Namespace, rep: Rep, say: Say) -> Campaign:
    return Campaign(replace(_plan(args, rep.device), corpus=None, params=rep.params), say)


def _minimize(args: argparse.Namespace, say: Say) -> tuple[str, int]:
    [(path, rep), *more] = _inputs(args)
    if more or args.output is None:
        raise ConfigError("expected: vmsup fuzz minimize FILE -o FILE")
    with _campaign_of(args, rep, say) as campaign:
        finding = campaign.verdict(rep.data)
        if finding is None:
            raise ConfigError(f"{path}: shows nothing that could be kept while it is made smaller")
        small = minimised(rep.data, finding, campaign.verdicts_of(finding))
    text = to_text(Rep(rep.device, small, rep.params, rep.clock_ns, rep.wall_ns))
    _write(args.output, text if args.output.suffix == ".vmrep" else small)
    return f"{args.output}: {len(rep.data) // 16} operations are {len(small) // 16}: {finding.why}", 0


def _device(args: argparse.Namespace) -> str:
    if len(args.operands) != 1 or args.operands[0] not in CATALOG:
        raise ConfigError(f"vmsup fuzz {args.target}: expected a DEVICE, one of {', '.join(CATALOG)}")
    if args.corpus is None or args.output is None:
        raise ConfigError(f"vmsup fuzz {args.target}: --corpus and -o are needed")
    device: str = args.operands[0]
    return device


def _reached(args: argparse.Namespace, say: Say) -> tuple[Campaign, dict[bytes, set[int]]]:
    """What each input of the corpus reaches; the campaign is over."""
    device = _device(args)
    inputs = list(read_corpus(lookup(device), args.corpus).values())
    with Campaign(_plan(args, device), say) as campaign:
        try:
            return campaign, dict(zip(inputs, campaign.blocks_of(inputs), strict=True))
        except Died as death:
            raise ConfigError(
                f"{args.corpus}: an input ends the device: {death.why}: vmsup fuzz replay says which"
            ) from None


def _cmin(args: argparse.Namespace, say: Say) -> tuple[str, int]:
    _, reached = _reached(args, say)
    missing = set().union(*reached.values())
    total = len(missing)
    kept = []
    while missing:
        # What reaches most of the rest; of those the shortest.
        best = max(reached, key=lambda data: (len(reached[data] & missing), -len(data), data))
        kept.append(best)
        missing -= reached[best]
    for data in kept:
        _write(args.output / name_of(data), data)
    return f"{args.output}: {len(kept)} of {len(reached)} inputs reach the same {total} blocks", 0


def _coverage(args: argparse.Namespace, say: Say) -> tuple[str, int]:
    campaign, reached = _reached(args, say)
    covered = set().union(*reached.values())
    blocks = campaign.result.blocks
    _write(args.output, fuzzreport.page(campaign.plan.device, blocks, covered))
    return f"{args.output}: {len(covered)} of {len(blocks)} blocks reached by {len(reached)} inputs", 0


def _write(path: Path, content: str | bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as e:
        raise ConfigError(f"{path}: {e.strerror}") from None
