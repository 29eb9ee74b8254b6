"""L1, the testbed's machine: booted once, saved, and from then on restored for each job.

Its root is this machine's own /, read-only through 9p below an overlay in RAM that is thrown away, so no
image is built and a job sees the checkout, the virtual environment and the interpreter exactly as here.
"""

from __future__ import annotations

import hashlib
import os
import re
import select
import shlex
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.testbed import cache, debian, initramfs, qemu
from integration.testbed.debian import TestbedError
from integration.testbed.qemu import Qemu

# What L1 itself needs, then what jobs may: they cannot load modules, L1's kernel is not installed anywhere.
MODULES = (
    *("virtio_mmio", "virtio_console", "9pnet_virtio", "9p", "overlay", "kvm_amd"),
    *("loop", "crc32c_generic", "ext4", "squashfs", "tun", "veth", "bridge", "vhost_net", "vhost_vsock"),
)
EXIT_TIMEOUT = 124
BOOT_TIMEOUT_S = 60
GRACE_S = 10  # from SIGTERM to the end of L1
SNAPSHOTS_KEPT = 3  # each is some 300 MB
# After so long without a word L1 gets an interrupt, which is all that an empty order is.  QEMU 7.2 was seen
# to leave an emulated processor with SVM halted for good, its timer's interrupt pending (IRR and IF set, the
# TPR below): any other wakes it.
_QUIET_S = 1.0
_HERE = Path(__file__).parent
_END = b"\0L1-END\0"


@dataclass(frozen=True)
class Job:
    """A command to run in L1 as root, and the machine it wants."""

    command: Sequence[str]
    cwd: str
    env: Mapping[str, str]
    shares: Sequence[str]  # directories of this machine that it may write
    timeout_s: float
    smp: int
    mem_mib: int
    snapshot: bool

    def script(self) -> str:
        """What l1-init.sh and l1-stage2.sh source: the functions `shares` and `payload`."""
        shares = [f"share share{i} {shlex.quote(path)}" for i, path in enumerate(self.shares)]
        exports = [
            f"export {name}={shlex.quote(value)}"
            for name, value in self.env.items()
            if re.fullmatch(r"[A-Za-z_]\w*", name)
        ]
        command = f"exec {shlex.join(self.command)}"
        lines = ["shares() {", ":", *shares, "}", "payload() {", *exports]
        return "\n".join([*lines, f"cd {shlex.quote(self.cwd)} || exit 125", command, "}", ""])


def description() -> str:
    """The testbed's KVM in a few words, for reports."""
    return f"testbed (SVM emulated by QEMU {'.'.join(map(str, qemu.version()))})"


def run(job: Job) -> int:
    """Run `job`, passing its output on to our own descriptors 1 and 2; its exit status, or EXIT_TIMEOUT.

    Raises:
        TestbedError: the testbed failed, not the job.
        OSError: nobody reads our output.
    """
    kernel, initrd = _boot_files()
    if job.snapshot:
        saved = _snapshot(kernel, initrd, job.smp, job.mem_mib)
        machine = Qemu(kernel, initrd, job.smp, job.mem_mib, job.shares, memory=saved / "memory")
    else:
        machine = Qemu(kernel, initrd, job.smp, job.mem_mib, job.shares)
    try:
        if job.snapshot:
            machine.restore(saved / "state")
        else:
            _wait_ready(machine)
        script = job.script().encode()
        machine.channels["control"].sendall(b"GO %d %d\n" % (time.time(), len(script)))
        machine.channels["job"].sendall(script)
        return _pump(machine, job.timeout_s)
    except TestbedError as e:
        raise TestbedError(f"{e}\n{machine.tail()}") from None
    finally:
        machine.kill()


def _boot_files() -> tuple[Path, Path]:
    """(kernel, initramfs).  The kernel as ELF, for PVH: decompressing itself would take L1 seconds."""
    kernel = debian.kernel(debian.GENERIC)
    scripts = [(_HERE / name).read_bytes() for name in ("l1-init.sh", "l1-stage2.sh")]
    busybox = debian.tool("busybox", "busybox-static")

    def build(into: Path) -> None:
        nodes = {"init": initramfs.file(scripts[0]), "stage2": initramfs.file(scripts[1])}
        nodes |= initramfs.busybox() | initramfs.modules(kernel, MODULES)
        (into / "initrd").write_bytes(initramfs.archive(nodes))

    key = _key(scripts, MODULES, kernel.release, os.stat(busybox).st_mtime_ns)
    return kernel.vmlinux, cache.once(f"l1-initrd-{key}", build) / "initrd"


def _key(*what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]


