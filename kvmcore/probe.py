"""Which instructions a guest kernel can run on this KVM: a tiny 64-bit guest per instruction group.

Spec: Intel SDM volume 3, chapters 2 to 6 (system registers, paging, descriptors, interrupts); Linux,
Documentation/virt/kvm/api.rst, section 5 (`struct kvm_run`).  A KVM without hardware below it emulates the
guest's kernel mode, and its emulator lacks instructions that every stock kernel executes.  Left out: what
only an application needs, and whatever the guest's own CPUID says is absent.
"""

from __future__ import annotations

import enum
import fcntl
import os
import signal
from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple

from kvmcore import layout
from kvmcore.abi import Cap, CpuidEntry, Dtable, Ioctl, Regs, Segment
from kvmcore.errors import KvmError, VmsupError
from kvmcore.kvm import Kvm
from kvmcore.memory import GuestMemory

REQUIRED: Final = (
    Cap.KVM_CAP_USER_MEMORY,
    Cap.KVM_CAP_SET_TSS_ADDR,
    Cap.KVM_CAP_SET_IDENTITY_MAP_ADDR,
    Cap.KVM_CAP_EXT_CPUID,
    Cap.KVM_CAP_MP_STATE,
    Cap.KVM_CAP_IRQCHIP,
    Cap.KVM_CAP_PIT2,
    Cap.KVM_CAP_IRQ_ROUTING,
    Cap.KVM_CAP_IRQFD,
    Cap.KVM_CAP_IRQFD_RESAMPLE,
    Cap.KVM_CAP_IOEVENTFD,
    Cap.KVM_CAP_IOEVENTFD_ANY_LENGTH,
    Cap.KVM_CAP_IMMEDIATE_EXIT,
)
"""The extensions without which no VM starts."""

OPTIONAL: Final = tuple(cap for cap in Cap if cap not in REQUIRED)
"""The extensions that some option or device uses, or that make something faster."""

OK: Final = "ok"
ABSENT: Final = "absent from CPUID"


