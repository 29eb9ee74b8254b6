"""Typed wrappers of KVM's system, VM and vCPU ioctls; an error names the ioctl and its likely cause.

Spec: Linux, Documentation/virt/kvm/api.rst, section 4 (each method names its ioctl).  KVM_RUN is in
`_core.c`.  Left out: what vmsup does not use (dirty logging, debugging, devices, nested state).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterable, Sequence
from struct import Struct
from types import TracebackType
from typing import Self

from kvmcore import abi
from kvmcore.abi import Cap, CpuidEntry, Ioctl, MpState, Regs, Sregs
from kvmcore.errors import KvmError
from kvmcore.irq import IrqchipRoute, MsiMessage, MsiRoute

_LIKELY = {
    (Ioctl.KVM_CREATE_VM, errno.EBUSY): "another hypervisor holds the processor's virtualization extensions",
    (Ioctl.KVM_CREATE_VM, errno.ENOMEM): "the host is out of memory",
    (Ioctl.KVM_CREATE_VCPU, errno.EINVAL): "more vCPUs than this KVM supports",
    (Ioctl.KVM_CREATE_VCPU, errno.EEXIST): "this vCPU number exists already",
    (Ioctl.KVM_CREATE_IRQCHIP, errno.EEXIST): "there is an interrupt chip already, or a vCPU",
    (Ioctl.KVM_CREATE_PIT2, errno.EEXIST): "there is a PIT already",
    (Ioctl.KVM_CREATE_PIT2, errno.ENOENT): "the PIT needs the in-kernel interrupt chip",
    (Ioctl.KVM_ENABLE_CAP, errno.EINVAL): "this KVM lacks the extension",
    (Ioctl.KVM_ENABLE_CAP, errno.EEXIST): "there is an interrupt chip already, or a vCPU",
    (Ioctl.KVM_SET_USER_MEMORY_REGION, errno.EEXIST): "it overlaps another region",
    (Ioctl.KVM_SET_USER_MEMORY_REGION, errno.EINVAL): "not page-aligned, or beyond the address width",
    (Ioctl.KVM_IRQFD, errno.EINVAL): "irqfd needs an in-kernel interrupt chip, resampling a complete one",
    (Ioctl.KVM_IRQFD, errno.EBUSY): "this eventfd is bound to an interrupt already",
    (Ioctl.KVM_IOEVENTFD, errno.EEXIST): "there is an ioeventfd at this address already",
    (Ioctl.KVM_IOEVENTFD, errno.ENOSPC): "KVM's limit of ioeventfds is reached",
    (Ioctl.KVM_SIGNAL_MSI, errno.EINVAL): "MSI needs an in-kernel local APIC",
    (Ioctl.KVM_SET_GSI_ROUTING, errno.EINVAL): "a GSI, chip or pin is out of range",
    (Ioctl.KVM_SET_CPUID2, errno.EINVAL): "the vCPU has run already, or a leaf is impossible",
    (Ioctl.KVM_SET_SREGS, errno.EINVAL): "an impossible combination of control registers",
}

_LIST_MAX = 4096


class Handle:
    """A KVM descriptor with its owner; `close` may be called again."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, ioctl: Ioctl, argument: int = 0) -> int:
        """An ioctl whose argument is a number."""
        try:
            result: int = fcntl.ioctl(self.fd, ioctl, argument)
        except OSError as e:
            raise self._error(ioctl, e) from None
        return result

    def _set(self, ioctl: Ioctl, data: bytes) -> int:
        """An ioctl that takes a structure."""
        return self._exchange(ioctl, bytearray(data))

    def _get(self, ioctl: Ioctl, layout: Struct) -> bytes:
        """An ioctl that fills a structure."""
        buffer = bytearray(layout.size)
        self._exchange(ioctl, buffer)
        return bytes(buffer)

    def _exchange(self, ioctl: Ioctl, buffer: bytearray) -> int:
        """An ioctl that takes a structure and changes it."""
        try:
            result: int = fcntl.ioctl(self.fd, ioctl, buffer)
        except OSError as e:
            raise self._error(ioctl, e) from None
        return result

    @staticmethod
    def _error(ioctl: Ioctl, e: OSError) -> KvmError:
        code = e.errno or 0
        return KvmError(ioctl.name, code, _LIKELY.get((ioctl, code), ""))


