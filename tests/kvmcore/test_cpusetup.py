"""CPUID is judged as guests read it: by the enumeration algorithms of the two vendors' manuals."""

import struct
from collections.abc import Callable

import pytest

from kvmcore import cpusetup, layout
from kvmcore.abi import FPU, CpuidEntry, Dtable, Segment, Sregs
from kvmcore.errors import MemoryFault
from kvmcore.memory import GuestMemory

INDEXED = 1
CPUS = [1, 2, 3, 4, 8, 128, 255]

# What KVM_GET_SUPPORTED_CPUID says on a two-socket Intel server with hyper-threading, abridged.
INTEL = [
    CpuidEntry(0x0, 0, 0, 0x20, 0x756E6547, 0x6C65746E, 0x49656E69),
    CpuidEntry(0x1, 0, 0, 0x806F8, 0x21200800, 0xF6FA3203, 0x1F8BFBFF),
    CpuidEntry(0x2, 0, 0, 0xFEFF01, 0xF0, 0, 0),
    CpuidEntry(0x4, 0, INDEXED, 0xFC004121, 0x02C0003F, 0x3F, 0),
    CpuidEntry(0x4, 1, INDEXED, 0xFC004122, 0x01C0003F, 0x3F, 0),
    CpuidEntry(0x4, 2, INDEXED, 0xFC004143, 0x03C0003F, 0x7FF, 0),
    CpuidEntry(0x4, 3, INDEXED, 0xFC1FC163, 0x0380003F, 0x1BFFF, 4),
    CpuidEntry(0x4, 4, INDEXED, 0, 0, 0, 0),
    CpuidEntry(0x7, 0, INDEXED, 2, 0xF1BF07EF, 0x5B415F6E, 0xBC010410),
    CpuidEntry(0x7, 1, INDEXED, 0x1C30, 4, 0, 0x40000),
    CpuidEntry(0xB, 0, INDEXED, 1, 2, 0x100, 0x21),
    CpuidEntry(0xB, 1, INDEXED, 7, 0x60, 0x201, 0x21),
    CpuidEntry(0x12, 0, INDEXED, 0x403, 1, 0, 0x241F),
    CpuidEntry(0x15, 0, 0, 2, 0xA0, 0x17D7840, 0),
    CpuidEntry(0x16, 0, 0, 2000, 3800, 100, 0),
    CpuidEntry(0x1F, 0, INDEXED, 1, 2, 0x100, 0x21),
    CpuidEntry(0x80000000, 0, 0, 0x80000008, 0, 0, 0),
    CpuidEntry(0x80000001, 0, 0, 0, 0, 0x121, 0x2C100800),
    CpuidEntry(0x80000008, 0, 0, 0x3934, 0x200, 0, 0),
    CpuidEntry(0x40000000, 0, 0, 0x40000001, 0x4B4D564B, 0x564B4D56, 0x4D),
]

# The same of an AMD EPYC server, abridged.
AMD = [
    CpuidEntry(0x0, 0, 0, 0x10, 0x68747541, 0x444D4163, 0x69746E65),
    CpuidEntry(0x1, 0, 0, 0xA00F11, 0x05400800, 0xF6F83203, 0x178BFBFF),
    CpuidEntry(0x7, 0, INDEXED, 0, 0x219C07A9, 0x40060C, 0),
    CpuidEntry(0xB, 0, INDEXED, 0, 0, 0, 0),
    CpuidEntry(0x80000000, 0, 0, 0x80000026, 0x68747541, 0x444D4163, 0x69746E65),
    CpuidEntry(0x80000001, 0, 0, 0xA00F11, 0x40000000, 0x4003F1, 0x2FD3FBFF),
    CpuidEntry(0x80000008, 0, 0, 0x3030, 0x111ED205, 0x703F, 0),
    CpuidEntry(0x8000001D, 0, INDEXED, 0x4121, 0x01C0003F, 0x3F, 0),
    CpuidEntry(0x8000001D, 1, INDEXED, 0x4122, 0x01C0003F, 0x3F, 0),
    CpuidEntry(0x8000001D, 2, INDEXED, 0x4143, 0x01C0003F, 0x3FF, 2),
    CpuidEntry(0x8000001D, 3, INDEXED, 0x3C163, 0x03C0003F, 0x7FFF, 1),
    CpuidEntry(0x8000001D, 4, INDEXED, 0, 0, 0, 0),
    CpuidEntry(0x8000001E, 0, 0, 5, 0x102, 1, 0),
    CpuidEntry(0x80000026, 0, INDEXED, 1, 2, 0x100, 5),
]


