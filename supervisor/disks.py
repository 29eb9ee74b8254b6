"""Opens the images of the guest's disks: locked, and only as what the user says they are.

The lock is an open file description's (fcntl_locking(2), F_OFD_SETLK) on the whole file: it is the device
process's too and lasts as long as either holds the image, QEMU's tools see it, and it works over NFS.
Nothing of an image is guessed: a guest writes what it likes into a raw image, and the next start would take
it for another format, and open the files that this names.  What a qcow2 image is based on is opened only if
the user names it.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from contextlib import ExitStack
from struct import Struct

from devproc.record import record
from kvmcore.errors import ConfigError
from supervisor.config import BlockConfig
from supervisor.host import Host, Opened

SECTOR = 512
_BLOCK = 4096  # what O_DIRECT is sure to take
_FLOCK = Struct("hhqqi0q")  # struct flock, <bits/fcntl.h>
_QCOW2_MAGIC = b"QFI\xfb"
# docs/interop/qcow2.txt: magic, version, backing_file_offset, backing_file_size, cluster_bits, size
_QCOW2 = Struct(">4sIQIIQ")
_QCOW2_SPARE_CLUSTERS = 4096  # for tables, and what is freed and not yet used again


@record
class _Image:
    """An open image: `size` bytes of it, `virtual` of the disk in it, `most` that it may grow to."""

    fd: int
    size: int
    virtual: int
    most: int
    based: bool = False
    cluster_size: int = 0


def open_disk(disk: BlockConfig, host: Host) -> Opened:
    """The image of `disk`, and what it is based on.

    Raises:
        ConfigError: it is no image, cannot be opened or locked, or is not what was said of it.
    """
    where = f"--block {disk.path}"
    # O_EXCL, without O_CREAT, is about block devices: busy if it is mounted or a part of another (open(2)).
    flags = (os.O_RDONLY if disk.ro else os.O_RDWR | os.O_EXCL) | (os.O_DIRECT if disk.direct else 0)
    image = _open(where, disk.path, flags, disk.format, host.undo, disk.max_size)
    if disk.direct and (image.size % _BLOCK or image.cluster_size % _BLOCK):
        raise ConfigError(f"{where}: {image.size} bytes, expected a multiple of {_BLOCK} for direct")
    if image.virtual < SECTOR:
        raise ConfigError(f"{where}: {image.virtual} bytes, expected at least a sector of {SECTOR}")
    if image.virtual % disk.block_size:
        if disk.block_size > SECTOR:
            raise ConfigError(
                f"{where}: {image.virtual} bytes, expected a multiple of {disk.block_size} for block-size"
            )
        host.tell(f"{where}: the guest does not see the last {image.virtual % SECTOR} bytes, no whole sector")
    return Opened(
        {"disk": (image.fd,), "backing": (_open_backing(where, disk, image, host.undo),)}, (image.most,)
    )


def check_size(disk: BlockConfig, size: object) -> str | None:
    """Why `disk` cannot be given `size` bytes while a guest uses it, as far as can be known here."""
    if type(size) is not int:
        return f"expected bytes, not {size!r:.40}"
    unit = max(disk.block_size, _BLOCK if disk.direct else 0)
    if size <= 0 or size % unit:
        return f"expected a multiple of {unit} bytes, not {size}"
    if size > disk.max_size:
        return f"expected at most its max-size= of {disk.max_size} bytes, not {size}"
    return None


def _open_backing(where: str, disk: BlockConfig, image: _Image, undo: ExitStack) -> int:
    if image.based and disk.backing is None:
        raise ConfigError(f"{where}: it is based on another image: name that with backing=")
    if disk.backing is None:
        nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        undo.callback(os.close, nothing)
        return nothing
    if not image.based:
        raise ConfigError(f"{where}: backing={disk.backing}: it is not based on another image")
    where = f"--block {disk.path}: backing={disk.backing}"
    base = _open(where, disk.backing, os.O_RDONLY, disk.backing_format, undo)
    if base.based:
        raise ConfigError(f"{where}: it is itself based on another image: qemu-img rebase or convert it")
    return base.fd


def _open(
    where: str, path: str, flags: int, format: str | None, undo: ExitStack, max_size: int = 0
) -> _Image:
    """Raises ConfigError."""
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError(f"{where}: expected a file or a block device")
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOCTTY)
        undo.callback(os.close, fd)
        _lock(fd, fcntl.F_WRLCK if flags & os.O_RDWR else fcntl.F_RDLCK)
        size = os.lseek(fd, 0, os.SEEK_END)
        start = _start(fd)
    except OSError as e:
        raise ConfigError(f"{where}: {_why(e, flags)}") from None
    is_qcow2 = start.startswith(_QCOW2_MAGIC)
    if format is None and is_qcow2:
        raise ConfigError(f"{where}: it looks like qcow2: say format=qcow2, or format=raw if it is not")
    if format != "qcow2":
        return _Image(fd, size, size, max(size, max_size))
    if not is_qcow2 or len(start) < _QCOW2.size:
        raise ConfigError(f"{where}: not a qcow2 image")
    _, _, backing_offset, _, cluster_bits, virtual = _QCOW2.unpack_from(start)
    if not 9 <= cluster_bits <= 21 or virtual >> 60:
        raise ConfigError(f"{where}: not a qcow2 image that makes sense")
    whole = max(virtual, max_size)
    most = size + whole + whole // 8 + (_QCOW2_SPARE_CLUSTERS << cluster_bits)
    return _Image(fd, size, virtual, most, bool(backing_offset), 1 << cluster_bits)


def _lock(fd: int, kind: int) -> None:
    """Lock all of it, or raise OSError; EAGAIN: somebody else has."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))


def _start(fd: int) -> bytes:
    """Its first bytes, read as O_DIRECT wants it."""
    with mmap.mmap(-1, _BLOCK) as page:
        return page[: os.preadv(fd, [page], 0)]


def _why(e: OSError, flags: int) -> str:
    match e.errno:
        case errno.EAGAIN:
            return "another program uses it"
        case errno.EBUSY:
            return "the host uses it: it is mounted, or part of another device"
        case errno.EINVAL if flags & os.O_DIRECT:
            return "direct: its file system has no direct I/O"
    return e.strerror or str(e)
