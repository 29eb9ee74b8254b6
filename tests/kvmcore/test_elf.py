"""Files are built here from the ELF-64 object file format, loaded through the door that detects ELF."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmcore import bzimage
from kvmcore.errors import ConfigError
from kvmcore.layout import MIB, ram_regions
from kvmcore.memory import GuestMemory

PT_LOAD, PT_NOTE = 1, 4
TEXT, DATA = b"\x90" * 100, b"data" * 10
VIRTUAL = 0xFFFFFFFF80000000


def segment(paddr, offset, filesz, memsz, kind=PT_LOAD):
    return struct.pack("<IIQQQQQQ", kind, 7, offset, VIRTUAL + paddr, paddr, filesz, memsz, 0x1000)


def vmlinux(
    segments=None, entry=0x1000010, machine=62, kind=2, ident=b"\x7fELF\x02\x01\x01", phnum=None, phentsize=56
):
    if segments is None:
        segments = [
            segment(0x1000000, 0x1000, len(TEXT), len(TEXT)),
            segment(0x1200000, 0x2000, len(DATA), 0x5000),
            segment(0, 0x40, 8, 8, PT_NOTE),
        ]
    header = ident.ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH",
        kind, machine, 1, entry, 64, 0, 0, 64, phentsize, len(segments) if phnum is None else phnum, 64, 0, 0,
    )  # fmt: skip
    data = header + b"".join(segments)
    return data.ljust(0x1000, b"\0") + TEXT.ljust(0x1000, b"\0") + DATA


@pytest.fixture(scope="session")
def scratch():
    """RAM for the property tests, which do not look at what an earlier example left in it."""
    memory = GuestMemory.create(ram_regions(64 * MIB))
    yield memory
    memory.close()


@pytest.fixture
def memory():
    memory = GuestMemory.create(ram_regions(64 * MIB))
    yield memory
    memory.close()


@pytest.fixture
def load(tmp_path, memory):
    def load(data):
        path = tmp_path / "vmlinux"
        path.write_bytes(data)
        return bzimage.load(str(path), memory)

    return load


def test_segments_go_to_their_physical_addresses(load, memory):
    load(vmlinux())
    assert memory.read(0x1000000, len(TEXT)) == TEXT
    assert memory.read(0x1200000, len(DATA)) == DATA


def test_kernel_spans_its_segments_with_their_bss(load):
    kernel = load(vmlinux())
    assert (kernel.start, kernel.end, kernel.entry) == (0x1000000, 0x1205000, 0x1000010)


def test_segments_other_than_load_are_ignored(load, memory):
    load(vmlinux())
    assert memory.read(0, 8) == bytes(8)


def test_header_made_for_an_elf_has_what_linux_checks(load):
    header = load(vmlinux()).header
    assert header["boot_flag"] == 0xAA55
    assert header["header"] == int.from_bytes(b"HdrS", "little")
    assert header["kernel_alignment"] != 0
    assert header["cmdline_size"] == 2047
    assert header["initrd_addr_max"] == 0x7FFFFFFF


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (vmlinux(ident=b"\x7fELF\x01\x01\x01"), "expected an ELF64"),
        (vmlinux(ident=b"\x7fELF\x02\x02\x01"), "expected an ELF64"),
        (vmlinux(machine=183), "expected an ELF64 little-endian x86-64 executable"),
        (vmlinux(kind=3), "expected an ELF64 little-endian x86-64 executable"),
        (vmlinux(segments=[]), "no PT_LOAD segments"),
        (vmlinux(phnum=65), "65 segments, expected at most 64"),
        (vmlinux(entry=VIRTUAL + 0x1000010), "is in no segment, expected a physical address"),
        (vmlinux(entry=0x1200000 + len(DATA)), "is in no segment"),
        (vmlinux([segment(0xFF000, 0x1000, 8, 8)]), "segment at 0xff000, expected none below 0x100000"),
        (vmlinux([segment(0x1000000, 0x1000, 16, 8)]), "more bytes in the file than in memory"),
        (vmlinux([segment(0x1000000, 0x2000, 0x1000, 0x1000)]), "truncated: segment at 0x1000000"),
        (
            vmlinux([segment(0x1000000, 0x1000, 64, 64), segment(0x100003F, 0x1000, 8, 8)]),
            "segment at 0x100003f overlaps the one that ends at 0x1000040",
        ),
        (
            vmlinux([segment(0x1000000, 0x1000, 64, 64 * MIB)]),
            "needs memory up to 0x5000000, expected at most",
        ),
        (vmlinux([segment(0x1000000, 0x1000, 64, (1 << 64) - 1)]), "needs memory"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_that_names_the_file(load, tmp_path, memory, data, message):
    with pytest.raises(ConfigError) as e:
        load(data)
    assert message in str(e.value)
    assert str(e.value).startswith(f"kernel {tmp_path / 'vmlinux'}: ")
    assert "\n" not in str(e.value)


def test_program_headers_beyond_any_file_are_refused(load):
    data = bytearray(vmlinux())
    struct.pack_into("<Q", data, 32, 1 << 63)  # e_phoff
    with pytest.raises(ConfigError, match="not a sound ELF file"):
        load(data)


@pytest.mark.parametrize("size", [4, 16, 63, 64, 100, 0x1000, 0x2000 + len(DATA) - 1])
def test_truncated_files_are_refused(load, size):
    with pytest.raises(ConfigError):
        load(vmlinux()[:size])


@given(st.lists(st.tuples(st.integers(4, 64 + 3 * 56 - 1), st.integers(0, 255)), max_size=8))
def test_any_damage_loads_or_is_a_config_error(tmp_path_factory, scratch, damage):
    data = bytearray(vmlinux())
    for offset, value in damage:
        data[offset] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    try:
        kernel = bzimage.load(str(path), scratch)
    except ConfigError:
        return
    assert MIB <= kernel.start <= kernel.entry < kernel.end <= 64 * MIB
