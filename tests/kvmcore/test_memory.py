import ctypes
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmcore.errors import MemoryFault
from kvmcore.memory import GuestMemory, Region

PAGE = 4096
RANGES = ((0, 4 * PAGE), (16 * PAGE, 2 * PAGE))


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory.create(RANGES)
    yield memory
    memory.close()


def test_regions_follow_each_other_in_the_file(memory: GuestMemory) -> None:
    assert memory.regions == (Region(0, 4 * PAGE, 0), Region(16 * PAGE, 2 * PAGE, 4 * PAGE))
    assert memory.size == 6 * PAGE == os.fstat(memory.fd).st_size


def test_what_is_written_is_read_back_and_in_the_file(memory: GuestMemory) -> None:
    memory.write(17 * PAGE - 2, b"abcd")
    assert memory.read(17 * PAGE - 2, 4) == b"abcd"
    assert os.pread(memory.fd, 4, 5 * PAGE - 2) == b"abcd"


def test_new_memory_is_zero_and_sparse() -> None:
    memory = GuestMemory.create([(0, 1 << 33)])
    assert memory.read((1 << 33) - 8, 8) == bytes(8)
    memory.write(1 << 32, b"x")
    assert os.fstat(memory.fd).st_blocks * 512 <= 16 * PAGE
    memory.close()


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (4 * PAGE - 1, 2),  # into the hole
        (4 * PAGE, 1),  # in the hole
        (16 * PAGE - 1, 2),  # out of the hole
        (0, 18 * PAGE),  # across the hole: as many bytes as there are, but not there
        (18 * PAGE, 1),
        (1 << 64, 1),
        ((1 << 64) - 1, 2),
        (-1, 1),
        (0, -1),
        (2 * PAGE, -1),
    ],
)
def test_a_range_that_is_not_wholly_ram_faults(memory: GuestMemory, gpa: int, size: int) -> None:
    with pytest.raises(MemoryFault) as fault:
        memory.read(gpa, size)
    assert (fault.value.gpa, fault.value.size) == (gpa, size)
    with pytest.raises(MemoryFault):
        memory.host_address(gpa, size)


def test_a_write_that_faults_writes_nothing(memory: GuestMemory) -> None:
    with pytest.raises(MemoryFault):
        memory.write(4 * PAGE - 2, b"abcd")
    assert memory.read(4 * PAGE - 2, 2) == bytes(2)


def test_items_wider_than_a_byte_count_as_bytes(memory: GuestMemory) -> None:
    words = memoryview(b"abcdefgh").cast("I")
    with pytest.raises(MemoryFault):
        memory.write(4 * PAGE - 2, words)
    memory.write(0, words)
    assert memory.read(0, 9) == b"abcdefgh\0"


@given(st.integers(-PAGE, 20 * PAGE), st.integers(-PAGE, 20 * PAGE))
def test_an_access_works_exactly_where_every_byte_is_ram(gpa: int, size: int) -> None:
    memory = GuestMemory.create(RANGES)
    inside = size >= 0 and any(start <= gpa <= gpa + size <= start + length for start, length in RANGES)
    assert memory.holds(gpa, size) == inside
    try:
        assert memory.read(gpa, size) == bytes(size)
        assert inside
    except MemoryFault:
        assert not inside
    finally:
        memory.close()


