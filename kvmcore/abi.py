"""The numbers and structures of <linux/kvm.h> on x86-64 that vmsup uses; a test asks the header.

Spec: Linux, Documentation/virt/kvm/api.rst.  Left out: `struct kvm_run`, which only `_core.c` reads, and
every ioctl that vmsup does not issue.
"""

from __future__ import annotations

import enum
from struct import Struct
from typing import Final, NamedTuple, Self


def _io(nr: int, direction: int = 0, size: int = 0) -> int:
    """An ioctl number as <asm-generic/ioctl.h> composes it; KVM's type is 0xAE."""
    return direction << 30 | size << 16 | 0xAE << 8 | nr


def _iow(nr: int, argument: Struct) -> int:
    return _io(nr, 1, argument.size)


def _ior(nr: int, argument: Struct) -> int:
    return _io(nr, 2, argument.size)


def _iowr(nr: int, argument: Struct) -> int:
    return _io(nr, 3, argument.size)


U64: Final = Struct("<Q")
CPUID2: Final = Struct("<I4x")  # nent; entries follow
CPUID_ENTRY2: Final = Struct("<7I12x")  # function, index, flags, eax, ebx, ecx, edx
ENABLE_CAP: Final = Struct("<2I4Q64x")  # cap, flags, args
CLOCK_DATA: Final = Struct("<QI4xQQ16x")  # clock, flags, realtime, host_tsc
DTABLE: Final = Struct("<QH6x")  # base, limit
FPU: Final = Struct("<128s2HBxHQQ256sI4x")  # fpr, fcw, fsw, ftwx, last_opcode, last_ip, last_dp, xmm, mxcsr
INTERRUPT: Final = Struct("<I")  # irq
COALESCED_ZONE: Final = Struct("<QII")  # addr, size, pio
IOEVENTFD: Final = Struct("<QQIiI36x")  # datamatch, addr, len, fd, flags
IRQ_LEVEL: Final = Struct("<2I")  # irq, level
IRQ_ROUTING: Final = Struct("<2I")  # nr, flags; entries follow
IRQ_ROUTING_IRQCHIP: Final = Struct("<3I4x2I24x")  # gsi, type, flags, irqchip, pin
IRQ_ROUTING_MSI: Final = Struct("<3I4x4I16x")  # gsi, type, flags, address_lo, address_hi, data, devid
IRQFD: Final = Struct("<4I16x")  # fd, gsi, flags, resamplefd
LAPIC_STATE: Final = Struct("<1024s")
MP_STATE: Final = Struct("<I")
MSI: Final = Struct("<5I12x")  # address_lo, address_hi, data, flags, devid
MSR_ENTRY: Final = Struct("<I4xQ")  # index, data
MSR_LIST: Final = Struct("<I")  # nmsrs; indices follow
MSR_INDEX: Final = Struct("<I")
MSRS: Final = Struct("<I4x")  # nmsrs; entries follow
PIT_CONFIG: Final = Struct("<I60x")  # flags
REGS: Final = Struct("<18Q")
SEGMENT: Final = Struct("<QIH9Bx")  # base, limit, selector, type, present, dpl, db, s, l, g, avl, unusable
USERSPACE_MEMORY_REGION: Final = Struct("<2I3Q")  # slot, flags, guest_phys_addr, memory_size, userspace_addr
SREGS: Final = Struct(f"<{8 * SEGMENT.size}s{2 * DTABLE.size}s11Q")


class Ioctl(enum.IntEnum):
    """System, VM and vCPU ioctls; the name is the header's without its prefix."""

    KVM_GET_API_VERSION = _io(0x00)
    KVM_CREATE_VM = _io(0x01)
    KVM_GET_MSR_INDEX_LIST = _iowr(0x02, MSR_LIST)
    KVM_CHECK_EXTENSION = _io(0x03)
    KVM_GET_VCPU_MMAP_SIZE = _io(0x04)
    KVM_GET_SUPPORTED_CPUID = _iowr(0x05, CPUID2)
    KVM_CREATE_VCPU = _io(0x41)
    KVM_SET_USER_MEMORY_REGION = _iow(0x46, USERSPACE_MEMORY_REGION)
    KVM_SET_TSS_ADDR = _io(0x47)
    KVM_SET_IDENTITY_MAP_ADDR = _iow(0x48, U64)
    KVM_CREATE_IRQCHIP = _io(0x60)
    KVM_IRQ_LINE = _iow(0x61, IRQ_LEVEL)
    KVM_SET_GSI_ROUTING = _iow(0x6A, IRQ_ROUTING)
    KVM_IRQFD = _iow(0x76, IRQFD)
    KVM_CREATE_PIT2 = _iow(0x77, PIT_CONFIG)
    KVM_REGISTER_COALESCED_MMIO = _iow(0x67, COALESCED_ZONE)
    KVM_UNREGISTER_COALESCED_MMIO = _iow(0x68, COALESCED_ZONE)
    KVM_IOEVENTFD = _iow(0x79, IOEVENTFD)
    KVM_SET_CLOCK = _iow(0x7B, CLOCK_DATA)
    KVM_GET_CLOCK = _ior(0x7C, CLOCK_DATA)
    KVM_RUN = _io(0x80)
    KVM_GET_REGS = _ior(0x81, REGS)
    KVM_SET_REGS = _iow(0x82, REGS)
    KVM_GET_SREGS = _ior(0x83, SREGS)
    KVM_SET_SREGS = _iow(0x84, SREGS)
    KVM_INTERRUPT = _iow(0x86, INTERRUPT)
    KVM_GET_MSRS = _iowr(0x88, MSRS)
    KVM_SET_MSRS = _iow(0x89, MSRS)
    KVM_GET_FPU = _ior(0x8C, FPU)
    KVM_SET_FPU = _iow(0x8D, FPU)
    KVM_GET_LAPIC = _ior(0x8E, LAPIC_STATE)
    KVM_SET_LAPIC = _iow(0x8F, LAPIC_STATE)
    KVM_SET_CPUID2 = _iow(0x90, CPUID2)
    KVM_GET_MP_STATE = _ior(0x98, MP_STATE)
    KVM_SET_MP_STATE = _iow(0x99, MP_STATE)
    KVM_GET_TSC_KHZ = _io(0xA3)
    KVM_ENABLE_CAP = _iow(0xA3, ENABLE_CAP)
    KVM_SIGNAL_MSI = _iow(0xA5, MSI)


