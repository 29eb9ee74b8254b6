"""`vmsup fuzz --scheduler ADDRESS`: a campaign in rounds on the workers of a Dask cluster (dask.distributed).

A round is `vmsup fuzz` itself on a worker's machine, for a while, from the corpus as it then is.  What comes
back is bytes: inputs join the corpus if they reach more here, and findings are judged here, in this machine's
jail, as those of a local campaign are.  A worker that is lost takes nothing with it but its round, which Dask
gives to another, with the same seed.  A corpus may also be in any place that fsspec knows.  Whoever can talk
to the scheduler can run programs as the user of every worker: that is Dask's, and nothing here makes it less.
"""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from devproc import jail
from devproc.fuzz.inputs import canonical
from devproc.fuzz.page import INPUT_MAX
from kvmcore.errors import ConfigError, VmsupError
from supervisor.findings import FOUND
from supervisor.fuzz import Campaign, Plan, Result, Say, name_of
from supervisor.subject import Died

ROUND_S: Final = 20.0
ROUND_RUNS: Final = 20_000
_CONNECT_S: Final = 30
_RETRIES: Final = 3  # of a round that fails for another reason than a lost worker
_RUNS: Final = re.compile(r": ([\d,]+) runs")
_NEEDED: Final = "pip install 'vmsup[cluster]'"


class Outcome(NamedTuple):
    """What a round came to: inputs run, inputs that reached something new, inputs that show a finding."""

    runs: int
    corpus: list[bytes]
    found: list[bytes]


