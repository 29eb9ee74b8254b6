import os

import pytest

from kvmcore.bootfile import BootFile
from kvmcore.errors import ConfigError, MemoryFault
from kvmcore.layout import MIB, ram_regions
from kvmcore.memory import GuestMemory


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    return str(path)


@pytest.fixture
def memory():
    return GuestMemory.create(ram_regions(MIB))


def test_bytes_go_from_file_offset_to_guest_address(path, memory):
    with BootFile("kernel", path) as file:
        file.load(memory, 4, 0x1000, 6, "code")
    assert memory.read(0xFFF, 8) == b"\x00456789\x00"


def test_reading_past_the_end_says_what_was_to_be_read(path, memory):
    with BootFile("kernel", path) as file:
        assert file.read(4, 6, "code") == b"456789"
        with pytest.raises(ConfigError, match="truncated: code ends at 11, the file at 10"):
            file.read(4, 7, "code")
        with pytest.raises(ConfigError, match="truncated: code ends at 11, the file at 10"):
            file.load(memory, 4, 0, 7, "code")


def test_file_that_shrinks_while_it_is_loaded_is_an_error(path, memory):
    with BootFile("initrd", path) as file:
        os.truncate(path, 5)
        with pytest.raises(ConfigError, match="truncated while it was read"):
            file.load(memory, 0, 0, 10, "initrd")
        with pytest.raises(ConfigError, match="truncated while it was read"):
            file.read(0, 10, "initrd")


def test_loading_outside_ram_is_a_memory_fault(path, memory):
    with BootFile("initrd", path) as file, pytest.raises(MemoryFault):
        file.load(memory, 0, MIB - 5, 10, "initrd")


def test_path_with_a_nul_is_a_config_error():
    with pytest.raises(ConfigError, match="null"):
        BootFile("kernel", "a\0b")


def test_file_of_another_kind_is_refused_and_closed(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="expected a regular file"):
        BootFile("kernel", str(tmp_path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_kernel_must_end_below_the_end_of_low_memory(path, memory):
    with BootFile("kernel", path) as file:
        file.check_kernel_end(MIB, memory)
        with pytest.raises(
            ConfigError, match="needs memory up to 0x100001, expected at most 0x100000 of 1 MiB"
        ):
            file.check_kernel_end(MIB + 1, memory)