def bounded(
    probe: Callable[[Callable[[str], None]], None], silence_s: int = 3
) -> tuple[list[str], str | None]:
    """Run `probe` in a forked child, so that neither its end nor what it changes touches this process.

    Args:
        probe: takes a function that it tells one line at a time.
        silence_s: how long it may be silent before the child is killed.

    Returns:
        The lines told, and how it went wrong if it did: an exception, a signal, silence.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:

        def tell(line: str, kind: str = "+") -> None:
            os.write(write, f"{kind}{line}".replace("\n", " ").encode() + b"\n")
            signal.alarm(silence_s)

        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
            signal.alarm(silence_s)
            os.close(read)
            try:
                probe(tell)
            except Exception as e:
                tell(str(e) if isinstance(e, (OSError, VmsupError)) else repr(e), "-")
        finally:
            os._exit(0)
    os.close(write)
    with open(read, encoding="utf-8", errors="replace") as pipe:
        lines = pipe.read().splitlines()
    _, status = os.waitpid(pid, 0)
    told = [line[1:] for line in lines if line.startswith("+")]
    if os.WIFSIGNALED(status):
        silent = os.WTERMSIG(status) == signal.SIGALRM
        return told, f"no answer for {silence_s} s" if silent else f"killed by signal {os.WTERMSIG(status)}"
    return told, next((line[1:] for line in lines if line.startswith("-")), None)


class Feature(NamedTuple):
    """A bit of CPUID that says whether an instruction exists."""

    leaf: int
    register: str  # of CpuidEntry: "ebx", "ecx", "edx"
    bit: int

    def among(self, cpuid: list[CpuidEntry]) -> bool:
        found = (e for e in cpuid if (e.function, e.subleaf) == (self.leaf, 0))
        return any(getattr(e, self.register) >> self.bit & 1 for e in found)


class Group(NamedTuple):
    """Instructions that are tried together.

    Attributes:
        asm: GNU assembler source.  It starts in 64-bit mode at CPL 0 with interrupts off, RDI at `SCRATCH`
            and RSI at `SCRATCH` + 64, both zeroed.  Falling off the end with ZF set is success.
        code: what `asm` assembles to (checked by a test: an assembler is not needed to run vmsup).
        feature: None for what every x86-64 processor has and a 64-bit kernel does not ask for.
        ends: the byte that success writes to `PORT`: a vector, where reaching its handler is the point.
    """

    name: str
    asm: str
    code: str
    ends: int = 0x40
    feature: Feature | None = None


PORT: Final = 0xF4  # the guest reports here: DONE, WRONG or the vector of an exception
DONE: Final = 0x40
WRONG: Final = 0x41
TIMER_VECTOR: Final = 0x20

# The guest's memory: one 2 MiB page, accessible from CPL 3.
_PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000
_GDT, _IDT, _TSS, _STUBS = 0x4000, 0x5000, 0x6000, 0x7000
SCRATCH: Final = 0x8000
_STACK, _CODE, _SIZE = 0x10000, 0x10000, 2 << 20

# Selectors, in the order that SYSRET wants: CS0, SS0, (32-bit CS3), SS3, CS3; the last is the TSS.
_CS, _SS, _TR = 0x08, 0x10, 0x30
_GDT_ENTRIES: Final = (
    0,
    0x00AF9B000000FFFF,
    0x00CF93000000FFFF,
    0,
    0x00CFF3000000FFFF,
    0x00AFFB000000FFFF,
    0x0000890000000067 | _TSS << 16,  # an available 64-bit TSS of 104 bytes
    0,
)
_TSS64: Final = Struct("<IQ84xHH4x")  # RSP0; I/O map base
_GATE: Final = Struct("<HHBBHI4x")  # offset 15:0, selector, IST, type, offset 31:16, offset 63:32
_QUAD: Final = Struct("<Q")

_EXCEPTIONS: Final = {
    0: "#DE", 1: "#DB", 3: "#BP", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP", 12: "#SS", 13: "#GP",
    14: "#PF", 16: "#MF", 17: "#AC", 19: "#XM",
}  # fmt: skip

# struct kvm_run
_EXIT_REASON: Final = Struct("<8xI")
_IO: Final = Struct("<32xBBHIQ")  # direction, size, port, count, data_offset
_INTERNAL: Final = Struct("<32xI")  # suberror
_FAIL_ENTRY: Final = Struct("<32xQ")  # hardware_entry_failure_reason


class ExitReason(enum.IntEnum):
    """Why KVM_RUN returned."""

    KVM_EXIT_UNKNOWN = 0
    KVM_EXIT_IO = 2
    KVM_EXIT_HLT = 5
    KVM_EXIT_MMIO = 6
    KVM_EXIT_SHUTDOWN = 8  # a triple fault
    KVM_EXIT_FAIL_ENTRY = 9
    KVM_EXIT_INTERNAL_ERROR = 17


_SUBERRORS: Final = {1: "emulation failure", 2: "simultaneous exceptions", 3: "delivery of an event failed"}

GROUPS: Final = (
    Group(
        "cpuid",
        "xor %eax,%eax; cpuid; test %eax,%eax; setz %al; test %al,%al",
        "31c00fa285c00f94c084c0",
    ),
    Group(
        "rdtsc",
        "rdtsc; shl $32,%rdx; or %rdx,%rax; setz %al; test %al,%al",
        "0f3148c1e2204809d00f94c084c0",
    ),
    Group(
        "rdtscp",
        "rdtscp; shl $32,%rdx; or %rdx,%rax; setz %al; test %al,%al",
        "0f01f948c1e2204809d00f94c084c0",
        feature=Feature(0x80000001, "edx", 27),
    ),
    Group(
        "lock cmpxchg, xadd, xchg",
        "xor %eax,%eax; mov $5,%ecx; lock cmpxchg %rcx,(%rdi); lock xadd %rcx,(%rdi); xchg %rcx,(%rdi); "
        "cmp $10,%rcx",
        "31c0b905000000f0480fb10ff0480fc10f48870f4883f90a",
    ),
    Group(
        "cmpxchg16b",
        "xor %eax,%eax; xor %edx,%edx; mov $2,%ebx; mov $1,%ecx; lock cmpxchg16b (%rdi); jne 1f; "
        "cmpq $2,(%rdi); 1:",
        "31c031d2bb02000000b901000000f0480fc70f750448833f02",
        feature=Feature(1, "ecx", 13),
    ),
    Group(
        "popcnt",
        "mov $0x70f,%ecx; popcnt %rcx,%rax; cmp $7,%rax",
        "b90f070000f3480fb8c14883f807",
        feature=Feature(1, "ecx", 23),
    ),
    Group(
        "movbe",
        "movl $0x12345678,(%rdi); movbe (%rdi),%eax; cmp $0x78563412,%eax",
        "c707785634120f38f0073d12345678",
        feature=Feature(1, "ecx", 22),
    ),
    Group(
        "rep movsb, stosq",
        "mov %rdi,%rbx; mov $-1,%rax; mov $8,%ecx; rep stosq; mov %rbx,%rsi; mov $64,%ecx; rep movsb; "
        "cmp %rax,-8(%rdi)",
        "4889fb48c7c0ffffffffb908000000f348ab4889deb940000000f3a4483947f8",
    ),
    Group(
        "lfence, mfence, pause",
        "lfence; mfence; pause; cmp %eax,%eax",
        "0faee80faef0f39039c0",
    ),
    Group(
        "endbr64",
        "endbr64; cmp %eax,%eax",
        "f30f1efa39c0",
    ),
    Group(
        "clflush",
        "clflush (%rdi); cmpq $0,(%rdi)",
        "0fae3f48833f00",
        feature=Feature(1, "edx", 19),
    ),
    Group(
        "movdqa, paddq",
        "movl $3,(%rdi); movdqa (%rdi),%xmm0; paddq %xmm0,%xmm0; movdqu %xmm0,(%rsi); cmpq $6,(%rsi)",
        "c70703000000660f6f07660fd4c0f30f7f0648833e06",
    ),
    Group(
        "fxsave, fxrstor",
        "fxsave (%rdi); movq $-1,0xa0(%rdi); fxrstor (%rdi); fxsave 0x200(%rdi); cmpq $-1,0x2a0(%rdi)",
        "0fae0748c787a0000000ffffffff0fae0f0fae87000200004883bfa0020000ff",
    ),
    Group(
        "xsave, xrstor",
        "mov %cr4,%rax; or $0x40000,%eax; mov %rax,%cr4; xor %edx,%edx; mov $1,%eax; xsave (%rdi); "
        "xrstor (%rdi); cmpl $0x37f,(%rdi)",
        "0f20e00d000004000f22e031d2b8010000000fae270fae2f813f7f030000",
        feature=Feature(1, "ecx", 26),
    ),
    Group(
        "xsetbv, xgetbv",
        "mov %cr4,%rax; or $0x40000,%eax; mov %rax,%cr4; xor %ecx,%ecx; xor %edx,%edx; mov $3,%eax; "
        "xsetbv; xor %eax,%eax; xgetbv; cmp $3,%eax",
        "0f20e00d000004000f22e031c931d2b8030000000f01d131c00f01d083f803",
        feature=Feature(1, "ecx", 26),
    ),
    Group(
        "rdmsr, wrmsr",
        "mov $0xc0000102,%ecx; mov $0x1234,%eax; xor %edx,%edx; wrmsr; xor %eax,%eax; rdmsr; "
        "cmp $0x1234,%eax",
        "b9020100c0b83412000031d20f3031c00f323d34120000",
    ),
    Group(
        "swapgs",
        "mov $0xc0000102,%ecx; mov %edi,%eax; xor %edx,%edx; wrmsr; movl $7,(%rdi); swapgs; cmpl $7,%gs:0",
        "b9020100c089f831d20f30c707070000000f01f865833c250000000007",
    ),
    Group(
        "mov to cr3, dr7",
        "mov %cr3,%rax; mov %rax,%cr3; mov $0x400,%eax; mov %rax,%dr7; mov %dr7,%rcx; cmp %rax,%rcx",
        "0f20d80f22d8b8000400000f23f80f21f94839c1",
    ),
    Group(
        "invlpg",
        "invlpg (%rdi); cmpq $0,(%rdi)",
        "0f013f48833f00",
    ),
    Group(
        "wbinvd",
        "wbinvd; cmpq $0,(%rdi)",
        "0f0948833f00",
    ),
    Group(
        "lgdt, lidt",
        "sgdt (%rdi); lgdt (%rdi); sidt (%rsi); lidt (%rsi); cmpw $0xfff,(%rsi)",
        "0f01070f01170f010e0f011e66813eff0f",
    ),
    Group(
        "ltr, lldt",
        "mov $0x30,%eax; ltr %ax; xor %eax,%eax; lldt %ax",
        "b8300000000f00d831c00f00d0",
    ),
    Group(
        "str",
        "str %eax; cmp $0x30,%eax",
        "0f00c883f830",
    ),
    Group(
        "verw",
        "mov %ss,%eax; mov %eax,(%rdi); verw (%rdi)",
        "8cd089070f002f",
    ),
    Group(
        "iretq",
        "mov %rsp,%rax; mov %ss,%ecx; push %rcx; push %rax; pushfq; push $0x08; lea 1f(%rip),%rcx; "
        "push %rcx; iretq; 1: cmp %rsp,%rax",
        "4889e08cd151509c6a08488d0d030000005148cf4839e0",
    ),
    Group(
        "lretq",
        "mov %rsp,%rax; push $0x08; lea 1f(%rip),%rcx; push %rcx; lretq; 1: cmp %rsp,%rax",
        "4889e06a08488d0d030000005148cb4839e0",
    ),
    Group(
        "int3",
        "int3",
        "cc",
        ends=3,
    ),
    Group(
        "ud2",
        "ud2",
        "0f0b",
        ends=6,
    ),
    Group(
        "page fault",
        "mov $0x40000000,%eax; mov (%rax),%eax",
        "b8000000408b00",
        ends=14,
    ),
    Group(
        "sysretq, syscall",
        "mov $0xc0000081,%ecx; xor %eax,%eax; mov $0x180008,%edx; wrmsr; inc %ecx; lea 2f(%rip),%rax; "
        "xor %edx,%edx; wrmsr; lea 1f(%rip),%rcx; mov $2,%r11d; sysretq; 1: mov $7,%ebx; syscall; "
        "2: cmp $7,%ebx",
        "b9810000c031c0ba080018000f30ffc1488d051b00000031d20f30488d0d0900000041bb02000000480f07bb07000000"
        "0f0583fb07",
    ),
    Group(
        "out at CPL 3",
        "mov $0xc0000081,%ecx; mov $0x180008,%edx; wrmsr; lea 1f(%rip),%rcx; mov $0x3002,%r11d; sysretq; "
        "1: cmp %eax,%eax",
        "b9810000c0ba080018000f30488d0d0900000041bb02300000480f0739c0",
    ),
    Group(
        "hlt until a timer interrupt",
        "mov $0x11,%al; out %al,$0x20; mov $0x20,%al; out %al,$0x21; mov $4,%al; out %al,$0x21; "
        "mov $1,%al; out %al,$0x21; mov $0xfe,%al; out %al,$0x21; mov $0x30,%al; out %al,$0x43; "
        "mov $4,%al; out %al,$0x40; out %al,$0x40; sti; hlt",
        "b011e620b020e621b004e621b001e621b0fee621b030e643b004e640e640fbf4",
        ends=TIMER_VECTOR,
    ),
)


def instructions(kvm: Kvm) -> dict[str, str]:
    """Group name -> OK, ABSENT, or what this KVM did instead.

    Raises:
        KvmError: CPUID cannot be had.
    """
    cpuid = kvm.supported_cpuid()
    answers = {g.name: ABSENT for g in GROUPS if g.feature is not None and not g.feature.among(cpuid)}
    todo = [g for g in GROUPS if g.name not in answers]
    while todo:
        told, failure = bounded(lambda tell: _try(kvm, cpuid, todo, tell))  # noqa: B023  called at once
        if failure is not None:
            told.append(failure)  # of the group after the last one that gave an answer
        answers.update(zip((g.name for g in todo), told, strict=False))
        todo = todo[len(told) :]
    return {g.name: answers[g.name] for g in GROUPS}


def runs_stock_kernel() -> str | None:
    """None if the local KVM can run a stock kernel, else the reason in one line."""
    try:
        with Kvm() as kvm:
            kvm.require(REQUIRED)
            return first_failure(instructions(kvm))
    except (KvmError, OSError) as e:
        return str(e)


def first_failure(answers: dict[str, str]) -> str | None:
    """The first of `instructions`' answers that is neither OK nor ABSENT, with its name."""
    return next((f"{name}: {a}" for name, a in answers.items() if a not in (OK, ABSENT)), None)


