"""Images as the supervisor opens them: real files, real locks, and what is refused."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kvmcore.errors import ConfigError
from supervisor.config import BlockConfig
from supervisor.disks import check_size, open_disk
from supervisor.host import Host, Opened
from supervisor.janitor import Janitor


class Opener:
    """Opens disks on one host, and gives back what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.undo = ExitStack()
        self.janitor = Janitor.start()
        self.host = Host(self.undo, self.janitor, self.said.append)

    def __call__(self, path: Path | str, **keys: Any) -> Opened:
        return open_disk(BlockConfig(str(path), **keys), self.host)

    def close(self) -> None:
        self.undo.close()
        self.janitor.finish()


@pytest.fixture
def opens() -> Iterator[Opener]:
    opener = Opener()
    yield opener
    opener.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


def flags(opened: Opened) -> int:
    (fd,) = opened.fds["disk"]
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def test_an_image_comes_with_the_size_it_may_have(opens: Opener, image: Path) -> None:
    opened = opens(image)
    assert opened.params == (1 << 20,)
    assert flags(opened) & os.O_ACCMODE == os.O_RDWR


def test_an_image_may_become_as_large_as_its_max_size(opens: Opener, image: Path) -> None:
    assert opens(image, max_size=5 << 20).params == (5 << 20,)
    smaller = image.with_name("smaller")
    smaller.write_bytes(bytes(1 << 20))
    assert opens(smaller, max_size=512).params == (1 << 20,)


@pytest.mark.parametrize(
    ("size", "keys", "why"),
    [
        (4 << 20, {}, None),
        ((4 << 20) + 512, {}, "at most its max-size= of 4194304 bytes, not 4194816"),
        (4097, {}, "a multiple of 512 bytes, not 4097"),
        (512, {"block_size": 4096}, "a multiple of 4096 bytes"),
        (512, {"direct": True}, "a multiple of 4096 bytes"),
        (0, {}, "a multiple of 512 bytes, not 0"),
        (-512, {}, "a multiple of 512 bytes"),
        ("4M", {}, "expected bytes, not '4M'"),
        (True, {}, "expected bytes"),
    ],
)
def test_sizes_that_a_disk_cannot_have_are_refused(size: object, keys: Any, why: str | None) -> None:
    said = check_size(BlockConfig("disk", max_size=4 << 20, **keys), size)
    assert said is None if why is None else said is not None and why in said


def test_a_disk_without_max_size_keeps_its_size() -> None:
    assert check_size(BlockConfig("disk"), 512) == "expected at most its max-size= of 0 bytes, not 512"


def test_a_read_only_image_is_opened_for_reading(opens: Opener, image: Path) -> None:
    image.chmod(0o400)
    assert flags(opens(image, ro=True)) & os.O_ACCMODE == os.O_RDONLY


def test_direct_is_a_flag_of_the_descriptor(opens: Opener, image: Path) -> None:
    try:
        opened = opens(image, direct=True)
    except ConfigError as e:
        assert "no direct I/O" in str(e)
        pytest.skip(str(e))
    assert flags(opened) & os.O_DIRECT


def test_an_image_is_written_by_one_program_at_a_time(opens: Opener, image: Path) -> None:
    opens(image)
    for ro in (False, True):
        with pytest.raises(ConfigError, match=f"^--block {image}: another program uses it$"):
            opens(image, ro=ro)


def test_an_image_is_read_by_many_and_then_written_by_none(opens: Opener, image: Path) -> None:
    opens(image, ro=True)
    opens(image, ro=True)
    with pytest.raises(ConfigError, match="another program uses it"):
        opens(image)


def test_the_lock_is_gone_with_the_vm(opens: Opener, image: Path) -> None:
    opens(image)
    opens.undo.close()
    opens(image)


