"""One QEMU process that emulates a machine with AMD SVM (TCG), and the sockets it is talked to through.

Every channel is an inherited socketpair and every log a memfd: no path, no port, nothing to clean up, and
the parent-death signal takes QEMU along whatever ends this process.  QMP: docs/interop/qmp-spec.rst of QEMU.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from integration.testbed.debian import TestbedError, tool

CHANNELS = ("control", "job", "stdout", "stderr")  # virtio-serial ports
SHARES = 4  # writable 9p devices there always are, so that one snapshot fits every run

MACHINE = "microvm,x-option-roms=off,pit=on,pic=on,rtc=on,isa-serial=on,acpi=on"
ACCEL = "tcg,thread=multi,tb-size=64"  # a bigger translation cache gets slower with every L2 boot
CPU = (
    "max,+svm,+npt"
    ",-la57"  # four-level page tables: shorter walks, and L2 walks them twice
    # TCG runs "rep movsb" byte by byte.  Never drop erms without fsrm: Linux's memmove would loop for ever.
    ",-erms,-fsrm"
    # QEMU's SVM does not intercept XSETBV: KVM would run guests with another XCR0 than they have set.
    ",-xsave"
    ",-smap,-smep,-umip,-pku"  # checks that cost time and that nothing here is about
)
CPU_BEFORE_8 = ",-cx16"  # its cmpxchg16b spoils the flags: one in five boots of a 6.12 guest crashed
APPEND = (
    "console=ttyS0 quiet panic=-1 reboot=t mitigations=off nokaslr tsc=reliable no_timer_check nowatchdog "
    "nosoftlockup random.trust_cpu=on audit=0 apparmor=0 rcupdate.rcu_expedited=1 "
    "initcall_blacklist=ima_init,init_evm"
)
_PR_SET_PDEATHSIG = 1
_MIGRATION_TIMEOUT_S = 30


@functools.cache
def qemu() -> str:
    """QEMU's path.

    Raises:
        TestbedError: it is not installed.
    """
    return tool("qemu-system-x86_64", "qemu-system-x86")


@functools.cache
def version() -> tuple[int, int]:
    """QEMU's major and minor version."""
    out = subprocess.run([qemu(), "--version"], check=True, text=True, capture_output=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", out)
    if found is None:
        raise TestbedError(f"{qemu()} --version says {out[:80]!r}")
    return int(found[1]), int(found[2])


@functools.cache
def tsc_khz() -> int:
    """This machine's TSC rate, which under TCG is L1's too.

    L1 has to be told.  Its own calibration against the emulated PIT fails in about one boot of ten, and then
    its timer never ticks.
    """
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex("0f31 48c1e220 4809d0 c3"))  # rdtsc; shl rdx, 32; or rax, rdx; ret
    rdtsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))

    def sample() -> tuple[int, int]:
        """(nanoseconds, TSC) at one moment: the tightest of ten tries."""
        tries = []
        for _ in range(10):
            before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            tsc = rdtsc()
            after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
            tries.append((after - before, (before + after) // 2, tsc))
        _, ns, tsc = min(tries)
        return ns, tsc

    ns0, tsc0 = sample()
    time.sleep(0.03)
    ns1, tsc1 = sample()
    return (tsc1 - tsc0) * 1_000_000 // (ns1 - ns0)


def die_with(parent: int) -> None:
    """For Popen's `preexec_fn`: a session of its own, which dies when process `parent` does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # it died before the line above
    os.setsid()  # Ctrl-C is for the parent to handle


class Qemu:
    """A running L1 machine.

    `memory`: the file that holds its RAM, `save` it there (shared) or start from it (private, copy on write).
    `shares`: directories of this machine that L1 may write, at most SHARES.
    """

    def __init__(
        self, kernel: Path, initrd: Path, smp: int, mem_mib: int,
        shares: Sequence[str] = (), memory: Path | None = None, saving: bool = False,
    ) -> None:  # fmt: skip
        self._log = os.memfd_create("qemu.log")
        self._console = os.memfd_create("console.log")
        command = [
            qemu(), "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
            "-M", MACHINE, "-accel", ACCEL, "-cpu", CPU + (CPU_BEFORE_8 if version() < (8, 0) else ""),
            "-smp", str(smp), "-m", str(mem_mib),
            "-kernel", str(kernel), "-initrd", str(initrd), "-append", f"{APPEND} tsc_early_khz={tsc_khz()}",
            "-serial", f"file:/dev/fd/{self._console}", "-device", "virtio-serial-device",
        ]  # fmt: skip
        self.channels: dict[str, socket.socket] = {}
        theirs = []
        for name in (*CHANNELS, "qmp"):
            self.channels[name], its = socket.socketpair()
            theirs.append(its)
            command += ["-chardev", f"socket,id={name},fd={its.fileno()}"]
            if name == "qmp":
                command += ["-mon", "chardev=qmp,mode=control"]
            else:
                command += ["-device", f"virtserialport,chardev={name},name={name}"]
        exports = {"hostroot": ("/", True), **{f"share{i}": ("/", True) for i in range(SHARES)}}
        exports.update({f"share{i}": (path, False) for i, path in enumerate(shares)})
        for tag, (path, readonly) in exports.items():
            options = "security_model=none,multidevs=remap" + (",readonly=on" if readonly else "")
            command += ["-fsdev", f"local,id={tag},path={path.replace(',', ',,')},{options}"]
            command += ["-device", f"virtio-9p-device,fsdev={tag},mount_tag={tag}"]
        if memory:
            backend = f"memory-backend-file,id=ram,size={mem_mib}M,mem-path={memory}"
            command += [
                "-object",
                f"{backend},share={'on' if saving else 'off'}",
                "-machine",
                "memory-backend=ram",
            ]
        if memory and not saving:
            command += ["-incoming", "defer"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            pass_fds=[self._console, *(s.fileno() for s in theirs)],
            preexec_fn=functools.partial(die_with, os.getpid()),  # noqa: PLW1509  no threads here
        )  # fmt: skip
        for s in theirs:
            s.close()
        self._qmp_reader = self.channels["qmp"].makefile("rb")
        self.channels["qmp"].settimeout(_MIGRATION_TIMEOUT_S)

    def start_qmp(self) -> None:
        """Read the greeting and leave capability negotiation."""
        self._qmp_reader.readline()
        self.qmp("qmp_capabilities")
        # The RAM is in a file of its own already: migration need only carry the devices' state.
        capability = {"capability": "x-ignore-shared", "state": True}
        self.qmp("migrate-set-capabilities", capabilities=[capability])

    def qmp(self, execute: str, **arguments: Any) -> Any:
        """Run one QMP command and return what it returns.

        Raises:
            TestbedError: QEMU refused it or is gone.
        """
        message = json.dumps({"execute": execute, "arguments": arguments})
        try:
            self.channels["qmp"].sendall(message.encode() + b"\n")
            for line in self._qmp_reader:
                answer = json.loads(line)
                if "error" in answer:
                    raise TestbedError(f"QEMU: {execute}: {answer['error']['desc']}")
                if "return" in answer:  # anything else is an event
                    return answer["return"]
        except OSError as e:
            raise TestbedError(f"QEMU: {execute}: {e}") from None
        raise TestbedError(f"QEMU went away during {execute}")

    def save(self, state: Path) -> None:
        """Write the devices' state to `state` and end the machine, leaving its RAM in the memory file.

        Raises:
            TestbedError: QEMU could not.
        """
        self.start_qmp()
        self.qmp("migrate", uri=f"exec:cat > {shlex.quote(str(state))}")
        deadline = time.monotonic() + _MIGRATION_TIMEOUT_S
        while (status := self.qmp("query-migrate").get("status")) != "completed":
            if status in ("failed", "cancelled") or time.monotonic() > deadline:
                raise TestbedError(f"QEMU: saving the machine: {status}")
            time.sleep(0.02)
        self.qmp("quit")
        self._process.wait(_MIGRATION_TIMEOUT_S)

    def restore(self, state: Path) -> None:
        """Start the machine from what `save` wrote.

        Raises:
            TestbedError: QEMU could not.
        """
        self.start_qmp()
        self.qmp("migrate-incoming", uri=f"exec:cat {shlex.quote(str(state))}")

    def tail(self, lines: int = 40) -> str:
        """The last of what QEMU and L1's console said."""
        logs = (
            os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")
            for fd in (self._log, self._console)
        )
        return "\n".join(line for log in logs for line in log.replace("\r", "").splitlines()[-lines:])

    def kill(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._qmp_reader.close()
        for s in self.channels.values():
            s.close()
        os.close(self._log)
        os.close(self._console)
