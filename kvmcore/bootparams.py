"""The zero page, command line, initrd and setup_data with which a 64-bit Linux kernel is entered.

The Linux/x86 boot protocol (Documentation/arch/x86/boot.rst and zero-page.rst), sections "64-bit boot
protocol" and "Details of header fields".  For a bzImage the setup header is the image's own, with only the
loader's fields replaced; for an ELF it is made here.  Left out: everything that a real-mode or EFI entry
needs, loading above 4 GiB, and SETUP_INDIRECT.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from kvmcore import layout
from kvmcore.bootfile import BootFile, Memory
from kvmcore.errors import ConfigError

SIZE: Final = 4096
HEADER: Final = 0x1F1  # struct setup_header; the same offset in a bzImage and in the zero page
HEADER_END_MAX: Final = 0x290  # the next field of struct boot_params
BOOT_FLAG: Final = 0xAA55
MAGIC: Final = int.from_bytes(b"HdrS", "little")
LOADED_HIGH: Final = 1 << 0
CAN_USE_HEAP: Final = 1 << 7
XLF_KERNEL_64: Final = 1 << 0
SETUP_DTB: Final = 2
SETUP_DATA_ALIGN: Final = 64

# name -> (offset in struct boot_params, struct format), as boot.rst and zero-page.rst name them
FIELDS: Final = {
    "acpi_rsdp_addr": (0x070, "<Q"),
    "ext_ramdisk_image": (0x0C0, "<I"),
    "ext_ramdisk_size": (0x0C4, "<I"),
    "ext_cmd_line_ptr": (0x0C8, "<I"),
    "e820_entries": (0x1E8, "<B"),
    "setup_sects": (0x1F1, "<B"),
    "syssize": (0x1F4, "<I"),
    "boot_flag": (0x1FE, "<H"),
    "header": (0x202, "<I"),
    "version": (0x206, "<H"),
    "type_of_loader": (0x210, "<B"),
    "loadflags": (0x211, "<B"),
    "code32_start": (0x214, "<I"),
    "ramdisk_image": (0x218, "<I"),
    "ramdisk_size": (0x21C, "<I"),
    "cmd_line_ptr": (0x228, "<I"),
    "initrd_addr_max": (0x22C, "<I"),
    "kernel_alignment": (0x230, "<I"),
    "relocatable_kernel": (0x234, "<B"),
    "xloadflags": (0x236, "<H"),
    "cmdline_size": (0x238, "<I"),
    "setup_data": (0x250, "<Q"),
    "pref_address": (0x258, "<Q"),
    "init_size": (0x260, "<I"),
}
_E820_TABLE: Final = 0x2D0
_E820_ENTRY: Final = struct.Struct("<QQI")
_SETUP_DATA: Final = struct.Struct("<QII")  # next, type, len


class Header:
    """A setup header, as the bytes from offset 0x1f1 on; fields by their boot.rst names."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    @classmethod
    def for_elf(cls) -> Header:
        """What an ELF vmlinux, which carries no header, would say of itself; limits are Linux's constants."""
        page = bytearray(HEADER_END_MAX)
        _put(
            page,
            boot_flag=BOOT_FLAG,
            header=MAGIC,
            version=0x020C,
            loadflags=LOADED_HIGH,
            initrd_addr_max=0x7FFFFFFF,
            kernel_alignment=2 * layout.MIB,
            xloadflags=XLF_KERNEL_64,
            cmdline_size=2047,
        )
        return cls(bytes(page[HEADER:]))

    def __getitem__(self, name: str) -> int:
        offset, form = FIELDS[name]
        value: int = struct.unpack_from(form, self.data, offset - HEADER)[0]
        return value


class Kernel(NamedTuple):
    """A loaded kernel: it needs guest memory [start, end) and is entered at `entry`, in 64-bit mode."""

    start: int
    end: int
    entry: int
    header: Header


