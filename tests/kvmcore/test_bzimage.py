"""Images are built here from Documentation/arch/x86/boot.rst, by offset, without the loader's own table."""

import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmcore import bzimage
from kvmcore.errors import ConfigError, VmsupError
from kvmcore.layout import GIB, MIB, ram_regions
from kvmcore.memory import GuestMemory

CODE = bytes(range(256)) * 16
DEFAULTS = {
    (0x1F1, "<B"): 2,  # setup_sects
    (0x1F4, "<I"): len(CODE) // 16,  # syssize
    (0x1FE, "<H"): 0xAA55,
    (0x200, "<H"): 0x6AEB,  # jmp over the header
    (0x202, "<I"): 0x53726448,
    (0x206, "<H"): 0x020F,
    (0x211, "<B"): 1,  # LOADED_HIGH
    (0x22C, "<I"): 0x7FFFFFFF,  # initrd_addr_max
    (0x230, "<I"): 0x200000,  # kernel_alignment
    (0x234, "<B"): 1,  # relocatable_kernel
    (0x236, "<H"): 1,  # XLF_KERNEL_64
    (0x238, "<I"): 2047,  # cmdline_size
    (0x258, "<Q"): 0x1000000,  # pref_address
    (0x260, "<I"): 0x800000,  # init_size
}


def image(changes=None):
    data = bytearray(3 * 512) + CODE
    for (offset, form), value in (DEFAULTS | (changes or {})).items():
        struct.pack_into(form, data, offset, value)
    return bytes(data)


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
        path = tmp_path / "vmlinuz"
        path.write_bytes(data)
        return bzimage.load(str(path), memory)

    return load


def test_protected_mode_code_goes_to_2_mib_and_is_entered_at_200(load, memory):
    kernel = load(image())
    assert memory.read(0x200000, len(CODE)) == CODE
    assert kernel.start == 0x200000
    assert kernel.entry == 0x200200


def test_kernel_is_given_the_room_where_it_will_decompress_itself(load):
    assert load(image()).end == 0x1000000 + 0x800000


def test_kernel_that_prefers_a_lower_address_stays_where_it_was_loaded(load):
    assert load(image({(0x258, "<Q"): 0x100000})).end == 0x200000 + 0x800000


def test_limits_come_from_the_images_own_header(load):
    header = load(image({(0x22C, "<I"): 0x37FFFFFF, (0x238, "<I"): 255})).header
    assert header["initrd_addr_max"] == 0x37FFFFFF
    assert header["cmdline_size"] == 255


def test_header_ends_where_its_jump_says(load):
    assert len(load(image()).header.data) == 0x202 + 0x6A - 0x1F1


def test_zero_setup_sectors_mean_four(load, memory):
    data = image({(0x1F1, "<B"): 0})
    load(data[: 3 * 512] + bytes(2 * 512) + CODE)
    assert memory.read(0x200000, len(CODE)) == CODE


def test_bytes_after_the_kernel_are_not_loaded(load, memory):
    load(image() + b"signature")
    assert memory.read(0x200000 + len(CODE), 9) == bytes(9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({(0x1FE, "<H"): 0}, "expected a bzImage or an ELF vmlinux"),
        ({(0x202, "<I"): 0}, '"HdrS"'),
        ({(0x206, "<H"): 0x020B}, "boot protocol 0x020b, expected 0x020c or later"),
        ({(0x211, "<B"): 0}, "no 64-bit entry point"),
        ({(0x236, "<H"): 0}, "no 64-bit entry point"),
        ({(0x234, "<B"): 0}, "loaded at 0x200000"),
        ({(0x230, "<I"): 0}, "loaded at 0x200000"),
        ({(0x230, "<I"): 0x1000000}, "loaded at 0x200000"),
        ({(0x201, "<B"): 0x20}, "setup header ends at 0x222"),
        ({(0x201, "<B"): 0xFF}, "setup header ends at 0x301"),
        ({(0x1F4, "<I"): 0}, "0 bytes of protected-mode code"),
        ({(0x1F4, "<I"): len(CODE) // 16 + 1}, "truncated: protected-mode code"),
        ({(0x260, "<I"): 48 * MIB + 1}, "needs memory up to 0x4000001, expected at most 0x4000000 of 64 MiB"),
        ({(0x258, "<Q"): 1 << 63}, "needs memory"),
    ],
)
def test_what_cannot_be_loaded_is_one_line_that_names_the_file(load, tmp_path, changes, message):
    with pytest.raises(ConfigError) as e:
        load(image(changes))
    assert message in str(e.value)
    assert str(e.value).startswith(f"kernel {tmp_path / 'vmlinuz'}: ")
    assert "\n" not in str(e.value)


def test_kernel_must_be_inside_the_boot_page_tables_however_much_memory_there_is(tmp_path):
    path = tmp_path / "vmlinuz"
    path.write_bytes(image({(0x258, "<Q"): GIB}))
    with pytest.raises(ConfigError, match="expected at most 0x40000000 of 5120 MiB"):
        bzimage.load(str(path), GuestMemory.create(ram_regions(5 * GIB)))


@pytest.mark.parametrize("size", [0, 1, 0x1F1, 0x28F, 0x600, 0x600 + len(CODE) - 1])
def test_truncated_files_are_refused(load, size):
    with pytest.raises(ConfigError):
        load(image()[:size])


@given(st.lists(st.tuples(st.integers(0x1F1, 0x28F), st.integers(0, 255)), max_size=8))
def test_any_header_loads_or_is_a_config_error(tmp_path_factory, scratch, damage):
    data = bytearray(image())
    for offset, value in damage:
        data[offset] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data)
    try:
        kernel = bzimage.load(str(path), scratch)
    except VmsupError as e:
        assert isinstance(e, ConfigError)
    else:
        assert kernel.start < kernel.entry < kernel.end <= 64 * MIB


def test_missing_kernel_is_named(memory):
    with pytest.raises(ConfigError, match="kernel /nonexistent: No such file or directory"):
        bzimage.load("/nonexistent", memory)


def test_fifo_is_refused_without_waiting(tmp_path, memory):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ConfigError, match="expected a regular file"):
        bzimage.load(str(tmp_path / "fifo"), memory)


def test_no_descriptor_is_left_open(load):
    before = os.listdir("/proc/self/fd")
    load(image())
    with pytest.raises(ConfigError):
        load(b"")
    assert len(os.listdir("/proc/self/fd")) == len(before)
