"""The `vmsup` command: the only place that prints to the user and exits."""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import select
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from kvmcore.errors import EXIT_CRASH, EXIT_USAGE, ConfigError, VmsupError
from policies.errors import PolicyError
from supervisor import config

_EPILOG = """\
exit codes: 0 the guest powered off, or the user stopped it; 32 the guest reset; 33 a device or vmsup
crashed; 34 the guest panicked; 35 bad arguments, files or policies; 129, 130,
143 ended by SIGHUP, SIGINT, SIGTERM (128 + signal).

console: Ctrl-A x ends the VM, Ctrl-A Ctrl-A sends Ctrl-A; everything else goes to the guest.
"""


_BACKENDS = {"block": "a disk", "net": "a network card", "rng": "a source of random numbers"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _arguments(verb: str | None = None) -> argparse.ArgumentParser:
    """The command line; with `verb` "run" not the words of others, which a VM's start would wait for."""
    top = _Parser(
        prog="vmsup",
        description="A virtual machine monitor in which every device is a jailed process.",
        allow_abbrev=False,
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    _run_arguments(
        verbs.add_parser(
            "run",
            help="boot a guest",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
    )
    if verb != "run":
        _other_verbs(verbs)
    return top


def _run_arguments(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    add("kernel", nargs="?", metavar="KERNEL", help="a Linux bzImage, or an ELF vmlinux")
    add("-c", "--cpus", type=int, metavar="N", help=f"vCPUs, 1 to {config.CPUS_MAX} [1]")
    add("--cpu-affinity", metavar="CPUS", help="host CPUs of every vCPU (0-1), or of each (0=0:1=1)")
    add("-m", "--mem", type=int, metavar="MIB", help="guest memory in MiB [256]")
    add("-i", "--initrd", metavar="FILE", help="initial RAM disk")
    add("-p", "--params", action="append", metavar="STR", help="more kernel command line; may be repeated")
    add(
        "--serial",
        action="append",
        metavar="KEY=VALUE,...",
        help="a serial port: type=stdio|file|socket|pty|sink,num=1..4,path=,input=,console,earlycon,"
        "hardware=serial|virtio-console,name= [type=stdio,num=1; the others sinks]",
    )
    add(
        "--irqchip", choices=config.IRQCHIPS, help="PIC, IOAPIC and PIT in the kernel, or outside it [kernel]"
    )
    add(
        "--pcie-ecam",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="memory-mapped PCI configuration [on]",
    )
    add(
        "--block",
        action="append",
        metavar="PATH[,KEY=VALUE,...]",
        help="a disk, in the order of /dev/vda, vdb...: path=,ro,root,format=raw|qcow2,backing=,"
        "backing-format=,sparse=,direct,id=,block-size=,queues=,bps=,iops=,max-size=,packed-queue",
    )
    add(
        "--net",
        action="append",
        metavar="TAP[,KEY=VALUE,...]",
        help="a network card on tap-name=, tap-fd= or passt: mac=,mtu=,queues=,bps=,pps=,packed-queue,"
        "tcp-ports=,udp-ports=",
    )
    add(
        "--shared-dir",
        action="append",
        metavar="PATH,tag=TAG[,ro]",
        help="a directory for the guest: mount -t virtiofs TAG /mnt",
    )
    add(
        "--vsock",
        action="append",
        metavar="CID,path=SOCKET",
        help="sockets between guest and host: cid=3..,path= where host programs reach the guest; it reaches "
        "those that listen at SOCKET_PORT",
    )
    add(
        "--vhost-user",
        action="append",
        metavar="TYPE,socket=PATH[,KEY=VALUE,...]",
        help="a device that another program serves, the vhost-user back end that listens at socket=: "
        "block[,queues=], net[,mac=] or fs,tag=",
    )
    add("--rng", action=argparse.BooleanOptionalAction, default=None, help="a source of random numbers [on]")
    add(
        "--balloon",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="take back memory that the guest can spare [off]",
    )
    add("--android-fstab", metavar="FILE", help="fstab to hand to the guest in a device tree")
    add("-s", "--socket", metavar="PATH", help="make a control socket there, for vmsup ps and vmsup stop")
    add("--jail", action="store_const", const="full", help="jail every device process; this is the default")
    add(
        "--no-jail",
        dest="jail",
        action="store_const",
        const="none",
        help="run device processes without a jail",
    )
    add(
        "--jail-mode",
        dest="jail",
        choices=config.JAILS,
        help="best-effort: go on, with a warning, where a layer of the jail cannot be had",
    )
    add(
        "--on-device-death",
        choices=("stop",),
        help="what the death of a device process does to the VM [stop]",
    )
    add(
        "--device-timeout",
        type=float,
        metavar="S",
        help=f"a device that takes longer to answer is dead [{config.DEVICE_TIMEOUT_S:g}]",
    )
    add(
        "--transport",
        choices=config.TRANSPORTS,
        help="how accesses reach a device: a page shared with it, or a message each [mailbox]",
    )
    add("--config", metavar="FILE", help="a TOML file with the same keys; the command line wins")
    add("-v", "--verbose", action="store_true", default=None, help="say what happens at each step")

    add(
        "--log-format",
        choices=config.LOG_FORMATS,
        help="json: each line of ours on standard error as a JSON object [text]",
    )
    add(
        "--jail-report",
        metavar="FILE",
        help="append a JSON object for each system call that a policy refused; - is standard output",
    )
    add(
        "--record",
        metavar="DIR",
        help="keep each device's conversation there, for vmsup replay and as a corpus for vmsup fuzz",
    )


def _other_verbs(verbs: Any) -> None:
    from supervisor import fuzzoptions  # noqa: PLC0415 - `vmsup run` does not wait for it

    doctor = verbs.add_parser(
        "doctor", help="what this host offers: KVM, its extensions, the layers of the jail"
    )
    doctor.add_argument("--json", action="store_true", help="for machines")

    for name, text in (("ps", "the device processes of a running VM"), ("stop", "end a running VM")):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("socket", metavar="SOCKET", help="what was given to vmsup run --socket")
        if name == "ps":
            verb.add_argument("--json", action="store_true", help="for machines")

    balloon = verbs.add_parser("balloon", help="memory of a running VM that is given back to the host")
    balloon.add_argument("socket", metavar="SOCKET", help="what was given to vmsup run --socket")
    balloon.add_argument(
        "mib", nargs="?", type=int, metavar="MIB", help="how much the guest should give [show what it gives]"
    )
    balloon.add_argument("--json", action="store_true", help="for machines")

    link = verbs.add_parser("link", help="plug or unplug the cable of a running VM's network card")
    link.add_argument("socket", metavar="SOCKET", help="what was given to vmsup run --socket")
    link.add_argument("card", metavar="NAME", help="net1 is the first --net")
    link.add_argument("plugged", choices=("up", "down"))

    resize = verbs.add_parser("resize", help="more room on a disk of a running VM")
    resize.add_argument("socket", metavar="SOCKET", help="what was given to vmsup run --socket")
    resize.add_argument("disk", metavar="NAME", help="block1 is the first --block")
    resize.add_argument("size", type=int, metavar="BYTES", help="up to its max-size=, never less than before")

    device = verbs.add_parser(
        "device", help="the catalogue of devices; one for another program's VMM"
    ).add_subparsers(dest="what", required=True)
    device.add_parser("list", help="every kind of device")
    device.add_parser("show", help="the registers of one").add_argument("name", metavar="NAME")
    for name, text in _BACKENDS.items():
        backend = device.add_parser(name, help=f"{text}, as a vhost-user back end", allow_abbrev=False)
        backend.add_argument("-s", "--socket", metavar="PATH", required=True, help="where front ends find it")
        if name != "rng":
            backend.add_argument(
                f"--{name}",
                action="append",
                metavar="KEY=VALUE,...",
                required=True,
                help=f"as vmsup run --{name}",
            )
        backend.add_argument(
            "--no-jail", dest="jail", action="store_const", const="none", help="as vmsup run"
        )
        backend.add_argument("--device-timeout", type=float, metavar="S", help="as vmsup run")

    policy = verbs.add_parser("policy", help="what system calls a device may make").add_subparsers(
        dest="what", required=True, metavar="WHAT"
    )
    check = policy.add_parser("check", help="find what is wrong with policies")
    check.add_argument("names", nargs="*", metavar="NAME", help="devices or files [every shipped policy]")
    check.add_argument(
        "--exercise", action="store_true", help="run each device, too, and name rules that it used no call of"
    )
    policy.add_parser("show", help="a device's whole page: jail, system calls, reasons").add_argument(
        "name", metavar="NAME"
    )
    explain = policy.add_parser("explain", help="what becomes of one system call, and by which line")
    explain.add_argument("name", metavar="NAME")
    explain.add_argument("call", metavar="SYSCALL", help="its name or x86-64 number")
    explain.add_argument("args", nargs="*", metavar="ARG", help="its arguments, numbers [0]")
    diff = policy.add_parser("diff", help="how two policies differ in effect")
    diff.add_argument("before", metavar="A")
    diff.add_argument("after", metavar="B")
    compiled = policy.add_parser("compile", help="the seccomp program, killing what is not allowed")
    compiled.add_argument("name", metavar="NAME")
    compiled.add_argument("-o", "--output", metavar="FILE", required=True)
    learn = policy.add_parser("learn", help="what a device needs, by watching every call it makes")
    learn.add_argument("name", metavar="NAME")
    learn.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND",
        help="runs a VM with the device in it [random accesses]",
    )
    policy.add_parser("verify", help="try a policy on this kernel, and its device under it").add_argument(
        "name", metavar="NAME"
    )
    policy.add_parser("disasm", help="a compiled program as text").add_argument("file", metavar="FILE")

    replay = verbs.add_parser("replay", help="hold recorded conversations again, with new device processes")
    replay.add_argument("dir", metavar="DIR", help="what vmsup run --record made, or one file of it")
    replay.add_argument("--no-jail", action="store_true", help="run the device processes without a jail")

    fuzz = verbs.add_parser(
        "fuzz",
        help="fuzz a device in its jail",
        epilog=fuzzoptions.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fuzzoptions.arguments(fuzz)

    jail = verbs.add_parser("jail", help="what confines a device").add_subparsers(dest="what", required=True)
    jail.add_parser("plan", help="every layer, before anything runs").add_argument("name", metavar="NAME")
    inspect = jail.add_parser("inspect", help="what each process of a running VM really has")
    inspect.add_argument("socket", metavar="SOCKET", help="what was given to vmsup run --socket")
    inspect.add_argument(
        "--require", action="store_true", help="fail if anything differs from what was declared, or is hidden"
    )
    selftest = jail.add_parser("selftest", help="try to escape from the jail, in many ways")
    selftest.add_argument("name", nargs="?", metavar="NAME", help="a device, for its policy [serial]")
    selftest.add_argument("--layers", action="store_true", help="also with each single layer left out")
    for verb in (inspect, selftest):
        verb.add_argument("--json", action="store_true", help="for machines")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command line and exit with its code; no traceback reaches the user."""
    global _as_json  # noqa: PLW0603 - what fails before there is a configuration is said in its form, too
    _ensure_standard_descriptors()
    code = EXIT_CRASH
    try:
        _check_not_shadowed()
        words = [
            "--jail-mode=" + w.removeprefix("--jail=") if w.startswith("--jail=") else w
            for w in (sys.argv[1:] if argv is None else argv)
        ]
        args = _arguments(*words[:1]).parse_args(words)
        _as_json = getattr(args, "log_format", None) == "json"
        code = _dispatch(args)
        sys.stdout.flush()
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


def _dispatch(args: argparse.Namespace) -> int:
    match args.verb:
        case "run":
            return _run(vars(args))
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


def _run(options: dict[str, Any]) -> int:
    gc.disable()  # what is imported stays, so looking for what does not is a tenth of its time
    from supervisor.launch import launch  # noqa: PLC0415 - the other verbs do not pay for it

    gc.enable()
    global _as_json  # noqa: PLW0603 - the file may ask for it
    del options["verb"]
    settings = config.build(options)
    _as_json = settings.log_format == "json"
    # Opened first: the supervisor opens no file once the guest runs.
    report = _open_report(settings.jail_report)
    how = launch(settings, complain)
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

    if args.what == "list":
        for entry in CATALOG.values():
            print(f"{entry.name:17} {entry.summary}")
        return 0
    if args.what in _BACKENDS:
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
