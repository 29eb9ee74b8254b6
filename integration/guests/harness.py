"""Tiny guests, one property each: assembled here, run by kvmcore directly, watched through two ports."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from devproc import wire
from kvmcore import cpusetup, layout
from kvmcore.abi import Regs, Segment
from kvmcore.exitloop import Core, CoreVcpu, Exit, ExitKind, Route
from kvmcore.kvm import Kvm, Vcpu, Vm
from kvmcore.memory import GuestMemory

HERE: Final = Path(__file__).parent
LOAD = 0x1000
REPORT, DONE, DEVICE, OTHER = 0x500, 0x504, 0x600, 0x608
MMIO = 0xD0000
RAM_END = 0xA0000


class Device:
    """A device process's half of the access channel: byte-wide registers that count up as they are read."""

    def __init__(self, first: int = 0) -> None:
        self.ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._next = first
        self.writes: list[tuple[int, int, int]] = []  # offset, size, data
        self.reads: list[tuple[int, int]] = []  # offset, size
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()

    def _main(self) -> None:
        while frame := self._theirs.recv(wire.ACCESS_FRAME_MAX):
            match wire.decode(frame, wire.ACCESS_FRAME_MAX):
                case wire.Write(offset=offset, size=size, data=data):
                    self.writes.append((offset, size, data))
                case wire.Read(offset=offset, size=size):
                    self.reads.append((offset, size))
                    value = bytes((self._next + n) & 0xFF for n in range(size))
                    self._next += size
                    self._theirs.send(wire.encode(wire.Value(int.from_bytes(value, "little"))))
        self._theirs.close()

    def finish(self) -> None:
        """Returns when everything sent has been taken; the core must have given the device up."""
        self._thread.join(10)
        self.ours.close()


class Guest:
    """A virtual machine with 640 KiB of RAM around one assembled guest.

    Args:
        irqchip: "none", "kernel" or "split".
        devices: at ports 0x600 and 0x608, and 8 KiB of memory at 0xd0000 for the first.
    """

    def __init__(
        self, name: str, irqchip: str = "none", cpus: int = 1, devices: Iterable[Device] = ()
    ) -> None:
        self.devices = tuple(devices)
        self.kvm = Kvm()
        self.vm: Vm = self.kvm.create_vm()
        self.vm.set_identity_map_addr(layout.IDENTITY_MAP)
        self.vm.set_tss_addr(layout.TSS)
        if irqchip == "kernel":
            self.vm.create_irqchip()
            self.vm.create_pit2()
        elif irqchip == "split":
            self.vm.enable_split_irqchip(layout.GSI_COUNT)
        self.memory = GuestMemory.create([(0, RAM_END), (1 << 20, 16 << 20)])
        for slot, region in enumerate(self.memory.regions):
            host = self.memory.host_address(region.gpa, region.size)
            self.vm.set_user_memory_region(slot, region.gpa, region.size, host)
        self.memory.write(LOAD, assemble(name))
        self.core = Core()
        self.vcpus: list[Vcpu] = [self.vm.create_vcpu(n) for n in range(cpus)]
        self.loops = [CoreVcpu(self.core, vcpu.fd, vcpu.run) for vcpu in self.vcpus]
        self.reports: list[int] = []
        self.pio = [Route.python(REPORT, 8)]
        mmio = []
        for n, device in enumerate(self.devices):
            index = self.core.add_device(device.ours.fileno())
            self.pio.append(Route.device(DEVICE + 8 * n, 8, index, wire.Space.PORT))
            if n == 0:
                self.pio.append(Route.device(REPORT - 1, 1, index, wire.Space.PORT2))
                mmio.append(Route.device(MMIO, 0x2000, index, wire.Space.BAR0))
        self.core.set_routes(self.pio, mmio)

    def real_mode(self) -> Guest:
        """Start at LOAD as after a jump from the reset vector."""
        sregs = self.vcpus[0].get_sregs()
        flat = Segment(0, 0xFFFF, 0, type=3, present=1, s=1)
        data = dict.fromkeys(("ds", "es", "fs", "gs", "ss"), flat)
        self.vcpus[0].set_sregs(sregs._replace(cs=flat._replace(type=0xB), **data))
        self.vcpus[0].set_regs(Regs(rip=LOAD))
        return self

    def long_mode(self) -> Guest:
        """Start at LOAD by the 64-bit boot protocol."""
        cpusetup.write_tables(self.memory)
        for vcpu in self.vcpus:
            cpusetup.setup(self.kvm, vcpu, len(self.vcpus), LOAD)
        return self

    def run(self, answer: Callable[[Exit], None] | None = None, number: int = 0) -> Exit:
        """Run one vCPU until it is done, or leaves for another reason than the guest's ports.

        Args:
            answer: handles accesses and exits that are not the report port's.
        """
        loop = self.loops[number]
        while True:
            exit_ = loop.run()
            if exit_.kind is ExitKind.IO and not exit_.is_mmio and REPORT <= exit_.addr < REPORT + 8:
                if not exit_.is_write:
                    loop.complete(ord("!"))
                elif exit_.addr == DONE:
                    return exit_
                else:
                    self.reports.append(exit_.data)
                    if answer is not None:
                        answer(exit_)
            elif answer is not None and exit_.kind in (
                ExitKind.IO,
                ExitKind.IOAPIC_EOI,
                ExitKind.IRQ_WINDOW_OPEN,
            ):
                answer(exit_)
            else:
                return exit_

    def finish(self) -> None:
        """Let the devices take what they were sent, and take everything apart."""
        for n in range(len(self.devices)):
            self.core.mark_dead(n)
        for device in self.devices:
            device.finish()
        for loop in self.loops:
            loop.close()
        for vcpu in self.vcpus:
            vcpu.close()
        self.vm.close()
        self.kvm.close()
        self.memory.close()


def assemble(name: str) -> bytes:
    """The bytes of NAME.S, linked at LOAD."""
    with tempfile.TemporaryDirectory() as directory:
        linked, assembled = Path(directory, "guest"), Path(directory, "guest.o")
        subprocess.run(["as", "-I", HERE, "-o", assembled, HERE / f"{name}.S"], check=True)
        link = ["ld", f"-Ttext={LOAD:#x}", "--entry=start", "--oformat=binary", "-o", linked]
        subprocess.run([*link, assembled], check=True)
        return linked.read_bytes()
