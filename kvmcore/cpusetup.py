"""The state a vCPU starts in: CPUID, MSRs, and for the first one the 64-bit Linux boot protocol.

Spec: Intel SDM volume 2 (CPUID) and volume 3 chapters 3, 4 and 11; AMD APM volume 3 appendix E (CPUID);
Linux, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol".  The topology is one package of single-
threaded cores whose APIC ids are the vCPU numbers.  Left out: more than 255 vCPUs, guest NUMA.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct, pack, pack_into
from typing import Final, Protocol

from kvmcore import layout
from kvmcore.abi import FPU, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, Cap, CpuidEntry, Dtable, Regs, Segment, Sregs
from kvmcore.kvm import Kvm, Vcpu

# CPUID feature bits
_ECX1_TSC_DEADLINE: Final = 1 << 24
_ECX1_HYPERVISOR: Final = 1 << 31
_EDX1_MTRR: Final = 1 << 12
_EDX1_HTT: Final = 1 << 28
_EBX7_SGX: Final = 1 << 2
_ECX7_SGX_LC: Final = 1 << 30
_ECX80000001_CMP_LEGACY: Final = 1 << 1

_AMD: Final = (b"AuthenticAMD", b"HygonGenuine")

# Rebuilt below; each of the two has its own maximum.
_TOPOLOGY_LEAVES: Final = (0xB, 0x1F)
# What we cannot vouch for: the memory of SGX, clock rates (KVM's local APIC timer does not run from the
# crystal they describe), a second topology.
_UNKNOWN_LEAVES: Final = (0x12, 0x15, 0x16, 0x80000026)


def cpuid(
    supported: Sequence[CpuidEntry], apic_id: int, cpus: int, *, tsc_deadline: bool
) -> list[CpuidEntry]:
    """What the CPUID instruction says on the vCPU `apic_id` of `cpus`.

    Args:
        supported: `Kvm.supported_cpuid()`.
        tsc_deadline: KVM_CAP_TSC_DEADLINE_TIMER, of which the supported list does not tell.
    """
    leaf0 = next(e for e in supported if e.function == 0)
    amd = pack("<3I", leaf0.ebx, leaf0.edx, leaf0.ecx) in _AMD
    id_bits = (cpus - 1).bit_length()  # of the APIC id, within the package
    entries = [
        _fixed(e, apic_id, cpus, id_bits, amd=amd, tsc_deadline=tsc_deadline)
        for e in supported
        if e.function not in (*_TOPOLOGY_LEAVES, *_UNKNOWN_LEAVES)
    ]
    for leaf in _TOPOLOGY_LEAVES:
        if leaf <= leaf0.eax:
            entries += _topology(leaf, apic_id, cpus, id_bits)
    return entries


def _fixed(
    e: CpuidEntry, apic_id: int, cpus: int, id_bits: int, *, amd: bool, tsc_deadline: bool
) -> CpuidEntry:
    """One leaf with the host's topology replaced, and what our interrupt chips decide put in."""
    match e.function:
        case 0x1:
            # EBX: 31:24 APIC id, 23:16 room for ids in the package, then CLFLUSH size and brand as they are
            ebx = apic_id << 24 | min(1 << id_bits, 255) << 16 | e.ebx & 0xFFFF
            ecx = _with(e.ecx | _ECX1_HYPERVISOR, _ECX1_TSC_DEADLINE, tsc_deadline)
            return e._replace(ebx=ebx, ecx=ecx, edx=_with(e.edx, _EDX1_HTT, cpus > 1))
        case 0x4 if e.eax & 0x1F:
            # EAX 31:26: room for core ids, less one
            cores = min((1 << id_bits) - 1, 63)
            return e._replace(eax=_cache(e.eax, id_bits) & 0x03FFFFFF | cores << 26)
        case 0x7 if e.subleaf == 0:
            return e._replace(ebx=e.ebx & ~_EBX7_SGX, ecx=e.ecx & ~_ECX7_SGX_LC)
        case 0x80000001 if amd:
            return e._replace(ecx=_with(e.ecx, _ECX80000001_CMP_LEGACY, cpus > 1))
        case 0x80000008 if amd:
            # ECX: 15:12 bits of the id, 7:0 cores less one
            return e._replace(ecx=e.ecx & ~0xF0FF | id_bits << 12 | cpus - 1)
        case 0x8000001D if e.eax & 0x1F:
            return e._replace(eax=_cache(e.eax, id_bits))
        case 0x8000001E:
            # EAX: extended APIC id; EBX: one thread in each core, the core's number; ECX: node 0 of 1
            return e._replace(eax=apic_id, ebx=apic_id, ecx=0)
    return e


