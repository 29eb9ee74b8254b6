"""The words of the command line; what they mean is `supervisor/config.py`'s and `supervisor/cli.py`'s."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, Final, NoReturn

from kvmcore.errors import ConfigError
from supervisor import config

_EPILOG = """\
exit codes: 0 the guest powered off, or the user stopped it; 32 the guest reset; 33 a device or vmsup
crashed; 34 the guest panicked; 35 bad arguments, files or policies; 129, 130,
143 ended by SIGHUP, SIGINT, SIGTERM (128 + signal).

console: Ctrl-A x ends the VM, Ctrl-A Ctrl-A sends Ctrl-A; everything else goes to the guest.
"""


_WIDTH: Final = 100  # of a line of help; to ask the terminal argparse imports shutil, and every codec with it

BACKENDS: Final = {"block": "a disk", "net": "a network card", "rng": "a source of random numbers"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def parser(verb: str | None = None) -> argparse.ArgumentParser:
    """The command line; with `verb` "run" not the words of others, which a VM's start would wait for."""
    top = _Parser(
        prog="vmsup",
        description="A virtual machine monitor in which every device is a jailed process.",
        formatter_class=partial(argparse.HelpFormatter, width=_WIDTH),
        allow_abbrev=False,
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    _run_arguments(
        verbs.add_parser(
            "run",
            help="boot a guest",
            epilog=_EPILOG,
            formatter_class=partial(argparse.RawDescriptionHelpFormatter, width=_WIDTH),
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
    for name, text in BACKENDS.items():
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