class Cap(enum.IntEnum):
    """Extensions for KVM_CHECK_EXTENSION; the name is the header's."""

    KVM_CAP_IRQCHIP = 0
    KVM_CAP_USER_MEMORY = 3
    KVM_CAP_SET_TSS_ADDR = 4
    KVM_CAP_EXT_CPUID = 7
    KVM_CAP_NR_VCPUS = 9
    KVM_CAP_MP_STATE = 14
    KVM_CAP_COALESCED_MMIO = 15
    KVM_CAP_IRQ_ROUTING = 25
    KVM_CAP_IRQFD = 32
    KVM_CAP_PIT2 = 33
    KVM_CAP_IOEVENTFD = 36
    KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
    KVM_CAP_ADJUST_CLOCK = 39
    KVM_CAP_GET_TSC_KHZ = 61
    KVM_CAP_MAX_VCPUS = 66
    KVM_CAP_TSC_DEADLINE_TIMER = 72
    KVM_CAP_SIGNAL_MSI = 77
    KVM_CAP_READONLY_MEM = 81
    KVM_CAP_IRQFD_RESAMPLE = 82
    KVM_CAP_SPLIT_IRQCHIP = 121
    KVM_CAP_IOEVENTFD_ANY_LENGTH = 122
    KVM_CAP_MAX_VCPU_ID = 128
    KVM_CAP_IMMEDIATE_EXIT = 136
    KVM_CAP_COALESCED_PIO = 162


API_VERSION: Final = 12

KVM_MEM_READONLY: Final = 2
KVM_PIT_SPEAKER_DUMMY: Final = 1
KVM_IRQFD_FLAG_DEASSIGN: Final = 1
KVM_IRQFD_FLAG_RESAMPLE: Final = 2
KVM_IOEVENTFD_FLAG_DATAMATCH: Final = 1
KVM_IOEVENTFD_FLAG_PIO: Final = 2
KVM_IOEVENTFD_FLAG_DEASSIGN: Final = 4
KVM_IRQ_ROUTING_IRQCHIP: Final = 1
KVM_IRQ_ROUTING_MSI: Final = 2
KVM_IRQCHIP_PIC_MASTER: Final = 0
KVM_IRQCHIP_PIC_SLAVE: Final = 1
KVM_IRQCHIP_IOAPIC: Final = 2
KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final = 1


class MpState(enum.IntEnum):
    """What a vCPU is doing when it is not running."""

    KVM_MP_STATE_RUNNABLE = 0
    KVM_MP_STATE_UNINITIALIZED = 1
    KVM_MP_STATE_INIT_RECEIVED = 2
    KVM_MP_STATE_HALTED = 3
    KVM_MP_STATE_SIPI_RECEIVED = 4


class Regs(NamedTuple):
    """struct kvm_regs."""

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2

    def pack(self) -> bytes:
        return REGS.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*REGS.unpack(data))


class Segment(NamedTuple):
    """struct kvm_segment; the limit is in bytes, whatever `g` says."""

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741  the architecture's name for it
    g: int = 0
    avl: int = 0
    unusable: int = 0


class Dtable(NamedTuple):
    """struct kvm_dtable."""

    base: int = 0
    limit: int = 0


class Sregs(NamedTuple):
    """struct kvm_sregs."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment
    gdt: Dtable
    idt: Dtable
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    apic_base: int
    interrupt_bitmap: tuple[int, int, int, int]

    def pack(self) -> bytes:
        segments = b"".join(SEGMENT.pack(*s) for s in self[:8])
        tables = DTABLE.pack(*self.gdt) + DTABLE.pack(*self.idt)
        return SREGS.pack(segments, tables, *self[10:17], *self.interrupt_bitmap)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        segments, tables, *registers = SREGS.unpack(data)
        fields = (
            *(Segment(*s) for s in SEGMENT.iter_unpack(segments)),
            *(Dtable(*t) for t in DTABLE.iter_unpack(tables)),
            *registers[:7],
            tuple(registers[7:]),
        )
        return cls._make(fields)


class CpuidEntry(NamedTuple):
    """struct kvm_cpuid_entry2."""

    function: int
    subleaf: int  # `index` in the header, which a tuple has for itself
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int
