"""The raw disk backend on real files: on a file system with holes, without ZERO_RANGE, and with O_DIRECT."""

from __future__ import annotations

import errno
import mmap
import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devproc.backends.disk import BLOCK, SECTOR, Disk

SIZE = 1 << 20


def contents(size: int = SIZE) -> bytearray:
    return bytearray(b"".join(n.to_bytes(4, "little") for n in range(size // 4)))


class Image:
    """A file, what it should hold, and the backend on it."""

    def __init__(self, path: Path, flags: int = os.O_RDWR, size: int = SIZE) -> None:
        self.expected = contents(size)
        path.write_bytes(self.expected)
        self.path = path
        self.fd = os.open(path, flags)
        self.disk = Disk(self.fd)

    def blocks(self) -> int:
        return os.stat(self.path).st_blocks

    def holds_what_it_should(self) -> bool:
        return self.path.read_bytes() == self.expected


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    image = Image(tmp_path / "image")
    yield image
    os.close(image.fd)


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Image]:
    try:
        image = Image(tmp_path / "image", os.O_RDWR | os.O_DIRECT)
    except OSError as e:
        pytest.skip(f"O_DIRECT in {tmp_path}: {e.strerror}")
    yield image
    os.close(image.fd)


@pytest.fixture
def on_tmpfs() -> Iterator[Image]:
    path = Path(f"/dev/shm/vmsup-test-{os.getpid()}")
    image = Image(path)
    yield image
    os.close(image.fd)
    path.unlink()


def views(buffer: bytearray | mmap.mmap, *sizes: int) -> list[memoryview]:
    """`buffer` cut into pieces of `sizes`."""
    cut, at = [], 0
    for size in sizes:
        cut.append(memoryview(buffer)[at : at + size])
        at += size
    return cut


def test_a_read_fills_every_view_in_order(image: Image) -> None:
    got = bytearray(3000)
    image.disk.read(1536, views(got, 1, 511, 2488))
    assert got == image.expected[1536:4536]


def test_a_write_takes_every_view_in_order(image: Image) -> None:
    data = bytearray(os.urandom(3000))
    image.disk.write(1536, views(data, 1000, 3, 1997))
    image.expected[1536:4536] = data
    assert image.holds_what_it_should()


def test_more_views_than_one_call_takes(image: Image) -> None:
    data = bytearray(os.urandom(2500))
    image.disk.write(0, views(data, *[1] * 2500))
    got = bytearray(2500)
    image.disk.read(0, views(got, *[1] * 2500))
    assert got == data


def test_an_unfinished_sector_at_the_end_is_not_of_the_disk(tmp_path: Path) -> None:
    image = Image(tmp_path / "image", size=2000)
    assert (image.disk.size, image.disk.length) == (3 * SECTOR, 2000)
    os.close(image.fd)


def test_an_image_that_became_shorter_is_an_error_and_stays_short(image: Image) -> None:
    os.truncate(image.path, SIZE // 2)
    zeros = [memoryview(bytes(SECTOR))]
    for act in (
        lambda: image.disk.read(SIZE - SECTOR, views(bytearray(SECTOR), SECTOR)),
        lambda: image.disk.read(SIZE // 2 - SECTOR, views(bytearray(1024), 1024)),
        lambda: image.disk.write(SIZE // 2, zeros),
        lambda: image.disk.zero(SIZE // 2, BLOCK, unmap=False),
        lambda: image.disk.zero(SIZE // 2, BLOCK, unmap=True),
    ):
        with pytest.raises(OSError) as e:
            act()
        assert e.value.errno == errno.EIO
    image.disk.discard(0, SIZE)
    assert image.path.stat().st_size == SIZE // 2


def test_a_full_host_is_an_error(image: Image) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError):
            image.disk.write(8192, [memoryview(bytes(SECTOR))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert image.holds_what_it_should()


def test_an_image_opened_for_reading_is_never_written(tmp_path: Path) -> None:
    image = Image(tmp_path / "image", os.O_RDONLY)
    for act in (
        lambda: image.disk.write(0, [memoryview(bytes(SECTOR))]),
        lambda: image.disk.discard(0, SIZE),
        lambda: image.disk.zero(0, SIZE, unmap=True),
    ):
        with pytest.raises(OSError):
            act()
    image.disk.flush()
    os.close(image.fd)
    assert image.holds_what_it_should()


def test_discarded_blocks_go_back_to_the_host(image: Image) -> None:
    before = image.blocks()
    image.disk.discard(BLOCK, 64 * BLOCK)
    assert before - image.blocks() == 64 * BLOCK // 512
    image.expected[BLOCK : 65 * BLOCK] = bytes(64 * BLOCK)
    assert image.holds_what_it_should()


def test_a_discard_never_touches_what_is_outside_it(image: Image) -> None:
    image.disk.discard(SECTOR, BLOCK + 2 * SECTOR)  # no whole block of the host's
    assert image.holds_what_it_should()


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_are_exactly_where_they_should_be(image: Image, unmap: bool) -> None:
    image.disk.zero(3 * SECTOR, 200 * SECTOR, unmap=unmap)
    image.expected[3 * SECTOR : 203 * SECTOR] = bytes(200 * SECTOR)
    assert image.holds_what_it_should()


def test_unmap_gives_the_zeroed_blocks_back_and_only_unmap(image: Image) -> None:
    before = image.blocks()
    image.disk.zero(0, SIZE // 2, unmap=False)
    assert image.blocks() >= before
    image.disk.zero(0, SIZE // 2, unmap=True)
    assert before - image.blocks() == SIZE // 2 // 512


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_are_written_where_the_host_cannot_make_them(on_tmpfs: Image, unmap: bool) -> None:
    on_tmpfs.disk.zero(SECTOR, 300 * SECTOR, unmap=unmap)  # tmpfs has no ZERO_RANGE
    on_tmpfs.expected[SECTOR : 301 * SECTOR] = bytes(300 * SECTOR)
    assert on_tmpfs.holds_what_it_should()


def test_an_extended_image_has_zeros_at_its_end(image: Image) -> None:
    image.disk.extend(SIZE + 5000)
    image.expected += bytes(5000)
    assert image.holds_what_it_should()
    assert image.disk.length == SIZE + 5000


def test_what_the_host_has_made_longer_keeps_what_is_there(image: Image) -> None:
    with image.path.open("ab") as file:
        file.write(b"new" * 1000)
    image.expected += b"new" * 1000
    image.disk.extend(SIZE + 5 * SECTOR)
    assert image.disk.size == SIZE + 5 * SECTOR
    assert image.holds_what_it_should()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    write=st.booleans(),
    sector=st.integers(0, SIZE // SECTOR - 1),
    sectors=st.integers(1, 1200),
    skew=st.sampled_from((0, 1, SECTOR)),
    seed=st.integers(0, 1 << 32),
)
def test_direct_transfers_need_no_alignment_of_the_guest_s(
    direct: Image, write: bool, sector: int, sectors: int, skew: int, seed: int
) -> None:
    rng = random.Random(seed)
    offset = sector * SECTOR
    size = min(sectors * SECTOR, SIZE - offset)
    buffer = mmap.mmap(-1, size + SECTOR)
    cut = sorted(rng.randrange(size + 1) for _ in range(3))
    pieces = views(buffer, skew, cut[0], cut[1] - cut[0], cut[2] - cut[1], size - cut[2])[1:]
    if write:
        buffer[:] = rng.randbytes(size + SECTOR)
        direct.expected[offset : offset + size] = buffer[skew : skew + size]
        direct.disk.write(offset, pieces)
        assert direct.holds_what_it_should()
    else:
        direct.disk.read(offset, pieces)
        assert buffer[skew : skew + size] == direct.expected[offset : offset + size]


def test_direct_zeroes_need_no_alignment_either(direct: Image) -> None:
    direct.disk.zero(SECTOR, 1000 * SECTOR, unmap=False)
    direct.expected[SECTOR : 1001 * SECTOR] = bytes(1000 * SECTOR)
    assert direct.holds_what_it_should()