@pytest.mark.skipif(shutil.which("qemu-io") is None, reason="qemu-io (Debian: qemu-utils) is not installed")
def test_qemu_sees_the_lock_and_its_own_is_seen(opens: Opener, image: Path) -> None:
    opens(image)
    resize = ["qemu-img", "resize", "-q", "-f", "raw", str(image), "2M"]
    assert subprocess.run(resize, capture_output=True, check=False).returncode
    opens.undo.close()
    with subprocess.Popen(
        ["qemu-io", "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as qemu:
        assert qemu.stdin is not None and qemu.stdout is not None
        qemu.stdin.write(b"length\n")
        qemu.stdin.flush()
        while b"1 MiB" not in qemu.stdout.readline():
            pass
        with pytest.raises(ConfigError, match="another program uses it"):
            opens(image)
        qemu.stdin.close()


def test_a_qcow2_image_is_never_taken_for_a_raw_one_by_accident(opens: Opener, image: Path) -> None:
    image.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(4096 - 8))
    with pytest.raises(ConfigError, match="it looks like qcow2"):
        opens(image)
    opens.undo.close()
    assert opens(image, format="raw").params == (4096,)


@pytest.mark.parametrize(
    ("size", "keys", "why"),
    [
        (0, {}, "0 bytes, expected at least a sector"),
        (511, {}, "511 bytes, expected at least a sector"),
        (4096 + 512, {"block_size": 4096}, "expected a multiple of 4096 for block-size"),
        (4096 + 512, {"direct": True}, "expected a multiple of 4096 for direct|no direct I/O"),
    ],
)
def test_images_of_a_size_that_cannot_be_are_refused(
    opens: Opener, image: Path, size: int, keys: Any, why: str
) -> None:
    os.truncate(image, size)
    with pytest.raises(ConfigError, match=f"^--block {image}: .*({why})"):
        opens(image, **keys)


def test_the_user_is_told_of_bytes_that_the_guest_does_not_see(opens: Opener, image: Path) -> None:
    os.truncate(image, 4096 + 100)
    opens(image)
    assert "last 100 bytes" in opens.said[0]


@pytest.mark.parametrize("what", ["missing", "directory", "fifo", "socket"])
def test_what_is_no_image_is_refused_in_one_line(opens: Opener, tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        os.mknod(path, 0o140600)
    with pytest.raises(
        ConfigError, match=f"^--block {path}: (No such file|expected a file or a block device)"
    ):
        opens(path)


@pytest.fixture
def qcow2(tmp_path: Path) -> Path:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img (Debian: qemu-utils) is not installed")
    path = tmp_path / "image.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "64M"], check=True)
    return path


def based(path: Path, on: Path, format: str) -> Path:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(on), "-F", format, str(path)]
    subprocess.run(command, check=True)
    return path


def test_a_qcow2_image_may_grow_to_hold_its_whole_disk(opens: Opener, qcow2: Path) -> None:
    (most,) = opens(qcow2, format="qcow2").params
    assert isinstance(most, int)
    assert 64 << 20 < most < 1 << 30


def test_what_an_image_is_based_on_is_opened_only_if_it_is_named(
    opens: Opener, qcow2: Path, image: Path, tmp_path: Path
) -> None:
    path = based(tmp_path / "top.qcow2", image, "raw")
    with pytest.raises(ConfigError, match="it is based on another image: name that with backing="):
        opens(path, format="qcow2")
    opens.undo.close()
    (fd,) = opens(path, format="qcow2", backing=str(image)).fds["backing"]
    assert os.path.sameopenfile(fd, fd) and os.fstat(fd).st_ino == image.stat().st_ino
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    opens(qcow2, format="qcow2")
    with pytest.raises(ConfigError, match="it is not based on another image"):
        opens.undo.close()
        opens(qcow2, format="qcow2", backing=str(image))


def test_an_image_is_based_on_one_other_and_no_more(
    opens: Opener, qcow2: Path, image: Path, tmp_path: Path
) -> None:
    middle = based(tmp_path / "middle.qcow2", image, "raw")
    top = based(tmp_path / "top.qcow2", middle, "qcow2")
    with pytest.raises(ConfigError, match="it looks like qcow2"):
        opens(top, format="qcow2", backing=str(middle))
    opens.undo.close()
    with pytest.raises(ConfigError, match="itself based on another image"):
        opens(top, format="qcow2", backing=str(middle), backing_format="qcow2")


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"", "expected a qcow2|not a qcow2 image"),
        (b"QFI\xfb" + bytes(508), "makes sense"),
        (b"QFI\xfb" + b"\xff" * 508, "makes sense"),
        (bytes(512), "not a qcow2 image"),
    ],
)
def test_what_is_no_qcow2_image_is_refused(opens: Opener, image: Path, header: bytes, why: str) -> None:
    image.write_bytes(header)
    with pytest.raises(ConfigError, match=why):
        opens(image, format="qcow2")