class Processor:
    """The CPUID instruction over a list of leaves, as KVM executes it."""

    def __init__(
        self, supported: list[CpuidEntry], apic_id: int, cpus: int, tsc_deadline: bool = True
    ) -> None:
        self.entries = cpusetup.cpuid(supported, apic_id, cpus, tsc_deadline=tsc_deadline)

    def __call__(self, function: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        for e in self.entries:
            if e.function == function and (not e.flags & INDEXED or e.subleaf == subleaf):
                return e.eax, e.ebx, e.ecx, e.edx
        return 0, 0, 0, 0

    def levels(self, leaf: int) -> list[tuple[int, int, int, int]]:
        """(type, shift, processors, x2APIC id) until a level of type 0 (SDM, CPUID leaf 0BH)."""
        found = []
        for subleaf in range(10):
            eax, ebx, ecx, edx = self(leaf, subleaf)
            kind = ecx >> 8 & 0xFF
            if not kind:
                break
            assert ecx & 0xFF == subleaf
            found.append((kind, eax & 0x1F, ebx & 0xFFFF, edx))
        return found


def bits(value: int, high: int, low: int) -> int:
    return value >> low & (1 << high - low + 1) - 1


@pytest.mark.parametrize("supported", [INTEL, AMD])
@pytest.mark.parametrize("cpus", CPUS)
def test_every_processor_is_a_core_of_its_own_in_one_package(supported: list[CpuidEntry], cpus: int) -> None:
    seen = set()
    for apic_id in range(cpus):
        cpuid = Processor(supported, apic_id, cpus)
        (smt, thread_bits, threads, id_1), (core, core_bits, processors, id_2) = cpuid.levels(0xB)
        assert (smt, core) == (1, 2)
        assert (threads, processors) == (1, cpus)
        assert id_1 == id_2 == apic_id == bits(cpuid(1)[1], 31, 24)
        assert apic_id >> core_bits == 0  # the package
        seen.add(apic_id >> thread_bits)  # the core
    assert len(seen) == cpus


@pytest.mark.parametrize("cpus", CPUS)
def test_the_newer_topology_leaf_agrees_where_the_processor_has_it(cpus: int) -> None:
    intel = Processor(INTEL, cpus - 1, cpus)
    assert intel.levels(0x1F) == intel.levels(0xB)
    assert Processor(AMD, cpus - 1, cpus).levels(0x1F) == []  # beyond its highest leaf


@pytest.mark.parametrize("supported", [INTEL, AMD])
def test_one_processor_is_not_a_multi_core_package(supported: list[CpuidEntry]) -> None:
    htt = 1 << 28
    assert not Processor(supported, 0, 1)(1)[3] & htt
    assert Processor(supported, 0, 2)(1)[3] & htt


@pytest.mark.parametrize("cpus", CPUS)
def test_the_room_for_ids_is_a_power_of_two_that_holds_them(cpus: int) -> None:
    room = bits(Processor(INTEL, 0, cpus)(1)[1], 23, 16)
    assert room >= min(cpus, 255)
    assert room & room - 1 == 0 or room == 255


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 64])
def test_intel_s_cache_leaf_gives_cores_and_sharing(cpus: int) -> None:
    """SDM, CPUID leaf 04H: each core its own first and second level, one third level for all."""
    cpuid = Processor(INTEL, 0, cpus)
    for subleaf, level in enumerate((1, 1, 2, 3)):
        eax, ebx, ecx, _ = cpuid(4, subleaf)
        assert bits(eax, 7, 5) == level
        assert bits(eax, 31, 26) + 1 >= cpus
        sharing = bits(eax, 25, 14) + 1
        assert sharing >= cpus if level == 3 else sharing == 1
        assert (ebx, ecx) == (INTEL[3 + subleaf].ebx, INTEL[3 + subleaf].ecx)  # its geometry is the host's
    assert cpuid(4, 4) == (0, 0, 0, 0)