def test_a_file_is_read_straight_to_its_place(memory: GuestMemory, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    with open(tmp_path / "file", "rb") as f:
        assert memory.pread_from(f.fileno(), 2, PAGE, 4) == 4
        assert memory.read(PAGE, 5) == b"2345\0"
        assert memory.pread_from(f.fileno(), 8, 0, PAGE) == 2  # the file ends
        with pytest.raises(MemoryFault):
            memory.pread_from(f.fileno(), 0, 4 * PAGE - 4, 10)
    assert memory.read(4 * PAGE - 4, 4) == bytes(4)


SPANS = ((PAGE - 2, 4), (17 * PAGE, 3), (0, 2))


def test_views_are_the_memory_itself(memory: GuestMemory, tmp_path: Path) -> None:
    views = memory.views(SPANS)
    assert [v.nbytes for v in views] == [4, 3, 2]
    (tmp_path / "file").write_bytes(b"abcdefghi")
    with open(tmp_path / "file", "rb") as f:
        assert os.preadv(f.fileno(), views, 0) == 9
    assert [memory.read(*s) for s in SPANS] == [b"abcd", b"efg", b"hi"]
    del views


def test_copies_go_over_span_after_span(memory: GuestMemory) -> None:
    assert memory.copy_in(SPANS, b"abcdefghi!") == 9
    assert [memory.read(*s) for s in SPANS] == [b"abcd", b"efg", b"hi"]
    assert memory.copy_in(SPANS, memoryview(b"ABCDEF")) == 6
    assert [memory.read(*s) for s in SPANS] == [b"ABCD", b"EFg", b"hi"]
    for limit in range(11):
        assert memory.copy_out(SPANS, limit) == b"ABCDEFghi"[:limit]
    assert memory.copy_in(SPANS, b"") == 0


def test_a_span_that_is_not_wholly_ram_faults(memory: GuestMemory) -> None:
    bad = (4 * PAGE - 1, 2)
    for call in (
        lambda: memory.views([(0, 4), bad]),
        lambda: memory.copy_out([(0, 4), bad], 9),
        lambda: memory.copy_in([(0, 4), bad], b"123456"),
    ):
        with pytest.raises(MemoryFault) as fault:
            call()
        assert (fault.value.gpa, fault.value.size) == bad


def test_discarded_pages_leave_the_file_for_everyone(memory: GuestMemory) -> None:
    other = GuestMemory.attach(os.dup(memory.fd), memory.regions)
    for gpa in range(16 * PAGE, 18 * PAGE, PAGE):
        memory.write(gpa, b"kept")
        assert other.read(gpa, 4) == b"kept"
    before = os.fstat(memory.fd).st_blocks
    other.discard(16 * PAGE, PAGE)
    assert os.fstat(memory.fd).st_blocks == before - PAGE // 512
    assert memory.read(16 * PAGE, PAGE) == bytes(PAGE)
    assert memory.read(17 * PAGE, 4) == b"kept"
    with pytest.raises(MemoryFault):
        other.discard(17 * PAGE, 2 * PAGE)
    other.close()


def test_the_host_address_is_where_the_bytes_are(memory: GuestMemory) -> None:
    memory.write(16 * PAGE + 8, b"here")
    assert ctypes.string_at(memory.host_address(16 * PAGE + 8, 4), 4) == b"here"


def test_no_holder_can_change_the_size_or_the_seals(memory: GuestMemory) -> None:
    for size in (0, 7 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_the_descriptor_is_not_inherited(memory: GuestMemory) -> None:
    assert not os.get_inheritable(memory.fd)


def test_an_attached_memory_is_the_same_memory(memory: GuestMemory) -> None:
    other = GuestMemory.attach(os.dup(memory.fd), memory.regions)
    memory.write(16 * PAGE, b"shared")
    assert other.read(16 * PAGE, 6) == b"shared"
    other.close()


@pytest.mark.parametrize(
    "regions",
    [
        [Region(0, 4 * PAGE, 0)],
        [Region(0, 4 * PAGE, 0), Region(16 * PAGE, 3 * PAGE, 4 * PAGE)],
        [Region(0, 4 * PAGE, 0), Region(16 * PAGE, 2 * PAGE, 3 * PAGE)],
    ],
)
def test_regions_that_are_not_the_file_s_are_refused(memory: GuestMemory, regions: list[Region]) -> None:
    with pytest.raises(ValueError, match="guest memory"):
        GuestMemory.attach(memory.fd, regions)


def test_closing_twice_is_harmless() -> None:
    memory = GuestMemory.create(RANGES)
    memory.close()
    memory.close()


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys; import kvmcore.memory; print(*sorted(m for m in sys.modules if m in (%r, %r, %r)))"
    code %= ("ctypes", "_cffi_backend", "kvmcore.abi")
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output == "\n"
