"""Loads an uncompressed x86-64 vmlinux: its PT_LOAD segments go to their physical addresses.

System V ABI, ELF-64 object file format; the entry point of a Linux vmlinux is the physical address of
startup_64 (arch/x86/kernel/vmlinux.lds.S), entered as a bzImage would enter it.  pyelftools is imported when
the first ELF is loaded: it costs more than the rest of the start.  Left out: relocation, sections, PVH notes.
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
    from elftools.elf.elffile import ELFFile  # noqa: PLC0415

    with os.fdopen(file.fd, "rb", closefd=False) as stream:
        try:
            image = ELFFile(stream)
            kind = (image.elfclass, image.little_endian, image["e_machine"], image["e_type"])
            if kind != (64, True, "EM_X86_64", "ET_EXEC"):
                raise file.error("expected an ELF64 little-endian x86-64 executable")
            if image.num_segments() > SEGMENTS_MAX:
                raise file.error(f"{image.num_segments()} segments, expected at most {SEGMENTS_MAX}")
            headers = [s.header for s in image.iter_segments("PT_LOAD") if s["p_memsz"]]
            entry = image["e_entry"]
        except (ELFError, OSError, ValueError, OverflowError) as e:
            # All but the first from seeks to where no file reaches, which pyelftools leaves as they are.
            raise file.error(f"not a sound ELF file: {e}") from None
    segments = [_Segment(h.p_paddr, h.p_paddr + h.p_memsz, h.p_offset, h.p_filesz) for h in headers]
    return entry, sorted(segments)