def _try(kvm: Kvm, cpuid: list[CpuidEntry], groups: list[Group], tell: Callable[[str], None]) -> None:
    """Tell each group's answer.  A VM serves until something fails in it; the process's end closes it."""
    guest: _Guest | None = None
    for group in groups:
        guest = guest or _Guest(kvm, cpuid)
        answer = guest.run(group)
        tell(answer)
        if answer != OK:
            guest = None


class _Guest:
    """A VM of one vCPU and 2 MiB, as little as a kernel needs to be in 64-bit mode."""

    def __init__(self, kvm: Kvm, cpuid: list[CpuidEntry]) -> None:
        self._memory = GuestMemory.create([(0, _SIZE)])
        self._vm = kvm.create_vm()
        self._vm.set_identity_map_addr(layout.IDENTITY_MAP)
        self._vm.set_tss_addr(layout.TSS)
        self._vm.create_irqchip()
        self._vm.create_pit2()
        self._vm.set_user_memory_region(0, 0, _SIZE, self._memory.host_address(0, _SIZE))
        self._vcpu = self._vm.create_vcpu(0)
        self._vcpu.set_cpuid2(cpuid)
        code = Segment(0, 0xFFFFFFFF, _CS, 11, 1, 0, 0, 1, 1, 1)
        data = Segment(0, 0xFFFFFFFF, _SS, 3, 1, 0, 1, 1, 0, 1)
        self._sregs = self._vcpu.get_sregs()._replace(
            cs=code, ds=data, es=data, fs=data, gs=data, ss=data,
            tr=Segment(_TSS, 0x67, _TR, 11, 1),
            gdt=Dtable(_GDT, 8 * len(_GDT_ENTRIES) - 1), idt=Dtable(_IDT, 0xFFF),
            cr0=0x80050033,  # PG, AM, WP, NE, ET, MP, PE
            cr3=_PML4,
            cr4=0x620,  # OSXMMEXCPT, OSFXSR, PAE
            efer=0x501,  # LMA, LME, SCE
        )  # fmt: skip

    def run(self, group: Group) -> str:
        """OK, or how running `group` ended."""
        self._fill(group)
        self._vcpu.set_sregs(self._sregs)
        self._vcpu.set_regs(Regs(rip=_CODE, rsp=_STACK, rdi=SCRATCH, rsi=SCRATCH + 64))
        try:
            fcntl.ioctl(self._vcpu.fd, Ioctl.KVM_RUN, 0)
        except OSError as e:
            return f"KVM_RUN: {e.strerror}"
        return self._ending(group)

    def _fill(self, group: Group) -> None:
        write = self._memory.write
        write(0, bytes(_CODE))
        write(_PML4, _QUAD.pack(_PDPT | 7))  # present, writable, user
        write(_PDPT, _QUAD.pack(_PD | 7))
        write(_PD, _QUAD.pack(0 | 0x87))  # a 2 MiB page
        write(_GDT, b"".join(_QUAD.pack(entry) for entry in _GDT_ENTRIES))
        write(_TSS, _TSS64.pack(0, _STACK, 0x68, 0))
        for vector in range(TIMER_VECTOR + 1):
            stub = _STUBS + 8 * vector
            write(_IDT + 16 * vector, _GATE.pack(stub, _CS, 0, 0xEE, 0, 0))  # an interrupt gate, DPL 3
            write(stub, _report(vector))
        write(_CODE, bytes.fromhex(group.code) + b"\x75\x05" + _report(DONE) + _report(WRONG))  # jne WRONG

    def _ending(self, group: Group) -> str:
        run = self._vcpu.run
        (reason,) = _EXIT_REASON.unpack_from(run)
        text = ExitReason(reason).name if reason in ExitReason._value2member_map_ else f"exit reason {reason}"
        match reason:
            case ExitReason.KVM_EXIT_IO:
                _, _, port, _, at = _IO.unpack_from(run)
                if port != PORT:
                    return f"{text} at port {port:#x}"
                value = run[at]
                if value == group.ends:
                    return OK
                return "wrong result" if value in (DONE, WRONG) else _EXCEPTIONS.get(value, f"vector {value}")
            case ExitReason.KVM_EXIT_INTERNAL_ERROR:
                (suberror,) = _INTERNAL.unpack_from(run)
                return f"{text}: {_SUBERRORS.get(suberror, f'suberror {suberror}')}"
            case ExitReason.KVM_EXIT_FAIL_ENTRY:
                return f"{text}: hardware reason {_FAIL_ENTRY.unpack_from(run)[0]:#x}"
        return text


def _report(value: int) -> bytes:
    return bytes((0xB0, value, 0xE6, PORT, 0xF4))  # mov $value,%al; out %al,$PORT; hlt
