"""Opens the images of the guest's disks: locked, and only as what the user says they are.

The lock is an open file description's (fcntl_locking(2), F_OFD_SETLK) on the whole file: it is the device
process's too and lasts as long as either holds the image, QEMU's tools see it, and it works over NFS.
Nothing of an image is guessed: a guest writes what it likes into a raw image, and the next start would take
it for another format, and open the files that this names.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
import struct

from kvmcore.errors import ConfigError
from supervisor.config import BlockConfig
from supervisor.host import Host, Opened

_SECTOR = 512
_DIRECT_ALIGNMENT = 4096
_QCOW2 = b"QFI\xfb"
_FLOCK = struct.Struct("hhqqi0q")  # struct flock, <bits/fcntl.h>


def open_disk(disk: BlockConfig, host: Host) -> Opened:
    """The image of `disk`.

    Raises:
        ConfigError: it is no image, cannot be opened or locked, or is not what was said of it.
    """
    where = f"--block {disk.path}"
    try:
        mode = os.stat(disk.path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ConfigError(f"{where}: expected a file or a block device")
        fd = os.open(disk.path, _flags(disk))
    except OSError as e:
        raise ConfigError(f"{where}: {_why(e, disk)}") from None
    host.undo.callback(os.close, fd)
    try:
        _lock(fd, fcntl.F_RDLCK if disk.ro else fcntl.F_WRLCK)
        size = os.lseek(fd, 0, os.SEEK_END)
        start = _start(fd)
    except OSError as e:
        raise ConfigError(f"{where}: {_why(e, disk)}") from None
    if disk.format is None and start.startswith(_QCOW2):
        raise ConfigError(f"{where}: a qcow2 image: say format=raw if the guest is to see it as it is")
    unit = max(disk.block_size, _DIRECT_ALIGNMENT if disk.direct else 0)
    if unit > _SECTOR and size % unit:
        why = "block-size" if unit == disk.block_size else "direct"
        raise ConfigError(f"{where}: {size} bytes, expected a multiple of {unit} for {why}")
    if size < _SECTOR:
        raise ConfigError(f"{where}: {size} bytes, expected at least a sector of {_SECTOR}")
    if size % _SECTOR:
        host.tell(
            f"{where}: the guest does not see the last {size % _SECTOR} bytes: they are no whole sector"
        )
    return Opened({"disk": (fd,)}, (size,))


def _flags(disk: BlockConfig) -> int:
    # O_EXCL, without O_CREAT, is about block devices: busy if it is mounted or a part of another (open(2)).
    access = os.O_RDONLY if disk.ro else os.O_RDWR | os.O_EXCL
    return access | (os.O_DIRECT if disk.direct else 0) | os.O_CLOEXEC | os.O_NOCTTY


def _lock(fd: int, kind: int) -> None:
    """Lock all of it, or raise OSError; BlockingIOError: somebody else has."""
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))


def _start(fd: int) -> bytes:
    """Its first bytes, read as O_DIRECT wants it."""
    with mmap.mmap(-1, _DIRECT_ALIGNMENT) as page:
        return page[: os.preadv(fd, [page], 0)]


def _why(e: OSError, disk: BlockConfig) -> str:
    match e.errno:
        case errno.EAGAIN:
            return "another program uses it"
        case errno.EBUSY:
            return "the host uses it: it is mounted, or part of another device"
        case errno.EINVAL if disk.direct:
            return "direct: its file system has no direct I/O"
    return e.strerror or str(e)