def play(device: str, options: list[str], corpus: list[bytes]) -> Outcome:
    """One round, in a process of its own on this machine.

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    with tempfile.TemporaryDirectory(prefix="vmsup-fuzz-") as name:
        inputs, crashes = Path(name, "corpus"), Path(name, "crashes")
        inputs.mkdir()
        for data in corpus:
            (inputs / name_of(data)).write_bytes(data)
        before = {path.name for path in inputs.iterdir()}
        command = [sys.executable, "-m", "supervisor.cli", "fuzz", device, *options]
        done = subprocess.run(
            [*command, f"--corpus={inputs}", f"--crashes={crashes}"],
            capture_output=True,
            text=True,
            check=False,
        )
        runs = _RUNS.search(done.stdout)
        if done.returncode not in (0, *FOUND.values()) or runs is None:
            raise RuntimeError(f"vmsup fuzz: status {done.returncode}: {done.stderr.strip()[-500:]}")
        return Outcome(
            int(runs[1].replace(",", "")),
            [path.read_bytes() for path in sorted(inputs.iterdir()) if path.name not in before],
            [path.read_bytes() for path in sorted(crashes.glob("*/input"))],
        )


def open_corpus(location: str) -> MutableMapping[str, bytes]:
    """The files of a directory that fsspec knows, by name.

    Raises:
        ConfigError: fsspec is not installed, or cannot use it.
    """
    try:
        import fsspec  # noqa: PLC0415  optional
    except ImportError:
        raise ConfigError(f"--corpus {location}: needs fsspec: {_NEEDED}") from None
    try:
        mapper: MutableMapping[str, bytes] = fsspec.get_mapper(location, create=True)
    except (ValueError, ImportError, OSError) as e:
        raise ConfigError(f"--corpus {location}: {e}") from None
    return mapper


def _client(address: str) -> Any:
    try:
        import distributed  # noqa: PLC0415  optional
    except ImportError:
        raise ConfigError(f"--scheduler: needs dask.distributed: {_NEEDED}") from None
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # a lost worker is no news to the user
    try:
        client = distributed.Client(address, timeout=_CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as e:
        raise ConfigError(f"--scheduler {address}: {e}") from None
    try:
        client.wait_for_workers(1, timeout=_CONNECT_S)
    except TimeoutError:
        client.close()
        raise ConfigError(f"--scheduler {address}: no worker within {_CONNECT_S} s") from None
    return client


def fuzz(plan: Plan, address: str, say: Say, status: Say) -> Result:
    """A campaign of `plan`, `plan.workers` rounds at a time.

    Raises:
        ConfigError: the device, the corpus or the scheduler cannot be used.
        VmsupError: a process could not be started here, or a round failed again and again.
    """
    # Its processes are forked before the client has threads.
    with Campaign(replace(plan, workers=1), say) as campaign:
        client = _client(address)
        try:
            with campaign.interruptible():
                _rounds(campaign, plan, client, status)
        finally:
            client.close()
        return campaign.result


def _rounds(campaign: Campaign, plan: Plan, client: Any, status: Say) -> None:
    result = campaign.result
    began_s = time.monotonic()
    _merge(campaign, campaign.seeds)
    rounds: set[Any] = set()
    seed = plan.seed << 16
    size = min(ROUND_RUNS, -(-plan.runs // plan.workers)) if plan.runs else 0
    asked = 0
    while True:
        result.seconds = time.monotonic() - began_s
        over = (
            campaign.stopped
            or (plan.stop and bool(result.findings))
            or (plan.time_s is not None and result.seconds >= plan.time_s)
        )
        while not over and len(rounds) < plan.workers and (plan.runs is None or asked < plan.runs):
            left_s = ROUND_S if plan.time_s is None else min(ROUND_S, max(plan.time_s - result.seconds, 1))
            options = _options(plan, seed, f"--runs={size}" if size else f"--time={left_s:g}")
            asked += size
            seed += 1
            corpus = list(result.corpus.values())
            task = client.submit(play, plan.device, options, corpus, pure=False, retries=_RETRIES)
            rounds.add(task)
        if over and (campaign.stopped or plan.stop):
            for task in rounds:
                task.cancel()
            return
        if not rounds:
            return
        status(result.line())
        for task in [task for task in rounds if task.done()]:
            rounds.remove(task)
            _take(campaign, task)
        time.sleep(0.1)


def _options(plan: Plan, seed: int, how_long: str) -> list[str]:
    options = [how_long, f"--seed={seed}", f"--timeout={plan.timeout_s:g}"]
    options += ["--no-jail"] if plan.mode is jail.Mode.NONE else []
    options += [] if plan.compare else ["--no-compare"]
    return options + (["--stop"] if plan.stop else [])


def _take(campaign: Campaign, task: Any) -> None:
    try:
        outcome = task.result()
    except Exception as e:
        raise VmsupError(f"a round failed on the cluster: {e}") from None
    campaign.result.runs += outcome.runs
    entry = campaign.entry
    _merge(campaign, [canonical(entry, data[:INPUT_MAX]) for data in outcome.corpus])
    for data in (canonical(entry, data[:INPUT_MAX]) for data in outcome.found):
        finding = campaign.verdict(data)
        campaign.report(finding, data)
        if finding is None:  # it may be another kernel's
            where = campaign.plan.crashes / f"unconfirmed-{name_of(data)}"
            where.mkdir(parents=True, exist_ok=True)
            (where / "input").write_bytes(data)
            campaign.say(f"a worker's finding is not shown here: {where}")


def _merge(campaign: Campaign, inputs: list[bytes]) -> None:
    """Keep those that reach something new, the shortest first."""
    inputs = sorted({data for data in inputs if data}, key=lambda data: (len(data), data))
    for data, blocks in zip(inputs, _reached(campaign, inputs), strict=True):
        if blocks - campaign.result.covered:
            campaign.result.covered |= blocks
            campaign.keep(data)


def _reached(campaign: Campaign, inputs: list[bytes]) -> list[set[int]]:
    try:
        return campaign.blocks_of(inputs)
    except Died:
        campaign.judge.again()
        if len(inputs) == 1:
            return [set()]
        return [blocks for data in inputs for blocks in _reached(campaign, [data])]
