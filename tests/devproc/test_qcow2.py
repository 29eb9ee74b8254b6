"""qcow2 images made, checked and compared by QEMU's own tools, and images that nobody would make."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from devproc.backends.disk import Disk
from devproc.backends.qcow2 import Qcow2, Qcow2Error

pytestmark = pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img (Debian: qemu-utils) is not installed"
)
SIZE = 8 << 20
SECTOR = 512
MAKES = {
    "default": "",
    "v2": "compat=0.10",
    "small clusters": "cluster_size=4k",
    "tiny clusters": "cluster_size=1k",
    "large clusters": "cluster_size=2M",
    "wide counts": "refcount_bits=64",
    "narrow counts": "refcount_bits=8",
    "preallocated": "preallocation=metadata",
}


def qemu_img(*args: str | Path) -> str:
    done = subprocess.run(["qemu-img", *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"
    return done.stdout


class Image:
    """An image, what it should hold, and the backend on it."""

    def __init__(self, path: Path, expected: bytes, backing: Disk | None = None, **keys: Any) -> None:
        self.path = path
        self.expected = bytearray(expected)
        self.fd = os.open(path, os.O_RDWR)
        self.disk = Qcow2(Disk(self.fd), backing, **keys)

    def read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        cut = size // 3
        self.disk.read(offset, [memoryview(data)[:cut], memoryview(data)[cut:]])
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        cut = len(data) // 3
        self.disk.write(offset, [memoryview(data)[:cut], memoryview(data)[cut:]])
        self.expected[offset : offset + len(data)] = data

    def zero(self, offset: int, size: int, unmap: bool) -> None:
        self.disk.zero(offset, size, unmap=unmap)
        self.expected[offset : offset + size] = bytes(size)

    def finish(self) -> None:
        """QEMU finds nothing wrong, nothing leaked, and the same bytes."""
        assert self.read(0, len(self.expected)) == self.expected
        self.disk.close()
        os.close(self.fd)
        qemu_img("check", "-f", "qcow2", self.path)
        raw = self.path.with_suffix(".raw")
        raw.write_bytes(self.expected)
        assert "identical" in qemu_img("compare", "-f", "qcow2", "-F", "raw", self.path, raw)


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def made() -> dict[tuple[str | Path | int, ...], bytes]:
    """Images as qemu-img made them, by how."""
    return {}


@pytest.fixture
def make(tmp_path: Path, made: dict[tuple[str | Path | int, ...], bytes]) -> Make:
    def make(options: str = "", size: int = SIZE, *more: str | Path) -> Path:
        path = tmp_path / "image.qcow2"
        if (options, size, *more) not in made:
            chosen = ["-o", options] if options else []
            qemu_img("create", "-q", "-f", "qcow2", *chosen, *more, path, str(size))
            made[options, size, *more] = path.read_bytes()
        path.write_bytes(made[options, size, *more])
        return path

    return make


def content(seed: int, size: int = SIZE) -> bytes:
    return random.Random(seed).randbytes(size)


def play(image: Image, seed: int, rounds: int = 60) -> None:
    """Random requests of whole sectors, flushed now and then."""
    rng = random.Random(seed)
    size = len(image.expected)
    for _ in range(rounds):
        offset = rng.randrange(size // SECTOR) * SECTOR
        length = min(rng.choice((1, 3, 8, 40, 300, 2000)) * SECTOR, size - offset)
        match rng.randrange(8):
            case 0 | 1 | 2:
                image.write(offset, rng.randbytes(length))
            case 3:
                image.zero(offset, length, unmap=True)
            case 4:
                image.zero(offset, length, unmap=False)
            case 5:
                image.disk.discard(offset, length)
                image.expected[offset : offset + length] = image.read(offset, length)
            case 6:
                image.disk.flush()
            case _:
                assert image.read(offset, length) == image.expected[offset : offset + length]


@pytest.mark.parametrize("options", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("seed", range(2))
def test_what_is_written_is_what_qemu_reads(make: Make, options: str, seed: int) -> None:
    image = Image(make(options), bytes(SIZE))
    play(image, seed)
    image.finish()


@pytest.mark.parametrize("seed", range(2))
def test_an_image_is_used_again_and_again(make: Make, seed: int) -> None:
    path, expected = make("cluster_size=4k"), bytes(SIZE)
    for again in range(4):
        image = Image(path, expected)
        play(image, seed + 10 * again)
        expected = bytes(image.expected)
        image.finish()


def test_what_was_given_back_is_used_again(make: Make) -> None:
    path = make()
    image = Image(path, bytes(SIZE))
    for n in range(12):
        image.write(0, content(n))
        image.disk.flush()
        image.zero(0, SIZE, unmap=True)
        image.disk.flush()
    assert path.stat().st_size < 4 * SIZE
    assert path.stat().st_blocks * 512 < 2 << 20
    image.finish()


def test_a_reopened_image_uses_the_holes_of_the_last_time(make: Make) -> None:
    path, expected = make(), bytes(SIZE)
    for n in range(6):
        image = Image(path, expected)
        image.write(0, content(n))
        image.zero(0, SIZE, unmap=True)
        image.finish()
    assert path.stat().st_size < 4 * SIZE


@pytest.mark.parametrize("backed", ["raw", "qcow2"])
@pytest.mark.parametrize("options", ["", "compat=0.10"])
@pytest.mark.parametrize("seed", range(2))
def test_what_is_not_in_the_image_is_in_what_it_is_based_on(
    make: Make, tmp_path: Path, backed: str, options: str, seed: int
) -> None:
    base_raw, base = tmp_path / "base.raw", tmp_path / f"base.{backed}"
    before = content(9, SIZE - 3 * SECTOR)  # and it is shorter
    base_raw.write_bytes(before)
    if backed == "qcow2":
        qemu_img("convert", "-f", "raw", "-O", "qcow2", base_raw, base)
    path = make(options, SIZE, "-b", base, "-F", backed)
    with base.open("rb") as file:
        under = Disk(file.fileno())
        backing: Any = under if backed == "raw" else Qcow2(under, read_only=True)
        image = Image(path, before + bytes(3 * SECTOR), backing)
        play(image, seed)
        image.finish()
    assert base_raw.read_bytes() == before


@pytest.mark.parametrize("seed", range(3))
def test_compressed_clusters_are_read_and_written_over(tmp_path: Path, seed: int) -> None:
    raw, path = tmp_path / "from.raw", tmp_path / "image.qcow2"
    data = b"".join(bytes([n & 0xFF]) * 3000 + os.urandom(1000) for n in range(SIZE // 4000 + 1))[:SIZE]
    raw.write_bytes(data)
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)
    image = Image(path, data)
    assert image.read(0, SIZE) == data
    play(image, seed)
    image.finish()


def test_a_snapshot_keeps_what_was_there(make: Make, tmp_path: Path) -> None:
    path = make()
    first = Image(path, bytes(SIZE))
    first.write(0, content(1, SIZE // 2))
    before = bytes(first.expected)
    first.finish()
    qemu_img("snapshot", "-c", "then", path)
    image = Image(path, before)
    play(image, 5)
    image.finish()
    then = tmp_path / "then.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", "-l", "then", path, then)
    assert then.read_bytes() == before


def test_a_disk_of_an_odd_size(make: Make) -> None:
    size = SIZE - 7 * SECTOR
    image = Image(make("", size), bytes(size))
    image.write(size - SECTOR, content(1, SECTOR))
    image.zero(size - 5 * SECTOR, 2 * SECTOR, unmap=True)
    play(image, 3)
    image.finish()


def test_a_read_only_image_is_not_written(make: Make) -> None:
    path = make()
    before = path.read_bytes()
    image = Image(path, bytes(SIZE), read_only=True)
    for act in (
        lambda: image.disk.write(0, [memoryview(bytes(SECTOR))]),
        lambda: image.disk.discard(0, SIZE),
        lambda: image.disk.zero(0, SIZE, unmap=True),
    ):
        with pytest.raises(OSError):
            act()
    image.disk.flush()
    image.disk.close()
    assert path.read_bytes() == before


@pytest.mark.parametrize("seed", range(4))
def test_the_death_of_the_process_leaves_no_damage(make: Make, seed: int) -> None:
    """Leaks are allowed (exit code 3), corruption is not (2)."""
    path = make("cluster_size=4k")
    image = Image(path, bytes(SIZE))
    play(image, seed)
    assert image.read(0, SIZE) == image.expected
    os.close(image.fd)  # and nothing else: not closed, not flushed
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, check=False)
    assert done.returncode in (0, 3), done.stdout
    qemu_img("check", "-q", "-f", "qcow2", "-r", "leaks", path)
    Image(path, image.expected).finish()


def test_a_full_host_is_an_error_and_no_damage(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make()
    image = Image(path, bytes(SIZE))
    image.write(0, content(1, 65536 * 3))
    expected = bytes(image.expected)

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full)
        with pytest.raises(OSError):
            image.write(65536 * 8, content(2, 65536))
    image.expected[:] = expected
    image.finish()


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("extended_l2=on", "features that are not here"),
        ("compression_type=zstd", "features that are not here"),
        ("refcount_bits=1", "reference counts of 1 bits"),
    ],
)
def test_what_is_not_here_is_refused_in_one_line(make: Make, options: str, why: str) -> None:
    path = make(options)
    with pytest.raises(Qcow2Error, match=why):
        Image(path, b"")


def test_a_disk_too_large_for_its_refcount_table_is_read_only(make: Make) -> None:
    path = make("cluster_size=512", 1 << 30)
    with pytest.raises(Qcow2Error, match="refcount table too small"):
        Image(path, b"")
    assert Image(path, b"", read_only=True).read(1 << 29, SECTOR) == bytes(SECTOR)


class Bounded(Disk):
    """A file that may not become longer than an honest image would."""

    def extend(self, length: int) -> None:
        assert length <= 6 * SIZE
        super().extend(length)


@pytest.mark.parametrize("seed", range(60))
def test_no_image_makes_it_raise_anything_but_its_errors(make: Make, seed: int) -> None:
    """Threats 1 to 4: random damage to the metadata, then random requests."""
    rng = random.Random(seed)
    path = make(rng.choice(("cluster_size=4k", "cluster_size=512", "compat=0.10,cluster_size=4k")), 1 << 20)
    image = Image(path, bytes(1 << 20))
    play(image, seed, 15)
    image.disk.close()
    os.close(image.fd)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 30))):
        start, stop = rng.choice(((0, 112), (0, 112), (0, len(data)), (512, min(len(data), 40960))))
        at = rng.randrange(start, stop) & ~7
        data[at : at + 8] = rng.choice((
            rng.randbytes(8),
            b"\0" * 8,
            b"\xff" * 8,
            rng.randrange(1 << 24).to_bytes(8, "big"),
            (1 << 63 | rng.randrange(1 << 11) << 9).to_bytes(8, "big"),
            (1 << 62 | rng.randrange(1 << 20)).to_bytes(8, "big"),
            data[at : at + 4] + rng.randbytes(4),
        ))  # fmt: skip
    path.write_bytes(data)
    fd = os.open(path, os.O_RDWR)
    try:
        disk = Qcow2(Bounded(fd))
    except Qcow2Error:
        os.close(fd)
        return
    size = min(disk.size, 1 << 20)
    for _ in range(60):
        if not size:
            break
        offset = rng.randrange(size // SECTOR) * SECTOR
        length = min(rng.choice((1, 8, 300)) * SECTOR, size - offset)
        try:
            match rng.randrange(5):
                case 0:
                    disk.write(offset, [memoryview(bytes(length))])
                case 1:
                    disk.zero(offset, length, unmap=bool(rng.randrange(2)))
                case 2:
                    disk.discard(offset, length)
                case 3:
                    disk.flush()
                case _:
                    disk.read(offset, [memoryview(bytearray(length))])
        except OSError as e:
            assert e.errno in (errno.EIO, errno.ENOSPC), e
    os.close(fd)


@pytest.mark.parametrize(
    ("options", "old", "new"),
    [
        ("", SIZE, 3 << 30),  # six entries in the L1 table instead of one
        ("compat=0.10", SIZE, 1 << 30),
        ("cluster_size=4k", SIZE - 3 * SECTOR, SIZE),
        ("cluster_size=2M", SIZE - 3 * SECTOR, SIZE + SECTOR),
        ("refcount_bits=64", SIZE, SIZE + 3 * SECTOR),
    ],
)
def test_a_larger_disk_has_zeros_at_its_end(make: Make, options: str, old: int, new: int) -> None:
    image = Image(make(options, old), bytes(old))
    image.write(old - 4096, content(1, 4096))
    assert image.disk.size == old
    image.disk.extend(new)
    assert image.disk.size == new
    image.write(old - SECTOR, content(2, 2 * SECTOR))
    last = content(3, SECTOR)
    image.disk.write(new - SECTOR, [memoryview(last)])
    assert image.read(old + SECTOR, SECTOR) == bytes(SECTOR)
    image.disk.close()
    os.close(image.fd)
    qemu_img("check", "-f", "qcow2", image.path)
    assert json.loads(qemu_img("info", "--output=json", image.path))["virtual-size"] == new
    again = Image(image.path, b"")
    assert again.read(old - 4096, 4096 - SECTOR) == content(1, 4096)[:-SECTOR]
    assert again.read(new - SECTOR, SECTOR) == last
    os.close(again.fd)


def test_what_lay_hidden_behind_the_end_of_a_disk_is_zeros_when_it_grows(make: Make) -> None:
    image = Image(make("", SIZE), bytes(SIZE))
    image.write(SIZE - 4096, content(1, 4096))
    image.finish()
    with image.path.open("r+b") as file:
        file.seek(24)
        file.write((SIZE - 2048).to_bytes(8, "big"))
    shorter = Image(image.path, bytes(image.expected[:-2048]))
    shorter.disk.extend(SIZE)
    shorter.expected += bytes(2048)
    shorter.finish()


def test_a_disk_that_its_tables_cannot_hold_keeps_its_size(make: Make) -> None:
    image = Image(make("cluster_size=4k"), bytes(SIZE))
    with pytest.raises(OSError, match="without room in its tables: qemu-img resize"):
        image.disk.extend(1 << 40)
    image.finish()


def test_a_disk_with_snapshots_or_with_more_below_keeps_its_size(make: Make, tmp_path: Path) -> None:
    path = make()
    qemu_img("snapshot", "-c", "one", path)
    with pytest.raises(OSError, match="with snapshots keeps its size"):
        Image(path, b"").disk.extend(2 * SIZE)
    base = tmp_path / "base"
    base.write_bytes(content(1))
    path = make("", SIZE // 2, "-b", base, "-F", "raw")
    with (
        base.open("rb") as file,
        pytest.raises(OSError, match="hides a part of its backing keeps its size"),
    ):
        Image(path, b"", Disk(file.fileno())).disk.extend(SIZE)


def test_a_disk_for_reading_keeps_its_size(make: Make) -> None:
    with pytest.raises(OSError, match="read-only"):
        Image(make(), b"", read_only=True).disk.extend(2 * SIZE)


class PowerCut(Exception):
    """After this many writes."""


class Unstable:
    """A `ports.File` whose host loses power: what was written since the last flush is there or is not."""

    def __init__(self, data: bytes, writes: int) -> None:
        self._writes = writes
        self.now = bytearray(data)
        self._stable = bytes(data)
        self._since: list[tuple[int, bytes]] = []  # by sectors, because each is whole or not there

    @property
    def length(self) -> int:
        return len(self.now)

    size = length

    def read(self, offset: int, into: Sequence[memoryview]) -> None:
        for view in into:
            view[:] = self.now[offset : offset + len(view)]
            offset += len(view)

    def write(self, offset: int, data: Sequence[memoryview]) -> None:
        written = b"".join(data)
        assert offset + len(written) <= self.length
        self._writes -= 1
        if self._writes < 0:
            raise PowerCut
        self.now[offset : offset + len(written)] = written
        for at in range(offset // SECTOR * SECTOR, offset + len(written), SECTOR):
            self._since.append((at, bytes(self.now[at : at + SECTOR])))

    def flush(self) -> None:
        self._stable, self._since = bytes(self.now), []

    def discard(self, offset: int, size: int) -> None:
        self.write(offset, [memoryview(bytes(size))])

    def zero(self, offset: int, size: int, *, unmap: bool) -> None:
        self.write(offset, [memoryview(bytes(size))])

    def extend(self, length: int) -> None:
        self.now += bytes(length - self.length)

    def close(self) -> None:
        pass

    def after_power_cut(self, rng: random.Random) -> bytes:
        left = bytearray(self._stable) + bytes(self.length - len(self._stable))
        for at, data in self._since:
            if rng.random() < 0.5:
                left[at : at + SECTOR] = data
        return bytes(left)


@pytest.mark.parametrize("seed", range(24))
def test_a_power_cut_leaves_no_damage_and_what_was_flushed(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    path = make(rng.choice(("cluster_size=1k", "cluster_size=4k", "compat=0.10,cluster_size=4k", "")))
    file = Unstable(path.read_bytes(), rng.choice((20, 100, 400, 1500)))
    disk = Qcow2(file)
    flushed = bytearray(SIZE)
    touched: set[int] = set()
    with contextlib.suppress(PowerCut):
        play_until_it_ends(disk, rng, flushed, touched)
    path.write_bytes(file.after_power_cut(rng))
    done = subprocess.run(["qemu-img", "check", "-f", "qcow2", str(path)], capture_output=True, check=False)
    assert done.returncode in (0, 3), done.stdout
    fd = os.open(path, os.O_RDWR)
    found = bytearray(SIZE)
    Qcow2(Disk(fd), read_only=True).read(0, [memoryview(found)])
    os.close(fd)
    for sector in set(range(SIZE // SECTOR)) - touched:
        at = sector * SECTOR
        assert found[at : at + SECTOR] == flushed[at : at + SECTOR], sector


@pytest.mark.parametrize("seed", range(8))
def test_a_power_cut_leaves_the_old_size_or_the_new_one(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    old, new = SIZE - SECTOR, 3 << 30
    image = Image(make("", old), bytes(old))
    image.write(old - 4096, content(1, 4096))
    image.finish()
    file = Unstable(image.path.read_bytes(), seed // 2)
    with contextlib.suppress(PowerCut):
        Qcow2(file).extend(new)
    image.path.write_bytes(file.after_power_cut(rng))
    after = Image(image.path, bytes(image.expected))
    assert after.disk.size in (old, new)
    after.expected += bytes(min(SIZE, after.disk.size) - old)
    assert after.read(0, len(after.expected)) == after.expected
    os.close(after.fd)
    qemu_img("check", "-f", "qcow2", image.path)


def play_until_it_ends(disk: Qcow2, rng: random.Random, flushed: bytearray, touched: set[int]) -> None:
    """Random requests; `flushed` is what the last flush found, `touched` the sectors written since."""
    while True:
        offset = rng.randrange(SIZE // SECTOR) * SECTOR
        length = min(rng.choice((1, 8, 40, 2000)) * SECTOR, SIZE - offset)
        sectors = range(offset // SECTOR, (offset + length) // SECTOR)
        touched.update(sectors)
        match rng.randrange(5):
            case 0 | 1:
                disk.write(offset, [memoryview(rng.randbytes(length))])
            case 2:
                disk.zero(offset, length, unmap=True)
            case 3:
                disk.discard(offset, length)
            case _:
                disk.flush()
                disk.read(0, [memoryview(flushed)])
                touched.clear()
