"""Loads an uncompressed x86-64 vmlinux: its PT_LOAD segments go to their physical addresses.

System V ABI, ELF-64 object file format; the entry point of a Linux vmlinux is the physical address of
startup_64 (arch/x86/kernel/vmlinux.lds.S), entered as a bzImage would enter it.  pyelftools is imported when
the first ELF is loaded, which costs more than any other import, and of it the structures alone: its ELFFile
brings all of DWARF, and costs that much again.  Left out: relocation, sections, PVH notes.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

from kvmcore import layout
from kvmcore.bootfile import BootFile, Memory
from kvmcore.bootparams import Header, Kernel

MAGIC: Final = b"\x7fELF"
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
    from elftools.common.exceptions import ELFError  # noqa: PLC0415 (see the module's docstring)
    from elftools.common.utils import struct_parse  # noqa: PLC0415
    from elftools.elf.structs import ELFStructs  # noqa: PLC0415

    structs = ELFStructs(little_endian=True, elfclass=64)
    structs.create_basic_structs()
    with os.fdopen(file.fd, "rb", closefd=False) as stream:
        try:
            image = struct_parse(structs.Elf_Ehdr, stream, 0)
            ident = image.e_ident
            kind = (ident.EI_CLASS, ident.EI_DATA, image.e_machine, image.e_type)
            if kind != ("ELFCLASS64", "ELFDATA2LSB", "EM_X86_64", "ET_EXEC"):
                raise file.error("expected an ELF64 little-endian x86-64 executable")
            if image.e_phnum > SEGMENTS_MAX:
                raise file.error(f"{image.e_phnum} segments, expected at most {SEGMENTS_MAX}")
            structs.create_advanced_structs(image.e_type, image.e_machine, ident.EI_OSABI)
            places = (image.e_phoff + n * image.e_phentsize for n in range(image.e_phnum))
            headers = [struct_parse(structs.Elf_Phdr, stream, at) for at in places]
        except (ELFError, OSError, ValueError, OverflowError) as e:
            # All but the first from seeks to where no file reaches, which pyelftools leaves as they are.
            raise file.error(f"not a sound ELF file: {e}") from None
    segments = [
        _Segment(h.p_paddr, h.p_paddr + h.p_memsz, h.p_offset, h.p_filesz)
        for h in headers
        if h.p_type == "PT_LOAD" and h.p_memsz
    ]
    return image.e_entry, sorted(segments)
