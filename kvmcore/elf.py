"""Loads an uncompressed x86-64 vmlinux: its PT_LOAD segments go to their physical addresses.

System V ABI, ELF-64 object file format; the entry point of a Linux vmlinux is the physical address of
startup_64 (arch/x86/kernel/vmlinux.lds.S), entered as a bzImage would enter it.  Left out: relocation,
sections, PVH notes.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from kvmcore import layout
from kvmcore.bootfile import BootFile, Memory
from kvmcore.bootparams import Header, Kernel

MAGIC: Final = b"\x7fELF"
_EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
_PHDR: Final = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr: type flags offset vaddr paddr filesz memsz align
_ELFCLASS64, _ELFDATA2LSB, _ET_EXEC, _EM_X86_64, _PT_LOAD = 2, 1, 2, 62, 1
SEGMENTS_MAX: Final = 64  # a vmlinux has about five
_LOWEST: Final = layout.BIOS_END  # below are boot structures and firmware tables


class _Segment(NamedTuple):
    gpa: int
    end: int
    offset: int
    filesz: int


def load(file: BootFile, memory: Memory) -> Kernel:
    """Load `file` into guest memory that is still zero, which is what the segments' BSS relies on.

    Raises:
        ConfigError: it is not an x86-64 kernel, its segments are not sound, or they do not fit.
    """
    entry, segments = _parse(file)
    if not segments:
        raise file.error("no PT_LOAD segments, expected a vmlinux")
    for segment in segments:
        if segment.gpa < _LOWEST:
            raise file.error(f"segment at {segment.gpa:#x}, expected none below {_LOWEST:#x}")
        if segment.filesz > segment.end - segment.gpa:
            raise file.error(f"segment at {segment.gpa:#x} has more bytes in the file than in memory")
        file.check(segment.offset, segment.filesz, f"segment at {segment.gpa:#x}")
    end = segments[0].gpa
    for segment in segments:
        if segment.gpa < end:
            raise file.error(f"segment at {segment.gpa:#x} overlaps the one that ends at {end:#x}")
        end = segment.end
    if not any(s.gpa <= entry < s.gpa + s.filesz for s in segments):
        raise file.error(f"entry point {entry:#x} is in no segment, expected a physical address")
    file.check_kernel_end(end, memory)
    for segment in segments:
        file.load(memory, segment.offset, segment.gpa, segment.filesz, f"segment at {segment.gpa:#x}")
    return Kernel(segments[0].gpa, end, entry, Header.for_elf())


def _parse(file: BootFile) -> tuple[int, list[_Segment]]:
    """The entry point and the PT_LOAD segments that take memory, by address."""
    header = _EHDR.unpack(file.read(0, _EHDR.size, "ELF header"))
    ident, kind, machine, _, entry, table, _, _, _, entry_size, count, *_ = header
    if (ident[4], ident[5], machine, kind) != (_ELFCLASS64, _ELFDATA2LSB, _EM_X86_64, _ET_EXEC):
        raise file.error("expected an ELF64 little-endian x86-64 executable")
    if count > SEGMENTS_MAX:
        raise file.error(f"{count} segments, expected at most {SEGMENTS_MAX}")
    if entry_size != _PHDR.size:
        raise file.error(f"program headers of {entry_size} bytes, expected {_PHDR.size}")
    segments = [
        _Segment(gpa, gpa + memsz, offset, filesz)
        for kind, _, offset, _, gpa, filesz, memsz, _ in _PHDR.iter_unpack(
            file.read(table, count * _PHDR.size, "program headers")
        )
        if kind == _PT_LOAD and memsz
    ]
    return entry, sorted(segments)
