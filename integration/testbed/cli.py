"""Run a command next to a working /dev/kvm, on a machine that has none.

A small Debian machine ("L1") is started under QEMU, which emulates AMD SVM; kvm_amd is loaded in it, and this
machine's own / is its root, read-only below an overlay in RAM.  COMMAND runs there as root, in the current
directory, with the current environment and no input.  Only what it writes below a --rw directory stays.

Exit status: COMMAND's (128 + N when signal N ended it), 124 out of time, 125 the testbed itself failed (why,
and the end of its console, on stderr), 130 interrupted, 141 nobody reads the output.

Needs the Debian packages qemu-system-x86 and busybox-static, and apt-get to download linux-image-amd64, which
is unpacked in ~/.cache/vmsup (or VMSUP_CACHE), never installed.  The first run takes some 20 s, later ones
2 s more than the command.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess

from integration.testbed import l1, qemu
from integration.testbed.debian import TestbedError

EXIT_FAILED = 125
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE


def main() -> int:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--timeout S] [--rw DIR]... [--smp N] [--mem MIB] [--no-snapshot] -- COMMAND...",
        prog="run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--timeout", type=float, default=600, metavar="S", help="end COMMAND after S seconds [600]")
    add("--rw", action="append", default=[], metavar="DIR", help="let COMMAND write below DIR")
    # With two, QEMU (7.2 and 10.0) was seen to leave one halted for ever, or to spoil its registers, in every
    # other boot with a chatty console; with one never.
    add("--smp", type=int, default=1, metavar="N", help="CPUs of L1 [1; more are not reliable]")
    add("--mem", type=int, default=4096, metavar="MIB", help="memory of L1 [4096]")
    add("--no-snapshot", action="store_true", help="boot L1 instead of restoring a booted one")
    add("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    shares = [os.path.realpath(d) for d in options.rw]
    if len(shares) > qemu.SHARES or not all(map(os.path.isdir, shares)):
        parser.error(f"--rw: at most {qemu.SHARES} directories that exist")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        job = l1.Job(
            command=options.command,
            cwd=os.getcwd(),
            env={"PYTHONFAULTHANDLER": "1", **os.environ, "VMSUP_TESTBED": l1.description()},
            shares=shares,
            timeout_s=options.timeout,
            smp=options.smp,
            mem_mib=options.mem,
            snapshot=not options.no_snapshot,
        )
        return l1.run(job)
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (TestbedError, OSError, subprocess.SubprocessError) as e:
        l1.say(str(e))
        return EXIT_FAILED
