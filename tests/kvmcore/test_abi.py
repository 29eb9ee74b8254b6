import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kvmcore import abi

STRUCTURES = {
    "kvm_cpuid2": abi.CPUID2,
    "kvm_cpuid_entry2": abi.CPUID_ENTRY2,
    "kvm_enable_cap": abi.ENABLE_CAP,
    "kvm_clock_data": abi.CLOCK_DATA,
    "kvm_dtable": abi.DTABLE,
    "kvm_fpu": abi.FPU,
    "kvm_interrupt": abi.INTERRUPT,
    "kvm_ioeventfd": abi.IOEVENTFD,
    "kvm_irq_level": abi.IRQ_LEVEL,
    "kvm_irq_routing": abi.IRQ_ROUTING,
    "kvm_irq_routing_entry": abi.IRQ_ROUTING_MSI,
    "kvm_irqfd": abi.IRQFD,
    "kvm_lapic_state": abi.LAPIC_STATE,
    "kvm_mp_state": abi.MP_STATE,
    "kvm_msi": abi.MSI,
    "kvm_msr_entry": abi.MSR_ENTRY,
    "kvm_msr_list": abi.MSR_LIST,
    "kvm_msrs": abi.MSRS,
    "kvm_pit_config": abi.PIT_CONFIG,
    "kvm_regs": abi.REGS,
    "kvm_segment": abi.SEGMENT,
    "kvm_sregs": abi.SREGS,
    "kvm_userspace_memory_region": abi.USERSPACE_MEMORY_REGION,
}

OFFSETS = {  # (structure, field): where our format string puts it
    ("kvm_fpu", "fcw"): 128,
    ("kvm_fpu", "ftwx"): 132,
    ("kvm_fpu", "last_opcode"): 134,
    ("kvm_fpu", "mxcsr"): 408,
    ("kvm_segment", "unusable"): 22,
    ("kvm_sregs", "cr0"): 8 * abi.SEGMENT.size + 2 * abi.DTABLE.size,
    ("kvm_sregs", "interrupt_bitmap"): abi.SREGS.size - 32,
    ("kvm_irq_routing_entry", "u"): 16,
    ("kvm_enable_cap", "args"): 8,
    ("kvm_clock_data", "realtime"): 16,
    ("kvm_ioeventfd", "flags"): 24,
    ("kvm_run", "immediate_exit"): 1,
    ("kvm_run", "ready_for_interrupt_injection"): 12,
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What <linux/kvm.h> says, by compiling a program that prints it."""
    cc = shutil.which("cc") or shutil.which("gcc")
    if cc is None:
        pytest.skip("no C compiler to ask <linux/kvm.h> with")
    if not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no <linux/kvm.h> (Debian: linux-libc-dev)")
    constants = [
        *(i.name for i in abi.Ioctl),
        *(c.name for c in abi.Cap),
        *(s.name for s in abi.MpState),
        *(name for name in vars(abi) if re.match("KVM_", name)),
    ]
    prints = [f'printf("{c} %llu\\n", (unsigned long long)({c}));' for c in constants]
    prints += [f'printf("{s} %zu\\n", sizeof(struct {s}));' for s in STRUCTURES]
    prints += [f'printf("{s}.{f} %zu\\n", offsetof(struct {s}, {f}));' for s, f in OFFSETS]
    source = "#include <stddef.h>\n#include <stdio.h>\n#include <linux/kvm.h>\nint main(void) {\n"
    directory = tmp_path_factory.mktemp("abi")
    (directory / "abi.c").write_text(source + "\n".join(prints) + "\nreturn 0; }\n")
    subprocess.run([cc, "-o", directory / "abi", directory / "abi.c"], check=True)
    output = subprocess.run([directory / "abi"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


def test_every_structure_has_the_header_s_size(header: dict[str, int]) -> None:
    assert {name: layout.size for name, layout in STRUCTURES.items()} == {s: header[s] for s in STRUCTURES}


def test_fields_are_where_the_header_has_them(header: dict[str, int]) -> None:
    assert {(s, f): header[f"{s}.{f}"] for s, f in OFFSETS} == OFFSETS


def test_every_number_is_the_header_s(header: dict[str, int]) -> None:
    enums = {member.name: member.value for kind in (abi.Ioctl, abi.Cap, abi.MpState) for member in kind}
    constants = {name: value for name, value in vars(abi).items() if name.startswith("KVM_")}
    ours = {**enums, **constants}
    assert len(ours) > 60
    assert ours == {name: header[name] for name in ours}


def test_both_kinds_of_route_are_one_entry() -> None:
    assert abi.IRQ_ROUTING_IRQCHIP.size == abi.IRQ_ROUTING_MSI.size


def test_regs_survive_packing() -> None:
    regs = abi.Regs(*range(100, 118))
    assert abi.Regs.unpack(regs.pack()) == regs
    assert regs.pack()[16 * 8 : 17 * 8] == (116).to_bytes(8, "little")  # rip is the last but one


def test_sregs_survive_packing() -> None:
    segments = [abi.Segment(n, n + 1, n + 2, *range(n, n + 9)) for n in range(8)]
    sregs = abi.Sregs(
        *segments,  # type: ignore[arg-type]
        gdt=abi.Dtable(0x500, 31),
        idt=abi.Dtable(0x520, 7),
        cr0=1,
        cr2=2,
        cr3=3,
        cr4=4,
        cr8=5,
        efer=6,
        apic_base=7,
        interrupt_bitmap=(8, 9, 10, 11),
    )
    assert abi.Sregs.unpack(sregs.pack()) == sregs