def write(
    memory: Memory,
    kernel: Kernel,
    cmdline: str,
    initrd: str | None = None,
    setup_data: Sequence[tuple[int, bytes]] = (),
    ecam_buses: int = 0,
) -> None:
    """Put everything beside the kernel itself into guest memory; `setup_data` is (SETUP_* type, bytes).

    Raises:
        ConfigError: command line, initrd or setup_data do not fit or cannot be read.
    """
    low_end = layout.low_ram_end(memory.size)
    cursor = kernel.end
    nodes: list[tuple[int, int, bytes]] = []
    for kind, data in setup_data:
        gpa = _align(cursor, SETUP_DATA_ALIGN)
        cursor = gpa + _SETUP_DATA.size + len(data)
        if cursor > low_end:
            raise ConfigError(f"setup_data: {len(data)} bytes do not fit between kernel and {low_end:#x}")
        nodes.append((gpa, kind, data))
    for i, (gpa, kind, data) in enumerate(nodes):
        following = nodes[i + 1][0] if i + 1 < len(nodes) else 0
        memory.write(gpa, _SETUP_DATA.pack(following, kind, len(data)) + data)

    ramdisk, ramdisk_size = 0, 0
    if initrd is not None:
        ramdisk = _align(cursor, layout.PAGE_SIZE)
        end = min(low_end, kernel.header["initrd_addr_max"] + 1)
        ramdisk_size = _load_initrd(memory, initrd, ramdisk, end)

    memory.write(layout.CMDLINE, encode_cmdline(cmdline, kernel.header["cmdline_size"]))
    page = zero_page(
        kernel,
        layout.e820(memory.size, ecam_buses),
        ramdisk_image=ramdisk,
        ramdisk_size=ramdisk_size,
        setup_data=nodes[0][0] if nodes else 0,
    )
    memory.write(layout.ZERO_PAGE, page)


def zero_page(
    kernel: Kernel,
    e820: Sequence[layout.E820Entry],
    ramdisk_image: int = 0,
    ramdisk_size: int = 0,
    setup_data: int = 0,
) -> bytes:
    """struct boot_params for `kernel`; addresses are guest-physical, sizes in bytes, 0 means none."""
    page = bytearray(SIZE)
    page[HEADER : HEADER + len(kernel.header.data)] = kernel.header.data
    _put(
        page,
        acpi_rsdp_addr=layout.RSDP,
        type_of_loader=0xFF,  # no assigned id
        loadflags=kernel.header["loadflags"] & ~CAN_USE_HEAP,
        code32_start=kernel.start,
        cmd_line_ptr=layout.CMDLINE,
        ramdisk_image=ramdisk_image & 0xFFFFFFFF,
        ext_ramdisk_image=ramdisk_image >> 32,
        ramdisk_size=ramdisk_size & 0xFFFFFFFF,
        ext_ramdisk_size=ramdisk_size >> 32,
        setup_data=setup_data,
        e820_entries=len(e820),
    )
    for i, entry in enumerate(e820):
        _E820_ENTRY.pack_into(page, _E820_TABLE + i * _E820_ENTRY.size, *entry)
    return bytes(page)


def encode_cmdline(cmdline: str, limit: int) -> bytes:
    """The command line with its final NUL, which `limit`, the kernel's cmdline_size, does not count.

    Raises:
        ConfigError: longer than kernel or layout allow, or with a character that a kernel cannot take.
    """
    limit = min(limit, layout.EBDA - layout.CMDLINE - 1)
    data = os.fsencode(cmdline)
    if any(c in data for c in b"\0\n"):
        raise ConfigError("kernel command line: expected one line without NUL or newline")
    if len(data) > limit:
        # The kernel would cut it short without a word.
        raise ConfigError(f"kernel command line: {len(data)} bytes, this kernel takes at most {limit}")
    return data + b"\0"


def _load_initrd(memory: Memory, path: str, gpa: int, end: int) -> int:
    with BootFile("initrd", path) as file:
        if file.size == 0:
            raise file.error("the file is empty")
        if gpa + file.size > end:
            raise file.error(
                f"{file.size} bytes do not fit between kernel and memory limit, [{gpa:#x}, {end:#x})"
            )
        file.load(memory, 0, gpa, file.size, "initrd")
        return file.size


def _put(page: bytearray, **values: int) -> None:
    for name, value in values.items():
        offset, form = FIELDS[name]
        struct.pack_into(form, page, offset, value)


def _align(value: int, align: int) -> int:
    return (value + align - 1) & -align