def _with(register: int, bit: int, on: bool) -> int:
    return register | bit if on else register & ~bit


def _cache(eax: int, id_bits: int) -> int:
    """EAX of a cache leaf with 25:14, room for the ids that share it less one: all from level 3 on."""
    level = eax >> 5 & 7
    return eax & ~(0xFFF << 14) | ((1 << id_bits) - 1 if level >= 3 else 0) << 14


def _topology(leaf: int, apic_id: int, cpus: int, id_bits: int) -> list[CpuidEntry]:
    """Extended topology: each core one thread, the package all cores, then the end of the list."""
    smt, core = 1, 2  # level types, ECX 15:8
    flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    return [
        CpuidEntry(leaf, 0, flags, 0, 1, smt << 8 | 0, apic_id),
        CpuidEntry(leaf, 1, flags, id_bits, cpus, core << 8 | 1, apic_id),
        CpuidEntry(leaf, 2, flags, 0, 0, 2, apic_id),
    ]


# MSRs
_IA32_TSC: Final = 0x10
_IA32_SYSENTER_CS, _IA32_SYSENTER_ESP, _IA32_SYSENTER_EIP = 0x174, 0x175, 0x176
_IA32_MISC_ENABLE: Final = 0x1A0
_IA32_MTRR_DEF_TYPE: Final = 0x2FF
_STAR, _LSTAR, _CSTAR, _FMASK, _KERNEL_GS_BASE = 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102

_MISC_ENABLE_FAST_STRING: Final = 1
_MTRR_ENABLE_WRITE_BACK: Final = 1 << 11 | 6


def msrs(entries: Sequence[CpuidEntry]) -> dict[int, int]:
    """MSR -> value at reset, for a vCPU with that CPUID: all memory is write-back where no PAT says else."""
    values = dict.fromkeys(
        (_IA32_SYSENTER_CS, _IA32_SYSENTER_ESP, _IA32_SYSENTER_EIP, _STAR, _LSTAR, _CSTAR, _FMASK), 0
    )
    values |= {_KERNEL_GS_BASE: 0, _IA32_TSC: 0, _IA32_MISC_ENABLE: _MISC_ENABLE_FAST_STRING}
    if any(e.function == 1 and e.edx & _EDX1_MTRR for e in entries):
        values[_IA32_MTRR_DEF_TYPE] = _MTRR_ENABLE_WRITE_BACK
    return values


# Control registers
_CR0_PE, _CR0_ET, _CR0_PG = 1 << 0, 1 << 4, 1 << 31
_CR4_PAE: Final = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10

# Segments: the boot protocol asks for __BOOT_CS 0x10 and __BOOT_DS 0x18, flat.  The task register only has
# to satisfy the processor's entry checks; no descriptor stands behind it.
_CODE: Final = Segment(0, 0xFFFFFFFF, 0x10, type=0xB, present=1, s=1, l=1, g=1)
_DATA: Final = Segment(0, 0xFFFFFFFF, 0x18, type=0x3, present=1, db=1, s=1, g=1)
_TASK: Final = Segment(0, 0xFFFF, 0, type=0xB, present=1)
_GDT: Final = Struct("<4Q")
_PAGE_TABLE: Final = Struct("<512Q")
_PRESENT_WRITABLE: Final = 0x3
_PAGE_2M: Final = 1 << 7
_2M: Final = 2 << 20


class Memory(Protocol):
    """The part of kvmcore.memory.GuestMemory used here."""

    def write(self, gpa: int, data: bytes) -> None: ...


