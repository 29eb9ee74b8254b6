"""The `vmsup` command: the only place that prints to the user and exits."""

from __future__ import annotations

import gc
import io
import json
import os
import select
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from kvmcore.errors import EXIT_CRASH, EXIT_USAGE, ConfigError, VmsupError
from policies.errors import PolicyError

if TYPE_CHECKING:
    import argparse

    from devproc.zygote import Zygote


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command line and exit with its code; no traceback reaches the user."""
    global _as_json  # noqa: PLW0603 - what fails before there is a configuration is said in its form, too
    _ensure_standard_descriptors()
    code = EXIT_CRASH
    nursery: Zygote | None = None
    try:
        _check_not_shadowed()
        words = [
            "--jail-mode=" + w.removeprefix("--jail=") if w.startswith("--jail=") else w
            for w in (sys.argv[1:] if argv is None else argv)
        ]
        try:
            if words[:1] == ["run"]:
                nursery = _fork_zygote()
            from supervisor import arguments  # noqa: PLC0415 - the zygote does without

            args = arguments.parser(*words[:1]).parse_args(words)
            _as_json = getattr(args, "log_format", None) == "json"
            code = _dispatch(args, nursery)
            sys.stdout.flush()
        finally:
            if nursery is not None:
                nursery.end()
    except VmsupError as e:
        complain(str(e), level="error", event="error")
        code = e.exit_code
    except PolicyError as e:
        for diagnostic in e.diagnostics:
            for line in diagnostic.render().splitlines():
                complain(line, level="error", event="error")
        code = EXIT_USAGE
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        sys.stdout = io.StringIO()  # what it still buffers must not fail the interpreter's exit
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else EXIT_CRASH
    except Exception as e:
        if os.environ.get("VMSUP_DEBUG"):
            traceback.print_exc()
        text = f"internal error: {type(e).__name__}: {e} (VMSUP_DEBUG=1 shows where)"
        complain(text, level="error", event="error")
    sys.exit(code)


_as_json = False  # what --log-format asks of `complain`


def complain(
    line: str, /, *, level: str = "warning", event: str = "note", device: str | None = None, **more: Any
) -> None:
    """One line on stderr, whatever state it is in; the keywords are what its JSON form says besides.

    A device's own words ("log") are lost if nobody reads them: no device holds up the supervisor by talking.
    """
    most = None
    if event == "log":
        if not _stderr_has_room():
            return
        most = 300 if _as_json else 1000
    if _as_json:
        what = {
            "time": _now(),
            "level": level,
            "device": device,
            "event": event,
            "message": line[:most],
            **more,
        }
        _write(json.dumps(what))
        return
    # A device's or a file's words may be in it: nothing of theirs drives the user's terminal.
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(line.splitlines()))
    _write(f"vmsup: {text[:most]}")


def _status(line: str) -> None:
    """What is so for the moment: one line of a terminal that the next one takes the place of."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def _stderr_has_room() -> bool:
    """Whether it takes PIPE_BUF bytes at once: 1000 characters, or 300 of them spelt for JSON."""
    try:
        return bool(select.select([], [sys.stderr], [], 0)[1])
    except (OSError, ValueError):
        return False


def _write(line: str) -> None:
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        sys.stderr = io.StringIO()  # what it still buffers must not fail the interpreter's exit


def _now() -> str:
    from datetime import UTC, datetime  # noqa: PLC0415 - only JSON says when

    return datetime.now(UTC).isoformat(timespec="microseconds")


