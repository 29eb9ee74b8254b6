"""Loads a kernel file: a bzImage by its own setup header, anything that begins as ELF by kvmcore.elf.

The Linux/x86 boot protocol (Documentation/arch/x86/boot.rst), version 2.12 or later with the 64-bit entry
point.  Left out: 16- and 32-bit entry, zImage, kernels that cannot be relocated, the EFI stub, and what
follows the protected-mode code in the file (padding, a Secure Boot signature).
"""

from __future__ import annotations

from typing import Final

from kvmcore import elf, layout
from kvmcore.bootfile import BootFile, Memory
from kvmcore.bootparams import (
    BOOT_FLAG,
    HEADER,
    HEADER_END_MAX,
    LOADED_HIGH,
    MAGIC,
    XLF_KERNEL_64,
    Header,
    Kernel,
)

_SECTOR: Final = 512
_PARAGRAPH: Final = 16
_ENTRY_64: Final = 0x200
_HEADER_LENGTH: Final = 0x201  # second byte of the jump over the header
_HEADER_MIN_END: Final = 0x264  # after init_size, which every 2.12 header has


def load(path: str, memory: Memory) -> Kernel:
    """Load the kernel at `path`, bzImage or ELF vmlinux, into guest memory that is still zero.

    Raises:
        ConfigError: the file is not a kernel that can be entered in 64-bit mode, or does not fit.
    """
    with BootFile("kernel", path) as file:
        if file.read(0, min(file.size, 4), "magic number") == elf.MAGIC:
            return elf.load(file, memory)
        return _load(file, memory)


def _load(file: BootFile, memory: Memory) -> Kernel:
    header = _read_header(file)
    if header["version"] < 0x020C:
        raise file.error(f"boot protocol {header['version']:#06x}, expected 0x020c or later")
    if not header["loadflags"] & LOADED_HIGH or not header["xloadflags"] & XLF_KERNEL_64:
        raise file.error("no 64-bit entry point (XLF_KERNEL_64), expected an x86-64 bzImage")
    alignment = header["kernel_alignment"]
    if not header["relocatable_kernel"] or not alignment or layout.KERNEL % alignment:
        raise file.error(f"expected a kernel that can be loaded at {layout.KERNEL:#x}")

    offset = ((header["setup_sects"] or 4) + 1) * _SECTOR
    size = header["syssize"] * _PARAGRAPH
    if size <= _ENTRY_64:
        raise file.error(f"{size} bytes of protected-mode code, expected more")
    # It decompresses itself to where it was loaded or to pref_address (CONFIG_PHYSICAL_START), whichever is
    # higher, and there needs init_size until it has read the memory map.
    runtime_start = max(layout.KERNEL, header["pref_address"])
    end = max(layout.KERNEL + size, runtime_start + header["init_size"])
    file.check(offset, size, "protected-mode code")
    file.check_kernel_end(end, memory)
    file.load(memory, offset, layout.KERNEL, size, "protected-mode code")
    return Kernel(layout.KERNEL, end, layout.KERNEL + _ENTRY_64, header)


def _read_header(file: BootFile) -> Header:
    if file.size < HEADER_END_MAX:
        raise file.error(f"{file.size} bytes, expected a bzImage or an ELF vmlinux")
    start = file.read(0, HEADER_END_MAX, "setup header")
    header = Header(start[HEADER:])
    if header["boot_flag"] != BOOT_FLAG or header["header"] != MAGIC:
        raise file.error('neither ELF nor "HdrS" at 0x202, expected a bzImage or an ELF vmlinux')
    end = 0x202 + start[_HEADER_LENGTH]
    if not _HEADER_MIN_END <= end <= HEADER_END_MAX:
        raise file.error(
            f"setup header ends at {end:#x}, expected {_HEADER_MIN_END:#x} to {HEADER_END_MAX:#x}"
        )
    return Header(start[HEADER:end])