def descriptor(segment: Segment) -> int:
    """The GDT entry of a segment (SDM volume 3, figure 3-8)."""
    limit = segment.limit >> 12 if segment.g else segment.limit
    access = segment.present << 7 | segment.dpl << 5 | segment.s << 4 | segment.type
    flags = segment.g << 3 | segment.db << 2 | segment.l << 1 | segment.avl
    low = (segment.base & 0xFFFFFF) << 16 | limit & 0xFFFF
    return low | access << 40 | (limit >> 16 & 0xF) << 48 | flags << 52 | segment.base >> 24 << 56


def write_tables(memory: Memory) -> None:
    """GDT, an IDT of one null gate, and page tables that map the first GiB to itself.

    Raises:
        MemoryFault: less RAM than the tables need.
    """
    memory.write(layout.GDT, _GDT.pack(0, 0, descriptor(_CODE), descriptor(_DATA)))
    memory.write(layout.IDT, bytes(8))
    next_level = (0,) * 511
    memory.write(layout.PML4, _PAGE_TABLE.pack(layout.PDPT | _PRESENT_WRITABLE, *next_level))
    memory.write(layout.PDPT, _PAGE_TABLE.pack(layout.PD | _PRESENT_WRITABLE, *next_level))
    pages = (n * _2M | _PAGE_2M | _PRESENT_WRITABLE for n in range(512))
    memory.write(layout.PD, _PAGE_TABLE.pack(*pages))


def boot_regs(entry: int) -> Regs:
    """General registers at the kernel's 64-bit `entry`: RSI is the zero page."""
    return Regs(rip=entry, rsi=layout.ZERO_PAGE, rsp=layout.BOOT_STACK, rbp=layout.BOOT_STACK)


def boot_sregs(reset: Sregs) -> Sregs:
    """`reset`, with long mode on and the boot tables loaded."""
    return reset._replace(
        cs=_CODE,
        ds=_DATA,
        es=_DATA,
        fs=_DATA,
        gs=_DATA,
        ss=_DATA,
        tr=_TASK,
        gdt=Dtable(layout.GDT, _GDT.size - 1),
        idt=Dtable(layout.IDT, 7),
        cr0=_CR0_PE | _CR0_ET | _CR0_PG,
        cr3=layout.PML4,
        cr4=_CR4_PAE,
        efer=_EFER_LME | _EFER_LMA,
    )


def boot_fpu() -> bytes:
    """An x87 and SSE state as FNINIT and reset leave it: all exceptions masked."""
    fcw, mxcsr = 0x37F, 0x1F80
    return FPU.pack(bytes(128), fcw, 0, 0, 0, 0, 0, bytes(256), mxcsr)


# The local APIC's register page (SDM volume 3, table 11-1)
_LVT_LINT0, _LVT_LINT1 = 0x350, 0x360
_DELIVER_NMI, _DELIVER_EXTINT = 4 << 8, 7 << 8


def with_lint(registers: bytes) -> bytes:
    """A local APIC in virtual wire mode: LINT0 takes the 8259A's interrupts, LINT1 NMIs, none masked."""
    page = bytearray(registers)
    pack_into("<I", page, _LVT_LINT0, _DELIVER_EXTINT)
    pack_into("<I", page, _LVT_LINT1, _DELIVER_NMI)
    return bytes(page)


def setup(kvm: Kvm, vcpu: Vcpu, cpus: int, entry: int) -> None:
    """Give `vcpu`, one of `cpus`, its CPUID, MSRs, FPU and LINTs; the first also gets ready to boot `entry`.

    The others stay as KVM made them, waiting for the first one's INIT and SIPI.

    Raises:
        KvmError: KVM refuses a part of it.
    """
    tsc_deadline = bool(kvm.check(Cap.KVM_CAP_TSC_DEADLINE_TIMER))
    entries = cpuid(kvm.supported_cpuid(), vcpu.id, cpus, tsc_deadline=tsc_deadline)
    vcpu.set_cpuid2(entries)
    vcpu.set_msrs(msrs(entries))
    vcpu.set_fpu(boot_fpu())
    vcpu.set_lapic(with_lint(vcpu.get_lapic()))
    if vcpu.id == 0:
        vcpu.set_regs(boot_regs(entry))
        vcpu.set_sregs(boot_sregs(vcpu.get_sregs()))