def _snapshot(kernel: Path, initrd: Path, smp: int, mem_mib: int) -> Path:
    """A directory with L1's RAM ("memory") and device state ("state") from when it was ready for a job."""

    def build(into: Path) -> None:
        for last_try in (False, True):
            machine = Qemu(kernel, initrd, smp, mem_mib, memory=into / "memory", saving=True)
            try:
                _wait_ready(machine)
                time.sleep(0.5)  # let L1 come to rest: what it is doing now, every run will do again
                machine.save(into / "state")
                (into / "tsc_khz").write_text(str(qemu.tsc_khz()))
                break
            except TestbedError as e:
                if last_try:
                    raise TestbedError(f"{e}\n{machine.tail()}") from None
            finally:
                machine.kill()

    def good(saved: Path) -> bool:
        # Made where the TSC runs at another rate, L1's clock would be wrong.
        made = int((saved / "tsc_khz").read_text())
        return abs(made - qemu.tsc_khz()) < made / 500

    program = os.stat(qemu.qemu())
    cpu = re.findall(r"^(?:model name|flags)\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.M)[:2]
    model = (qemu.MACHINE, qemu.ACCEL, qemu.CPU, qemu.APPEND, qemu.CHANNELS, qemu.SHARES)
    key = _key(initrd, kernel, model, program.st_size, program.st_mtime_ns, cpu, smp, mem_mib)
    saved = cache.once(f"l1-snapshot-{key}", build, good)
    os.utime(saved)
    others = [d for d in cache.directory().glob("l1-snapshot-*") if d.is_dir() and d != saved]
    for old in sorted(others, key=os.path.getmtime)[: -(SNAPSHOTS_KEPT - 1)]:
        shutil.rmtree(old, ignore_errors=True)
    return saved


def _control_lines(machine: Qemu) -> list[str]:
    """What L1 has said on the control channel; call when it is readable.

    Raises:
        TestbedError: QEMU is gone, or L1 says it cannot go on.
    """
    lines = b""
    while not lines.endswith(b"\n"):  # L1 writes whole lines
        try:
            data = machine.channels["control"].recv(4096)
        except ConnectionResetError:
            data = b""
        if not data:
            raise TestbedError("QEMU stopped")
        lines += data
    for line in lines.decode(errors="replace").splitlines():
        if line.startswith("FAIL"):
            raise TestbedError(f"L1: {line}")
    return lines.decode(errors="replace").splitlines()


def _wait_ready(machine: Qemu) -> None:
    if not select.select([machine.channels["control"]], [], [], BOOT_TIMEOUT_S)[0]:
        raise TestbedError(f"L1 did not come up within {BOOT_TIMEOUT_S} s")
    if _control_lines(machine) != ["READY"]:
        raise TestbedError("L1 said something else than READY")


def _pump(machine: Qemu, timeout_s: float) -> int:
    """Pass the job's output on until it has ended; its exit status, or EXIT_TIMEOUT."""
    # The hard limit, also when whoever reads our output has stopped reading.  Nothing needs cleaning up:
    # QEMU dies with us, and its files have no names.
    signal.signal(signal.SIGALRM, lambda *_: os._exit(EXIT_TIMEOUT))
    signal.setitimer(signal.ITIMER_REAL, timeout_s + 2 * GRACE_S)
    control = machine.channels["control"]
    sinks = {machine.channels["stdout"]: 1, machine.channels["stderr"]: 2}
    held = dict.fromkeys(sinks, b"")
    deadline = time.monotonic() + timeout_s
    status: int | None = None
    timed_out = False
    while status is None or sinks:
        if time.monotonic() >= deadline:
            if timed_out or status is not None:
                break
            timed_out = True
            deadline += GRACE_S
            say(f"{timeout_s:g} s are over; SIGABRT, then SIGTERM to the command")
            # Python, told to by PYTHONFAULTHANDLER, answers SIGABRT with where each of its threads is.
            control.sendall(b"DUMP\nSIGNAL ABRT\nSIGNAL TERM\n")
        watched = [*sinks] if status is not None else [control, *sinks]
        left_s = max(0.0, deadline - time.monotonic())
        ready = select.select(watched, [], [], min(left_s, _QUIET_S))[0]
        if not ready and status is None:
            control.sendall(b"\n")
        for source in ready:
            if source is control:
                for line in _control_lines(machine):
                    if line.startswith("EXIT "):
                        status, deadline = int(line[5:]), time.monotonic() + GRACE_S
                continue
            data = held[source] + source.recv(1 << 16)
            text, end, _ = data.partition(_END)
            # What may be the beginning of the mark waits for the rest of it.
            keep = 0 if end else next((n for n in range(len(_END) - 1, 0, -1) if text.endswith(_END[:n])), 0)
            text, held[source] = text[: len(text) - keep], text[len(text) - keep :]
            _write_all(sinks[source], text)
            if end:
                del sinks[source]
    if timed_out:
        say(f"timed out; the end of L1's console:\n{machine.tail(80)}")
        return EXIT_TIMEOUT
    assert status is not None
    return status


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def say(text: str) -> None:
    """One line of the testbed's own on standard error."""
    _write_all(2, f"testbed: {text}\n".encode())