class Kvm(Handle):
    """/dev/kvm."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open it and check the API version.

        Raises:
            KvmError: absent, not permitted, or another API version than 12.
        """
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as e:
            likely = {
                errno.ENOENT: "no KVM: load kvm_intel or kvm_amd; is virtualization on in the firmware?",
                errno.EACCES: "not permitted: become a member of the group kvm",
                errno.ENODEV: "the kvm module has no hardware to run on",
            }
            raise KvmError(f"open {path}", e.errno or 0, likely.get(e.errno or 0, "")) from None
        try:
            if self.api_version != abi.API_VERSION:
                why = f"version {self.api_version}, expected {abi.API_VERSION}"
                raise KvmError("KVM_GET_API_VERSION", errno.EPROTO, why)
        except KvmError:
            self.close()
            raise

    @property
    def api_version(self) -> int:
        """KVM_GET_API_VERSION."""
        return self._call(Ioctl.KVM_GET_API_VERSION)

    def check(self, cap: Cap) -> int:
        """KVM_CHECK_EXTENSION: 0 if absent, else 1 or the extension's own number."""
        return self._call(Ioctl.KVM_CHECK_EXTENSION, cap)

    def require(self, caps: Iterable[Cap]) -> None:
        """Raises KvmError naming every extension of `caps` that this KVM lacks."""
        missing = [cap.name for cap in caps if not self.check(cap)]
        if missing:
            raise KvmError("KVM_CHECK_EXTENSION", errno.EOPNOTSUPP, f"this KVM lacks {', '.join(missing)}")

    def supported_cpuid(self) -> list[CpuidEntry]:
        """KVM_GET_SUPPORTED_CPUID: what the processor and this KVM can offer a guest."""
        entries = self._list(Ioctl.KVM_GET_SUPPORTED_CPUID, abi.CPUID2, abi.CPUID_ENTRY2)
        return [CpuidEntry(*entry) for entry in entries]

    def msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs that are worth saving."""
        entries = self._list(Ioctl.KVM_GET_MSR_INDEX_LIST, abi.MSR_LIST, abi.MSR_INDEX)
        return [index for (index,) in entries]

    def _list(self, ioctl: Ioctl, header: Struct, entry: Struct) -> list[tuple[int, ...]]:
        """An ioctl that fills as many entries as there are, and says E2BIG if there is no room."""
        room = 128
        while True:
            buffer = bytearray(header.size + room * entry.size)
            header.pack_into(buffer, 0, room)
            try:
                self._exchange(ioctl, buffer)
            except KvmError as e:
                if e.errno != errno.E2BIG or room >= _LIST_MAX:
                    raise
                room *= 2
                continue
            (count,) = header.unpack_from(buffer)
            return list(entry.iter_unpack(buffer[header.size : header.size + count * entry.size]))

    def create_vm(self) -> Vm:
        """KVM_CREATE_VM."""
        return Vm(self._call(Ioctl.KVM_CREATE_VM), self._call(Ioctl.KVM_GET_VCPU_MMAP_SIZE))


class Vm(Handle):
    """A virtual machine."""

    def __init__(self, fd: int, run_size: int) -> None:
        super().__init__(fd)
        self._run_size = run_size

    def check(self, cap: Cap) -> int:
        """KVM_CHECK_EXTENSION for this VM."""
        return self._call(Ioctl.KVM_CHECK_EXTENSION, cap)

    def set_tss_addr(self, gpa: int) -> None:
        """KVM_SET_TSS_ADDR: three pages below 4 GiB that Intel's real mode needs."""
        # fcntl.ioctl takes a number as a signed C int, which an address this high is not.
        ioctl = ctypes.CDLL(None, use_errno=True).ioctl
        if ioctl(self.fd, ctypes.c_ulong(Ioctl.KVM_SET_TSS_ADDR), ctypes.c_ulong(gpa)) < 0:
            raise self._error(Ioctl.KVM_SET_TSS_ADDR, OSError(ctypes.get_errno(), ""))

    def set_identity_map_addr(self, gpa: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page, likewise; before the first vCPU."""
        self._set(Ioctl.KVM_SET_IDENTITY_MAP_ADDR, abi.U64.pack(gpa))

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP: PIC, IOAPIC and local APICs in the kernel; before the first vCPU."""
        self._call(Ioctl.KVM_CREATE_IRQCHIP)

    def create_pit2(self) -> None:
        """KVM_CREATE_PIT2, with port 0x61 answered by a dummy speaker."""
        self._set(Ioctl.KVM_CREATE_PIT2, abi.PIT_CONFIG.pack(abi.KVM_PIT_SPEAKER_DUMMY))

    def enable_cap(self, cap: Cap, *args: int) -> None:
        """KVM_ENABLE_CAP with up to four arguments."""
        self._set(Ioctl.KVM_ENABLE_CAP, abi.ENABLE_CAP.pack(cap, 0, *args, *(0,) * (4 - len(args))))

    def enable_split_irqchip(self, pins: int) -> None:
        """KVM_CAP_SPLIT_IRQCHIP: only the local APICs in the kernel; GSIs below `pins` are the IOAPIC's."""
        self.enable_cap(Cap.KVM_CAP_SPLIT_IRQCHIP, pins)

    def set_user_memory_region(
        self, slot: int, gpa: int, size: int, host_address: int, flags: int = 0
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION; size 0 removes the slot."""
        data = abi.USERSPACE_MEMORY_REGION.pack(slot, flags, gpa, size, host_address)
        self._set(Ioctl.KVM_SET_USER_MEMORY_REGION, data)

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU; `vcpu_id` is its APIC id."""
        return Vcpu(vcpu_id, self._call(Ioctl.KVM_CREATE_VCPU, vcpu_id), self._run_size)

    def irq_line(self, gsi: int, level: int) -> None:
        """KVM_IRQ_LINE: set an in-kernel chip's input."""
        self._set(Ioctl.KVM_IRQ_LINE, abi.IRQ_LEVEL.pack(gsi, level))

    def irqfd(self, eventfd: int, gsi: int, resample: int | None = None, deassign: bool = False) -> None:
        """KVM_IRQFD: each write to `eventfd` raises `gsi`; with `resample`, a level until the guest's EOI."""
        flags = abi.KVM_IRQFD_FLAG_DEASSIGN * deassign
        if resample is not None:
            flags |= abi.KVM_IRQFD_FLAG_RESAMPLE
        self._set(Ioctl.KVM_IRQFD, abi.IRQFD.pack(eventfd, gsi, flags, resample or 0))

    def coalesce_ports(self, port: int, size: int) -> int | None:
        """KVM_REGISTER_COALESCED_MMIO: guest writes there wait in a ring; which page of a vCPU that is.

        None: this KVM cannot, and they exit as ever.
        """
        page = self.check(Cap.KVM_CAP_COALESCED_MMIO)
        if not page or not self.check(Cap.KVM_CAP_COALESCED_PIO):
            return None
        self._set(Ioctl.KVM_REGISTER_COALESCED_MMIO, abi.COALESCED_ZONE.pack(port, size, 1))
        return page

    def exit_ports(self, port: int, size: int) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: guest writes there, which were coalesced, exit again."""
        self._set(Ioctl.KVM_UNREGISTER_COALESCED_MMIO, abi.COALESCED_ZONE.pack(port, size, 1))

    def ioeventfd(
        self,
        eventfd: int,
        addr: int,
        size: int,
        *,
        pio: bool,
        datamatch: int | None = None,
        deassign: bool = False,
    ) -> None:
        """KVM_IOEVENTFD: a guest write at `addr` (of `size` bytes, 0 any) writes `eventfd`, no exit."""
        flags = abi.KVM_IOEVENTFD_FLAG_PIO * pio | abi.KVM_IOEVENTFD_FLAG_DEASSIGN * deassign
        if datamatch is not None:
            flags |= abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        self._set(Ioctl.KVM_IOEVENTFD, abi.IOEVENTFD.pack(datamatch or 0, addr, size, eventfd, flags))

    def set_gsi_routing(self, routes: Sequence[IrqchipRoute | MsiRoute]) -> None:
        """KVM_SET_GSI_ROUTING: replace the whole table."""
        data = bytearray(abi.IRQ_ROUTING.pack(len(routes), 0))
        for route in routes:
            if isinstance(route, IrqchipRoute):
                kind = abi.KVM_IRQ_ROUTING_IRQCHIP
                data += abi.IRQ_ROUTING_IRQCHIP.pack(route.gsi, kind, 0, route.chip, route.pin)
            else:
                kind = abi.KVM_IRQ_ROUTING_MSI
                low, high = route.message.address & 0xFFFFFFFF, route.message.address >> 32
                data += abi.IRQ_ROUTING_MSI.pack(route.gsi, kind, 0, low, high, route.message.data, 0)
        self._exchange(Ioctl.KVM_SET_GSI_ROUTING, data)

    def signal_msi(self, message: MsiMessage) -> None:
        """KVM_SIGNAL_MSI: deliver one message; one that the guest blocks is gone, as on the real bus."""
        low, high = message.address & 0xFFFFFFFF, message.address >> 32
        self._set(Ioctl.KVM_SIGNAL_MSI, abi.MSI.pack(low, high, message.data, 0, 0))

    def get_clock(self) -> int:
        """KVM_GET_CLOCK: the guest's kvmclock in nanoseconds."""
        return int(abi.CLOCK_DATA.unpack(self._get(Ioctl.KVM_GET_CLOCK, abi.CLOCK_DATA))[0])

    def set_clock(self, clock_ns: int) -> None:
        """KVM_SET_CLOCK."""
        self._set(Ioctl.KVM_SET_CLOCK, abi.CLOCK_DATA.pack(clock_ns, 0, 0, 0))


class Vcpu(Handle):
    """A virtual processor; `run` is its shared kvm_run page.  Each ioctl waits while the vCPU runs."""

    def __init__(self, vcpu_id: int, fd: int, run_size: int) -> None:
        super().__init__(fd)
        self.id = vcpu_id
        try:
            self.run = mmap.mmap(fd, run_size, mmap.MAP_SHARED)
        except BaseException:
            self.close()
            raise

    @property
    def ready_for_interrupt_injection(self) -> bool:
        """Whether `interrupt` would be taken now (as of the last exit; split interrupt chip only)."""
        return bool(self.run[12])

    def request_interrupt_window(self, wanted: bool) -> None:
        """Ask KVM_RUN to return as soon as `interrupt` would be taken."""
        self.run[0] = wanted

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: inject the 8259A's vector (split interrupt chip only)."""
        self._set(Ioctl.KVM_INTERRUPT, abi.INTERRUPT.pack(vector))

    def get_regs(self) -> Regs:
        """KVM_GET_REGS."""
        return Regs.unpack(self._get(Ioctl.KVM_GET_REGS, abi.REGS))

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS."""
        self._set(Ioctl.KVM_SET_REGS, regs.pack())

    def get_sregs(self) -> Sregs:
        """KVM_GET_SREGS."""
        return Sregs.unpack(self._get(Ioctl.KVM_GET_SREGS, abi.SREGS))

    def set_sregs(self, sregs: Sregs) -> None:
        """KVM_SET_SREGS."""
        self._set(Ioctl.KVM_SET_SREGS, sregs.pack())

    def get_fpu(self) -> bytes:
        """KVM_GET_FPU: an abi.FPU."""
        return self._get(Ioctl.KVM_GET_FPU, abi.FPU)

    def set_fpu(self, fpu: bytes) -> None:
        """KVM_SET_FPU: an abi.FPU."""
        self._set(Ioctl.KVM_SET_FPU, fpu)

    def get_lapic(self) -> bytes:
        """KVM_GET_LAPIC: the local APIC's register page."""
        return self._get(Ioctl.KVM_GET_LAPIC, abi.LAPIC_STATE)

    def set_lapic(self, registers: bytes) -> None:
        """KVM_SET_LAPIC."""
        self._set(Ioctl.KVM_SET_LAPIC, abi.LAPIC_STATE.pack(registers))

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """KVM_GET_MSRS; those after the first that KVM does not know are missing."""
        buffer = bytearray(abi.MSRS.pack(len(indices)))
        for index in indices:
            buffer += abi.MSR_ENTRY.pack(index, 0)
        count = self._exchange(Ioctl.KVM_GET_MSRS, buffer)
        entries = buffer[abi.MSRS.size : abi.MSRS.size + count * abi.MSR_ENTRY.size]
        return dict(abi.MSR_ENTRY.iter_unpack(entries))

    def set_msrs(self, msrs: dict[int, int]) -> None:
        """KVM_SET_MSRS, all of them.

        Raises:
            KvmError: naming the first that KVM refuses.
        """
        buffer = bytearray(abi.MSRS.pack(len(msrs)))
        for index, data in msrs.items():
            buffer += abi.MSR_ENTRY.pack(index, data)
        count = self._exchange(Ioctl.KVM_SET_MSRS, buffer)
        if count < len(msrs):
            index, data = list(msrs.items())[count]
            raise KvmError("KVM_SET_MSRS", errno.EINVAL, f"this KVM refuses {data:#x} for MSR {index:#x}")

    def set_cpuid2(self, entries: Sequence[CpuidEntry]) -> None:
        """KVM_SET_CPUID2; before the first KVM_RUN."""
        data = abi.CPUID2.pack(len(entries)) + b"".join(abi.CPUID_ENTRY2.pack(*e) for e in entries)
        self._set(Ioctl.KVM_SET_CPUID2, data)

    def get_mp_state(self) -> MpState:
        """KVM_GET_MP_STATE."""
        return MpState(abi.MP_STATE.unpack(self._get(Ioctl.KVM_GET_MP_STATE, abi.MP_STATE))[0])

    def set_mp_state(self, state: MpState) -> None:
        """KVM_SET_MP_STATE."""
        self._set(Ioctl.KVM_SET_MP_STATE, abi.MP_STATE.pack(state))

    def tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ: the rate of the guest's time-stamp counter."""
        return self._call(Ioctl.KVM_GET_TSC_KHZ)

    def close(self) -> None:
        """Also unmaps the run page; its exit loop must be gone."""
        super().close()
        if hasattr(self, "run"):
            self.run.close()