def _ensure_standard_descriptors() -> None:
    """A closed 0, 1 or 2 would be taken by the next open(), and a device or a file would get our messages."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # Wrong way round on purpose: using it fails with EBADF, as a closed descriptor should.
            os.open(os.devnull, os.O_WRONLY if fd == 0 else os.O_RDONLY)
    for name, fd in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, "w", closefd=False))  # noqa: SIM115


def _check_not_shadowed() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    if os.path.exists(os.path.join(here, "supervisord.py")):
        raise VmsupError(
            f"{here} also holds the distribution 'supervisor': install vmsup in an environment without it"
        )


def _fork_zygote() -> Zygote:
    """Before all else: it gets ready while we do, and has in memory what it needs and nothing more."""
    gc.disable()  # what is imported stays, so looking for what does not is a tenth of its time
    from supervisor import begin  # noqa: PLC0415 - only this verb needs it

    return begin.fork_zygote()


def _dispatch(args: argparse.Namespace, nursery: Zygote | None) -> int:
    match args.verb:
        case "run":
            assert nursery is not None
            return _run(vars(args), nursery)
        case "doctor":
            from supervisor import doctor  # noqa: PLC0415 - only this verb needs it

            report = doctor.examine()
            print(json.dumps(report.as_json(), indent=2) if args.json else report.text())
            return 0 if report.can_run else EXIT_CRASH
        case "ps":
            return _ps(args)
        case "stop":
            from supervisor import control  # noqa: PLC0415

            control.ask(args.socket, "stop")
            return 0
        case "balloon":
            return _balloon(args)
        case "link":
            from supervisor import control  # noqa: PLC0415

            control.ask(args.socket, "link", card=args.card, plugged=args.plugged == "up")
            return 0
        case "resize":
            from supervisor import control  # noqa: PLC0415

            control.resize(args.socket, args.disk, args.size)
            return 0
        case "device":
            return _device(args)
        case "policy":
            from supervisor import pages  # noqa: PLC0415

            text, code = pages.policy(args, complain)
            print(text)
            return code
        case "replay":
            from supervisor import recordings  # noqa: PLC0415

            text, code = recordings.replay(args.dir, jailed=not args.no_jail)
            print(text)
            return code
        case "fuzz":
            from supervisor import fuzzcommands  # noqa: PLC0415

            text, code = fuzzcommands.command(args, complain, _status)
            print(text)
            return code
        case "jail":
            from supervisor import pages  # noqa: PLC0415

            text, code = pages.jail_verb(args)
            print(text)
            return code
    raise AssertionError(args.verb)


def _run(options: dict[str, Any], nursery: Zygote) -> int:
    from supervisor import begin, config  # noqa: PLC0415 - the zygote does without the second

    global _as_json  # noqa: PLW0603 - the file may ask for it
    del options["verb"]
    settings = config.build(options)
    _as_json = settings.log_format == "json"
    begin.prepare(nursery, settings)
    # Opened first: the supervisor opens no file once the guest runs.
    report = _open_report(settings.jail_report)
    from supervisor.launch import launch  # noqa: PLC0415 - the other verbs do not pay for it

    gc.enable()
    how = launch(settings, nursery, complain)
    more: dict[str, Any] = {"event": "end", "exit_code": how.code}
    if how.died is not None:
        more["device"] = how.died.name
        if how.died.refused is not None:
            record = how.died.refused.as_json()
            more |= {"event": "violation", **record}
            if report is not None:
                _report(report, {"time": _now(), **record})
    if how.line is not None:
        complain(how.line, level="error" if how.code else "info", **more)
    return how.code


def _open_report(path: str | None) -> TextIO | None:
    try:
        return sys.stdout if path == "-" else None if path is None else open(path, "a", encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"--jail-report {path}: {e.strerror}") from None


def _report(report: TextIO, record: dict[str, Any]) -> None:
    try:
        report.write(json.dumps(record) + "\n")
        report.flush()
    except OSError as e:
        complain(f"cannot write the jail report: {e.strerror}", level="error")


def _ps(args: argparse.Namespace) -> int:
    from supervisor import control, procstatus  # noqa: PLC0415

    answer = control.ask(args.socket, "ps")
    rows = []
    for name, pid in answer["processes"]:
        status = procstatus.ProcStatus.of(name, pid, answer["pid"])
        if status is not None:
            rows.append(status.as_json())
    print(json.dumps(rows, indent=2) if args.json else procstatus.table(rows))
    return 0


def _balloon(args: argparse.Namespace) -> int:
    from supervisor import control  # noqa: PLC0415

    if args.mib is not None:
        control.ask(args.socket, "balloon", target_mib=args.mib)
        return 0
    counters = control.balloon_counters(args.socket)
    print(
        json.dumps(counters, indent=2)
        if args.json
        else "\n".join(f"{name:20} {count}" for name, count in counters.items())
    )
    return 0


def _device(args: argparse.Namespace) -> int:
    from devproc.catalog import CATALOG  # noqa: PLC0415
    from supervisor import arguments  # noqa: PLC0415

    if args.what == "list":
        for entry in CATALOG.values():
            print(f"{entry.name:17} {entry.summary}")
        return 0
    if args.what in arguments.BACKENDS:
        from supervisor import backend  # noqa: PLC0415

        how = backend.serve(backend.build(args.what, vars(args)), complain)
        if how.line is not None:
            complain(how.line, level="error", event="end", exit_code=how.code)
        return how.code
    if args.name not in CATALOG:
        raise ConfigError(f"device {args.name!r} is unknown, expected one of {', '.join(CATALOG)}")
    import subprocess  # noqa: PLC0415

    # In a process of its own: this one must never load device code.
    return subprocess.run([sys.executable, "-m", "devproc.show", args.name], check=False).returncode


if __name__ == "__main__":
    main()

__all__ = ["EXIT_USAGE", "complain", "main"]