@pytest.mark.parametrize("cpus", [1, 2, 3, 4, 64])
def test_amd_s_leaves_give_cores_and_sharing(cpus: int) -> None:
    """APM volume 3, E.4.7, E.4.15, E.4.16."""
    for apic_id in range(cpus):
        cpuid = Processor(AMD, apic_id, cpus)
        ecx = cpuid(0x80000008)[2]
        assert bits(ecx, 7, 0) + 1 == cpus
        assert 1 << bits(ecx, 15, 12) >= cpus
        assert bool(cpuid(0x80000001)[2] & 2) is (cpus > 1)  # CmpLegacy
        eax, ebx, ecx, _ = cpuid(0x8000001E)
        assert eax == apic_id
        assert (bits(ebx, 7, 0), bits(ebx, 15, 8)) == (apic_id, 0)
        assert (bits(ecx, 7, 0), bits(ecx, 10, 8)) == (0, 0)
        sharing = [bits(cpuid(0x8000001D, n)[0], 25, 14) + 1 for n in range(4)]
        assert sharing[:3] == [1, 1, 1]
        assert sharing[3] >= cpus


def test_amd_s_fields_stay_reserved_on_intel() -> None:
    cpuid = Processor(INTEL, 1, 4)
    assert cpuid(0x80000008)[2] == 0
    assert cpuid(0x80000001)[2] == INTEL[-3].ecx


@pytest.mark.parametrize("supported", [INTEL, AMD])
def test_the_guest_knows_that_it_is_one(supported: list[CpuidEntry]) -> None:
    stripped = [e._replace(ecx=e.ecx & ~(1 << 31)) if e.function == 1 else e for e in supported]
    assert Processor(stripped, 0, 1)(1)[2] >> 31


@pytest.mark.parametrize("offered", [False, True])
def test_the_deadline_timer_is_what_kvm_says_beside_the_list(offered: bool) -> None:
    ecx = Processor(INTEL, 0, 1, tsc_deadline=offered)(1)[2]
    assert bool(ecx >> 24 & 1) is offered


def test_what_cannot_be_vouched_for_is_gone() -> None:
    cpuid = Processor(INTEL, 0, 2)
    for leaf in (0x12, 0x15, 0x16):
        assert cpuid(leaf) == (0, 0, 0, 0)
    assert not cpuid(7)[1] & 1 << 2  # SGX
    assert not cpuid(7)[2] & 1 << 30  # SGX launch control
    assert Processor(AMD, 0, 2)(0x80000026) == (0, 0, 0, 0)


def test_everything_else_is_the_host_s() -> None:
    cpuid = Processor(INTEL, 3, 4)
    eax, ebx, ecx, edx = cpuid(1)
    assert (eax, ebx & 0xFFFF, ecx, edx) == (0x806F8, 0x0800, INTEL[1].ecx | 1 << 24, INTEL[1].edx)
    for e in INTEL:
        if e.function in (0, 2, 0x40000000, 0x80000000) or (e.function, e.subleaf) == (7, 1):
            assert cpuid(e.function, e.subleaf) == e[3:]


def test_no_leaf_is_there_twice() -> None:
    for supported in (INTEL, AMD):
        keys = [(e.function, e.subleaf) for e in Processor(supported, 0, 2).entries]
        assert len(keys) == len(set(keys))


# -- MSRs


def test_the_mtrrs_are_set_only_where_there_are_any() -> None:
    def without_mtrr(e: CpuidEntry) -> CpuidEntry:
        return e._replace(edx=e.edx & ~(1 << 12)) if e.function == 1 else e

    assert cpusetup.msrs(INTEL)[0x2FF] == 0x806  # enabled, write-back
    assert 0x2FF not in cpusetup.msrs([without_mtrr(e) for e in INTEL])


def test_the_msrs_are_as_after_reset() -> None:
    msrs = cpusetup.msrs(INTEL)
    assert msrs.pop(0x1A0) == 1  # fast strings
    assert msrs.pop(0x2FF)
    zero = (0x10, 0x174, 0x175, 0x176, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000102)
    assert msrs == dict.fromkeys(zero, 0)


# -- the boot state


@pytest.fixture
def read_word() -> Callable[[int], int]:
    memory = GuestMemory.create([(0, 0x20000)])
    cpusetup.write_tables(memory)
    return lambda gpa: int(struct.unpack("<Q", memory.read(gpa, 8))[0])


def walk(read_word: Callable[[int], int], address: int) -> int:
    """Translate as the processor does (SDM volume 3, 4.5), 2 MiB pages only."""
    table = layout.PML4
    for shift in (39, 30):
        entry = read_word(table + 8 * (address >> shift & 511))
        assert entry & 3 == 3, "not present and writable"
        assert not entry & 0x80
        table = entry & ~0xFFF
    entry = read_word(table + 8 * (address >> 21 & 511))
    assert entry & 0x83 == 0x83
    return entry & ~0x1FFFFF | address & 0x1FFFFF


