"""`vmsup policy learn` and `verify`: a policy beside what its device does and what the kernel enforces."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence

from devproc.catalog import Entry
from kvmcore.errors import EXIT_CRASH, ConfigError, VmsupError
from policies import bpf, learn
from policies.compile import compile_single
from policies.errors import Diagnostic
from policies.parse import load
from policies.verify import KINDS, Probe, probes
from supervisor.begin import LEARN
from supervisor.exercise import ACCESSES, exercise
from supervisor.reaper import DeviceDied
from supervisor.recorder import Recorder
from supervisor.verdicts import verdicts

Say = Callable[[str], None]


def learnt(device: Entry, command: Sequence[str], say: Say) -> tuple[str, int]:
    """(text, exit code): what `device` needs while `command` runs, or in an exercise if that is empty.

    Raises:
        ConfigError: `command` cannot be run, or ran no such device.
    """
    lesson, ended = _lesson(device, command, say)
    if not lesson.calls:
        raise ConfigError(
            ended or f"nothing learnt: no `vmsup run` with a {device.name} was run by the command"
        )
    if ended:
        say(f"WARNING: {ended}: there may be more to learn")
    return learn.report(lesson), EXIT_CRASH if ended or lesson.lacking.rules or lesson.unknown else 0


def idle(device: Entry, say: Say) -> list[Diagnostic]:
    """A finding for each alternative of the policy of `device` that an exercise of it does not use.

    Raises:
        PolicyError: the policy is wrong.
        VmsupError: the device did not live through it.
    """
    lesson, ended = _lesson(device, (), say)
    if ended:
        raise VmsupError(ended)
    return learn.idle(lesson)


def _lesson(device: Entry, command: Sequence[str], say: Say) -> tuple[learn.Lesson, str]:
    """What `command`, or an exercise, has taught, and how it failed; empty when it did not."""
    policy = load(device.name, device.slots())
    with tempfile.NamedTemporaryFile("r", prefix="vmsup-learn-") as records:
        if command:
            ended = _run(command, f"{device.name}:{records.name}")
        else:
            ended = _exercise(device, records.name, say)
        return learn.learn(policy, records, device.slots()), ended


def _run(command: Sequence[str], what: str) -> str:
    """How `command` failed; empty when it did not."""
    try:
        done = subprocess.run(command, env=os.environ | {LEARN: what}, check=False)
    except OSError as e:
        raise ConfigError(f"{command[0]}: {e.strerror}") from None
    return f"{command[0]} ended with {done.returncode}" if done.returncode else ""


def _exercise(device: Entry, path: str, say: Say) -> str:
    """How the device failed; empty when it did not."""
    recorder = Recorder(device.name, path, say)
    try:
        exercise(device.name, _sayer(say), recorder.filters, recorder.watch)
    except DeviceDied as e:
        return str(e)
    finally:
        recorder.close()
    return ""


def _sayer(say: Say) -> Callable[[str, str], None]:
    return lambda name, line: say(f"{name}: {line}")


def verified(device: Entry, say: Say) -> tuple[str, int]:
    """(text, exit code): the policy of `device` tried on this kernel, and the device tried under it.

    Raises:
        PolicyError: the policy is wrong.
        VmsupError: the kernel takes no filters, or the device could not be started.
    """
    policy = load(device.name, device.slots())
    asked = list(probes(policy))
    answers = verdicts([compile_single(policy)], [(p.nr, p.args) for p in asked])
    text, wrong = judged(asked, answers)
    try:
        exercise(device.name, _sayer(say))
    except DeviceDied as e:
        wrong.append(str(e))
    else:
        text += f"\nin its jail, through {ACCESSES:,} accesses and two lives: no call was refused"
    libc = os.confstr("CS_GNU_LIBC_VERSION") or "libc unknown"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    host = f"{platform.system()} {platform.release()}, {python}, {libc}"
    lines = [f"{device.name}: {len(policy.rules)} rules, on {host}", text, *wrong]
    return "\n".join(lines), EXIT_CRASH if wrong else 0


def judged(asked: Sequence[Probe], answers: Sequence[int]) -> tuple[str, list[str]]:
    """A table of how often the kernel gave each answer, and a line for each that it should not have given."""
    counts = Counter((p.kind, a & bpf.ACTION_FULL) for p, a in zip(asked, answers, strict=True))
    table = ["          allowed  failed  killed"]
    for kind in KINDS:
        allowed, failed, killed = (counts[kind, a] for a in (bpf.ALLOW, bpf.ERRNO, bpf.KILL_PROCESS))
        table.append(f"{kind:<9} {allowed:7} {failed:7} {killed:7}")
    wrong = [p.differs(a) for p, a in zip(asked, answers, strict=True) if a != p.expected]
    verdict = f"{len(wrong)} of them not" if wrong else "each"
    table.append(f"{len(asked):,} calls, {verdict} as the policy says")
    return "\n".join(table), wrong
