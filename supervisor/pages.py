"""What `vmsup policy` and `vmsup jail` print: a device's layers, its system calls and their reasons."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from devproc import jail
from devproc.catalog import CATALOG, Entry
from kvmcore.errors import EXIT_CRASH, ConfigError
from policies import commands
from policies.parse import load
from supervisor import confine


def entry(name: str) -> Entry:
    """The catalogue's entry.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        return CATALOG[name]
    except KeyError:
        raise ConfigError(f"device {name!r} is unknown, expected one of {', '.join(CATALOG)}") from None


def _slots(name: str) -> dict[str, int]:
    """The constants of a device's or a supervisor's policy, or for a file the union of all devices'."""
    if name in CATALOG:
        return CATALOG[name].slots()
    if name in confine.POLICIES:
        return confine.constants()
    return {k: v for e in CATALOG.values() for k, v in e.slots().items()}


def jail_plan(name: str) -> str:
    """Every step of the jail in order, as `devproc.jail` would take it."""
    device = entry(name)
    steps = jail.plan(jail.Mode.FULL, without=device.without)
    return "\n".join(f"{n:2}. {s.name:13} {s.describe(device)}" for n, s in enumerate(steps, 1))


def jail_verb(args: argparse.Namespace) -> tuple[str, int]:
    """(text, exit code) of one `vmsup jail` verb.

    Raises:
        ConfigError: what was named cannot be used.
        VmsupError: a process to attack from could not be started.
    """
    match args.what:
        case "inspect":
            from supervisor import attest, control  # noqa: PLC0415 - the other verbs look at no process

            report = attest.of_vm(control.ask(args.socket, "ps"))
            text = json.dumps(report.as_json(), indent=2) if args.json else report.text()
            return text, EXIT_CRASH if args.require and report.unproven else 0
        case "selftest":
            from supervisor import selftest  # noqa: PLC0415

            matrix = selftest.run(entry(args.name or selftest.VICTIM).name, args.layers)
            text = json.dumps(matrix.as_json(), indent=2) if args.json else matrix.text()
            return text, EXIT_CRASH if matrix.escaped else 0
        case _:
            return jail_plan(args.name), 0


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise ConfigError(f"argument {text!r}: expected a number") from None


def policy(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[str, int]:
    """(text, exit code) of one `vmsup policy` verb; `say` takes a line for the user meanwhile.

    Raises:
        ConfigError: what was named cannot be used.
        PolicyError: a policy is wrong; shown with its line and a caret.
    """
    match args.what:
        case "check":
            names = args.names or [*CATALOG, *confine.POLICIES]
            ours = confine.POLICIES
            found = [d for n in names for d in commands.check([n], _slots(n), slots=n not in ours)]
            if args.exercise:
                from supervisor import policylab  # noqa: PLC0415 - the other verbs start no device

                found += [d for n in names if n in CATALOG for d in policylab.idle(CATALOG[n], say)]
            text = "\n".join(d.render() for d in found) or f"{len(names)} policies: nothing found"
            return text, EXIT_CRASH if found else 0
        case "show" if args.name in confine.POLICIES:
            return commands.show(args.name, confine.constants()), 0
        case "show":
            device = entry(args.name)
            page = [f"{device.name}: {device.summary}", jail_plan(device.name)]
            return "\n\n".join([*page, commands.show(device.name, device.slots())]), 0
        case "explain":
            numbers = [_number(a) for a in args.args]
            return commands.explain(args.name, args.call, numbers, _slots(args.name)).text, 0
        case "diff":
            before, after = (load(n, _slots(n)) for n in (args.before, args.after))
            return "\n".join(map(str, commands.diff(before, after))) or "no difference in effect", 0
        case "compile":
            (program,) = commands.compile_policy(args.name, _slots(args.name))
            try:
                Path(args.output).write_bytes(program)
            except OSError as e:
                raise ConfigError(f"--output {args.output}: {e.strerror}") from None
            return f"{args.output}: {len(program) // 8} instructions", 0
        case "learn":
            from supervisor import policylab  # noqa: PLC0415 - the other verbs start no device

            command = args.command[1:] if args.command[:1] == ["--"] else args.command
            return policylab.learnt(entry(args.name), command, say)
        case "verify":
            from supervisor import policylab  # noqa: PLC0415

            return policylab.verified(entry(args.name), say)
        case _:
            try:
                return commands.disasm(Path(args.file).read_bytes()), 0
            except (OSError, ValueError) as e:
                raise ConfigError(f"{args.file}: {getattr(e, 'strerror', None) or e}") from None