@pytest.mark.parametrize("address", [0, 0x7000, 0x200000, 0x12345678, 0x3FFFFFFF])
def test_the_first_gib_is_mapped_to_itself(read_word: Callable[[int], int], address: int) -> None:
    assert walk(read_word, address) == address


def test_nothing_beyond_the_first_gib_is_mapped(read_word: Callable[[int], int]) -> None:
    for address in (1 << 30, 1 << 39, (1 << 48) - 1):
        with pytest.raises(AssertionError, match="not present"):
            walk(read_word, address)


def decode(descriptor: int) -> Segment:
    """A descriptor's fields (SDM volume 3, figure 3-8)."""
    limit = descriptor & 0xFFFF | bits(descriptor, 51, 48) << 16
    g = bits(descriptor, 55, 55)
    return Segment(
        base=bits(descriptor, 39, 16) | bits(descriptor, 63, 56) << 24,
        limit=limit << 12 | 0xFFF if g else limit,
        type=bits(descriptor, 43, 40),
        s=bits(descriptor, 44, 44),
        dpl=bits(descriptor, 46, 45),
        present=bits(descriptor, 47, 47),
        avl=bits(descriptor, 52, 52),
        l=bits(descriptor, 53, 53),
        db=bits(descriptor, 54, 54),
        g=g,
    )


def boot_sregs() -> Sregs:
    empty = Segment()
    reset = Sregs(
        *(empty,) * 8,
        Dtable(),
        Dtable(),
        0x60000010,
        0,
        0,
        0,
        0,
        0,
        0xFEE00900,
        (0, 0, 0, 0),  # type: ignore[arg-type]
    )
    return cpusetup.boot_sregs(reset)


def test_the_loaded_segments_are_those_of_the_table(read_word: Callable[[int], int]) -> None:
    sregs = boot_sregs()
    assert sregs.gdt == Dtable(layout.GDT, 31)
    assert layout.GDT + sregs.gdt.limit < layout.IDT == sregs.idt.base
    assert (sregs.cs.selector, sregs.ds.selector) == (0x10, 0x18)  # __BOOT_CS, __BOOT_DS
    for segment in (sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss):
        assert decode(read_word(layout.GDT + segment.selector)) == segment._replace(selector=0)
        assert (segment.base, segment.limit) == (0, 0xFFFFFFFF)
    assert (sregs.cs.l, sregs.cs.db) == (1, 0)  # 64-bit code


def test_a_descriptor_keeps_base_and_byte_limit() -> None:
    segment = Segment(base=0xFEDCBA98, limit=0xABCDE, type=0x9, present=1, dpl=3)
    assert decode(cpusetup.descriptor(segment)) == segment


def test_long_mode_is_on_and_the_local_apic_where_it_was() -> None:
    sregs = boot_sregs()
    assert sregs.cr0 == 0x80000011  # PG, ET, PE; caches not disabled
    assert (sregs.cr3, sregs.cr4, sregs.efer) == (layout.PML4, 1 << 5, 1 << 8 | 1 << 10)
    assert sregs.apic_base == 0xFEE00900


def test_the_entry_finds_zero_page_and_stack() -> None:
    regs = cpusetup.boot_regs(0x1000200)
    assert (regs.rip, regs.rsi, regs.rsp, regs.rbp) == (0x1000200, 0x7000, 0x8000, 0x8000)
    assert regs.rflags == 2  # interrupts off


def test_the_fpu_masks_all_exceptions() -> None:
    fpr, fcw, *_, mxcsr = FPU.unpack(cpusetup.boot_fpu())
    assert (fcw, mxcsr) == (0x37F, 0x1F80)
    assert fpr == bytes(128)


def test_lint0_is_extint_and_lint1_nmi_and_nothing_else_changes() -> None:
    before = bytes(range(256)) * 4
    after = cpusetup.with_lint(before)
    assert struct.unpack_from("<I", after, 0x350) == (0x700,)
    assert struct.unpack_from("<I", after, 0x360) == (0x400,)
    changed = {n for n in range(1024) if before[n] != after[n]}
    assert changed <= {*range(0x350, 0x354), *range(0x360, 0x364)}


def test_tables_that_do_not_fit_the_memory_fault() -> None:
    with pytest.raises(MemoryFault):
        cpusetup.write_tables(GuestMemory.create([(0, 0x8000)]))
