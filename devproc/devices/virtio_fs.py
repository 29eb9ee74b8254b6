"""A directory of the host, which the guest mounts by its tag (virtio 1.2, section 5.11; devproc/fuse.py).

The guest's root user owns what the device's own user owns on the host, and everything else is nobody's; no
owner can be changed.  Requests are served one after the other, each before the next is looked at, so nothing
is in flight between two calls.  Left out: DAX and notifications; extended attributes, POSIX and flock locks,
ACCESS and FLUSH, which are answered by ENOSYS: the driver then does without, keeps locks itself, and checks
permissions itself, by the modes that it is told; and nodes and open files across save and restore, of which
the guest sees ESTALE and looks up again.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable, Mapping
from struct import Struct
from typing import Any, Final

from devproc import fuse, state
from devproc.backends.directory import Directory, Node
from devproc.catalog import FS
from devproc.fuse import Attributes, Header, Opcode, Refused
from devproc.record import record
from devproc.regs import Register
from devproc.syscalls import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    UTIME_NOW,
    UTIME_OMIT,
    Stat,
)
from devproc.virtio.chain import Chain, part
from devproc.virtio.device import BATCH, TransportState, VirtioDevice, virtio_tables

TAG_SIZE: Final = 36
DATA_MAX: Final = 1 << 20
VALID_S: Final = 1
"""How long the guest may go on with what it knows of a file before it asks again."""
NOBODY: Final = 65534

_PAGES_MAX: Final = DATA_MAX // 4096
_DATA_MAX_WITHOUT_PAGES: Final = 32 * 4096  # FUSE_DEFAULT_MAX_PAGES_PER_REQ
_ARGUMENTS_MAX: Final = 1 << 14  # two names, or a name and a target, and what is before them
_FORGETS_SIZE_MAX: Final = 8 + 16 * fuse.FORGETS_MAX
_ENTRIES_MAX: Final = 1 << 16  # bytes of a directory's entries in one reply
_DIRENT64_MAX: Final = 280
_TURN: Final = 1 << 22  # bytes before accesses and other queues get their turn
_FEATURES: Final = (
    fuse.ASYNC_READ
    | fuse.ATOMIC_O_TRUNC
    | fuse.BIG_WRITES
    | fuse.AUTO_INVAL_DATA
    | fuse.DO_READDIRPLUS
    | fuse.READDIRPLUS_AUTO
    | fuse.PARALLEL_DIROPS
    | fuse.MAX_PAGES
    | fuse.CACHE_SYMLINKS
)
_O_ACCMODE, _O_TRUNC = 0o3, 0o1000  # <asm-generic/fcntl.h>, the guest's and the host's
_SEEK_DATA, _SEEK_HOLE = 3, 4
_FALLOCATE_MODES: Final = frozenset((
    0,
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_ZERO_RANGE,
    FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
))  # fmt: skip
_TIMES: Final = Struct("=4Q")  # two struct timespec
_CHANGING: Final = frozenset((
    Opcode.SETATTR, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME,
    Opcode.RENAME2, Opcode.LINK, Opcode.CREATE, Opcode.WRITE, Opcode.FALLOCATE,
))  # fmt: skip
_ATTR_ROOM, _OPEN_ROOM = 104, 16
_ROOM: Final[Mapping[int, int]] = {
    Opcode.INIT: 64,
    **dict.fromkeys((Opcode.GETATTR, Opcode.SETATTR), _ATTR_ROOM),
    **dict.fromkeys(
        (Opcode.LOOKUP, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.LINK), fuse.ENTRY_SIZE
    ),
    **dict.fromkeys((Opcode.OPEN, Opcode.OPENDIR), _OPEN_ROOM),
    Opcode.CREATE: fuse.ENTRY_SIZE + _OPEN_ROOM,
    Opcode.WRITE: 8,
    Opcode.LSEEK: 8,
    Opcode.STATFS: 80,
}
"""How long the replies are that have a length of their own."""


@record
class FsState:
    transport: TransportState
    started: bool


class VirtioFs(VirtioDevice):
    """One directory.

    Ports:
        directory: the directory.
        tag: its name for the guest, up to 36 bytes.
        read_only: nothing can be changed.

    Threats:
        1. A name that is a path, "." or "..", empty, too long or has a NUL → refused before the host sees it.
        2. A symbolic link, the guest's or the host's, to a place outside → never followed; nor is a path that
           leads over one.
        3. A node or handle that is stale, made up or of another file → ESTALE, EBADF.
        4. The host moves a directory away, or puts another in its place, while it is in use → ESTALE.
        5. More look-ups are forgotten than there were, or a directory before what is in it → nodes are kept
           as long as they are needed, and no longer.
        6. Nodes or open files without end → ENFILE at NODES_MAX and FILES_MAX.
        7. A device, FIFO or socket → is neither made nor opened.
        8. Set-user-ID and set-group-ID bits, other owners → never set.
        9. A change of what is shared read-only → EROFS, whatever the host would have said.
        10. A chain without room for the headers → needs reset; too little room for the reply → EINVAL, and
            nothing was done.
        11. Lengths that are wrong, arguments that are cut short or not terminated → EINVAL.
        12. Offsets and sizes that overflow, times that are none → EINVAL; a transfer is of DATA_MAX at most.
        13. A request before INIT → EIO; another INIT → a new session; an unknown one → ENOSYS.
        14. Requests without end → 64 or 4 MiB of them in turn, accesses in between.
        15. Request or names change while we look → they are copied once.
        16. A path that leads to another mount → EXDEV.
    """

    VIRTIO = FS
    TABLES = virtio_tables(
        FS,
        (
            Register("tag", 0, "RO", "name to mount by, padded with NUL", "5.11.4", size=TAG_SIZE),
            Register(
                "num_request_queues", 36, "RO", "request queues", "5.11.4", size=4,
                reset=len(FS.queue_sizes) - 1, stored=True,
            ),
        ),
    )  # fmt: skip

    def __init__(self, *, directory: Directory, tag: bytes, read_only: int, **transport: Any) -> None:
        super().__init__(**transport)
        self._directory: Final = directory
        self._tag: Final = int.from_bytes(tag, "little")
        self._read_only: Final = bool(read_only)
        self._started = False
        self._handlers: Final[dict[int, Callable[[Header, Chain], bytes | int]]] = {
            Opcode.INIT: self._init,
            Opcode.DESTROY: self._destroy,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.READLINK: self._readlink,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._remove,
            Opcode.RMDIR: self._remove,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename,
            Opcode.LINK: self._link,
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.STATFS: self._statfs,
            Opcode.RELEASE: self._release,
            Opcode.FSYNC: self._fsync,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdir,
            Opcode.RELEASEDIR: self._release,
            Opcode.FSYNCDIR: self._fsync,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
        }
        self._counts |= dict.fromkeys(("requests", "errors", "bytes_read", "bytes_written"), 0)

    def read_tag(self) -> int:
        return self._tag

    # -- queues

    def on_reset(self) -> None:
        self._end()

    def on_queue(self, index: int) -> None:
        left = _TURN
        while left > 0:
            chain = self.pop(index)
            if chain is None:
                break
            self._serve(index, chain)
            left -= max(chain.read_size + chain.write_size, _TURN // BATCH)
        else:
            self.go_on(index)
        self.notify(index)

    def _serve(self, index: int, chain: Chain) -> None:
        if chain.read_size < fuse.IN_HEADER.size:
            self.fail(f"queue {index}: a request of {chain.read_size} bytes")
            return
        header = fuse.header(self.memory.copy_out(chain.readable, fuse.IN_HEADER.size))
        self._counts["requests"] += 1
        if header.opcode in fuse.SILENT:
            self._forget(header, chain)
            self.push(index, chain, 0)
            return
        if chain.write_size < fuse.OUT_HEADER.size:
            self.fail(f"queue {index}: a request with no room for its reply")
            return
        error, body = 0, b""
        size = 0
        try:
            done = self._answer(header, chain)
            if isinstance(done, int):
                size = done
            else:
                body, size = done, len(done)
        except (Refused, OSError) as e:
            error = e.errno or errno.EIO
            self._counts["errors"] += 1
        size += fuse.OUT_HEADER.size
        self.memory.copy_in(chain.writable, fuse.OUT_HEADER.pack(size, -error, header.unique) + body)
        self.push(index, chain, size)

    def _answer(self, header: Header, chain: Chain) -> bytes | int:
        """The reply after its header, or how much of it is in place already; raises Refused, OSError."""
        opcode = header.opcode
        if header.size != chain.read_size:
            raise Refused(errno.EINVAL)
        if not self._started and opcode != Opcode.INIT:
            raise Refused(errno.EIO)
        handler = self._handlers.get(opcode)
        if handler is None:
            raise Refused(errno.ENOSYS)
        if self._room(chain) < _ROOM.get(opcode, 0):
            raise Refused(errno.EINVAL)
        if self._read_only and opcode in _CHANGING:
            raise Refused(errno.EROFS)
        return handler(header, chain)

    def _room(self, chain: Chain) -> int:
        return chain.write_size - fuse.OUT_HEADER.size

    def _arguments(self, chain: Chain, limit: int = _ARGUMENTS_MAX) -> bytes:
        """What follows the header, copied once."""
        if chain.read_size - fuse.IN_HEADER.size > limit:
            raise Refused(errno.EINVAL)
        return self.memory.copy_out(part(chain.readable, fuse.IN_HEADER.size, limit), limit)

    # -- the session

    def _init(self, _header: Header, chain: Chain) -> bytes:
        asked = fuse.init(self._arguments(chain))
        if (asked.major, asked.minor) < (fuse.MAJOR, fuse.MINOR):
            raise Refused(errno.EPROTO)
        self._end()
        self._started = asked.major == fuse.MAJOR  # a later one asks again, in our version
        flags = asked.flags & _FEATURES
        most = DATA_MAX if flags & fuse.MAX_PAGES else _DATA_MAX_WITHOUT_PAGES
        return fuse.init_out(min(asked.max_readahead, DATA_MAX), flags, most, _PAGES_MAX)

    def _destroy(self, _header: Header, _chain: Chain) -> bytes:
        self._end()
        return b""

    def _end(self) -> None:
        self._started = False
        self._directory.forget_all()

    def _forget(self, header: Header, chain: Chain) -> None:
        if header.opcode == Opcode.INTERRUPT or not self._started:
            return  # nothing waits that could be interrupted
        try:
            data = self._arguments(chain, _FORGETS_SIZE_MAX)
            for nodeid, lookups in fuse.forgets(header.opcode, header.nodeid, data):
                self._directory.forget(nodeid, lookups)
        except Refused:
            self._counts["errors"] += 1

    # -- nodes

    def _node(self, header: Header) -> Node:
        return self._directory.node(header.nodeid)

    def _attributes(self, found: Stat) -> Attributes:
        return Attributes(
            ino=found.ino,
            size=found.size,
            blocks=found.blocks,
            atime_ns=found.atime_ns,
            mtime_ns=found.mtime_ns,
            ctime_ns=found.ctime_ns,
            mode=found.mode,
            nlink=found.nlink,
            uid=0 if found.uid == self._directory.uid else NOBODY,
            gid=0 if found.gid == self._directory.gid else NOBODY,
            blksize=found.blksize,
        )

    def _entry(self, node: Node, found: Stat) -> bytes:
        return fuse.entry_out(node.id, self._attributes(found), VALID_S)

    def _attr(self, node: Node) -> bytes:
        return fuse.attr_out(self._attributes(self._directory.stat(node)), VALID_S)

    def _lookup(self, header: Header, chain: Chain) -> bytes:
        name = fuse.name(self._arguments(chain))
        return self._entry(*self._directory.lookup(self._node(header), name))

    def _getattr(self, header: Header, chain: Chain) -> bytes:
        handle = fuse.getattr_fh(self._arguments(chain))
        node = self._node(header)
        if handle is not None:
            self._directory.file(handle, node)
        return self._attr(node)

    def _setattr(self, header: Header, chain: Chain) -> bytes:
        asked = fuse.setattr(self._arguments(chain))
        node, directory = self._node(header), self._directory
        file = None if asked.fh is None else directory.file(asked.fh, node)
        times = self._times(asked)
        if asked.valid & (fuse.FATTR_UID | fuse.FATTR_GID):
            now = self._attributes(directory.stat(node))
            if (asked.valid & fuse.FATTR_UID and asked.uid != now.uid) or (
                asked.valid & fuse.FATTR_GID and asked.gid != now.gid
            ):
                raise Refused(errno.EPERM)
        if asked.valid & fuse.FATTR_MODE:
            directory.chmod(node, asked.mode)
        if asked.valid & fuse.FATTR_SIZE:
            if file is None:
                directory.truncate(node, asked.size)
            else:
                directory.resize(file, asked.size)
        if times is not None:
            directory.set_times(node, times)
        return self._attr(node)

    def _times(self, asked: fuse.SetAttr) -> bytes | None:
        """As utimensat(2) has them; None if they stay as they are."""
        if not asked.valid & (fuse.FATTR_ATIME | fuse.FATTR_MTIME):
            return None
        times: list[int] = []
        for given, now, (s, ns) in (
            (fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, asked.atime),
            (fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, asked.mtime),
        ):
            if not asked.valid & given:
                times += (0, UTIME_OMIT)
            elif asked.valid & now:
                times += (0, UTIME_NOW)
            elif ns >= 10**9:
                raise Refused(errno.EINVAL)
            else:
                times += (s, ns)
        return _TIMES.pack(*times)

    def _readlink(self, header: Header, chain: Chain) -> bytes:
        node = self._node(header)
        if node.kind != stat.S_IFLNK:
            raise Refused(errno.EINVAL)
        target = self._directory.readlink(node)
        if len(target) > self._room(chain):
            raise Refused(errno.ENAMETOOLONG)
        return target

    def _statfs(self, header: Header, chain: Chain) -> bytes:
        s = self._directory.statfs(self._node(header))
        return fuse.statfs_out(
            s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_bsize, s.f_namemax, s.f_frsize
        )

    # -- the tree

    def _symlink(self, header: Header, chain: Chain) -> bytes:
        name, target = fuse.symlink(self._arguments(chain))
        parent = self._node(header)
        self._directory.make_symlink(parent, name, target)
        return self._entry(*self._directory.lookup(parent, name))

    def _mknod(self, header: Header, chain: Chain) -> bytes:
        asked = fuse.mknod(self._arguments(chain))
        if stat.S_IFMT(asked.mode) not in (0, stat.S_IFREG):
            raise Refused(errno.EPERM)
        parent = self._node(header)
        self._directory.make_file(parent, asked.name, asked.mode)
        return self._entry(*self._directory.lookup(parent, asked.name))

    def _mkdir(self, header: Header, chain: Chain) -> bytes:
        asked = fuse.mkdir(self._arguments(chain))
        parent = self._node(header)
        self._directory.make_directory(parent, asked.name, asked.mode)
        return self._entry(*self._directory.lookup(parent, asked.name))

    def _remove(self, header: Header, chain: Chain) -> bytes:
        name = fuse.name(self._arguments(chain))
        self._directory.remove(self._node(header), name, directory=header.opcode == Opcode.RMDIR)
        return b""

    def _rename(self, header: Header, chain: Chain) -> bytes:
        asked = fuse.rename(header.opcode, self._arguments(chain))
        if asked.flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
            raise Refused(errno.EINVAL)
        parent, to_parent = self._node(header), self._directory.node(asked.newdir)
        self._directory.rename(parent, asked.name, to_parent, asked.to_name, asked.flags)
        return b""

    def _link(self, header: Header, chain: Chain) -> bytes:
        nodeid, name = fuse.link(self._arguments(chain))
        parent = self._node(header)
        self._directory.link(self._directory.node(nodeid), parent, name)
        return self._entry(*self._directory.lookup(parent, name))

    # -- open files

    def _open(self, header: Header, chain: Chain) -> bytes:
        flags = fuse.open_flags(self._arguments(chain))
        if self._read_only and flags & (_O_ACCMODE | _O_TRUNC):
            raise Refused(errno.EROFS)
        return fuse.open_out(self._directory.open(self._node(header), flags))

    def _create(self, header: Header, chain: Chain) -> bytes:
        asked = fuse.create(self._arguments(chain))
        node, found, handle = self._directory.create(self._node(header), asked.name, asked.flags, asked.mode)
        return self._entry(node, found) + fuse.open_out(handle)

    def _release(self, _header: Header, chain: Chain) -> bytes:
        self._directory.close(fuse.release(self._arguments(chain)))
        return b""

    def _read(self, header: Header, chain: Chain) -> int:
        asked = fuse.transfer(self._arguments(chain))
        file = self._directory.file(asked.fh, self._node(header))
        size = min(asked.size, self._room(chain), DATA_MAX)
        views = self.memory.views(part(chain.writable, fuse.OUT_HEADER.size, size))
        done = self._directory.read(file, asked.offset, views)
        self._counts["bytes_read"] += done
        return done

    def _write(self, header: Header, chain: Chain) -> bytes:
        at = fuse.IN_HEADER.size
        arguments = self.memory.copy_out(part(chain.readable, at, fuse.TRANSFER_SIZE), fuse.TRANSFER_SIZE)
        asked = fuse.transfer(arguments)
        if asked.size != chain.read_size - at - fuse.TRANSFER_SIZE or asked.size > DATA_MAX:
            raise Refused(errno.EINVAL)
        file = self._directory.file(asked.fh, self._node(header))
        views = self.memory.views(part(chain.readable, at + fuse.TRANSFER_SIZE, asked.size))
        done = self._directory.write(file, asked.offset, views)
        self._counts["bytes_written"] += done
        return fuse.write_out(done)

    def _fsync(self, header: Header, chain: Chain) -> bytes:
        handle = fuse.fsync(self._arguments(chain))
        in_directory = header.opcode == Opcode.FSYNCDIR
        self._directory.fsync(self._directory.file(handle, self._node(header), directory=in_directory))
        return b""

    def _fallocate(self, header: Header, chain: Chain) -> bytes:
        asked = fuse.fallocate(self._arguments(chain))
        if asked.mode not in _FALLOCATE_MODES:
            raise Refused(errno.EOPNOTSUPP)
        file = self._directory.file(asked.fh, self._node(header))
        self._directory.allocate(file, asked.mode, asked.offset, asked.size)
        return b""

    def _lseek(self, header: Header, chain: Chain) -> bytes:
        asked = fuse.lseek(self._arguments(chain))
        if asked.whence not in (_SEEK_DATA, _SEEK_HOLE):
            raise Refused(errno.EINVAL)
        file = self._directory.file(asked.fh, self._node(header))
        return fuse.lseek_out(self._directory.seek(file, asked.offset, asked.whence))

    # -- directories

    def _opendir(self, header: Header, _chain: Chain) -> bytes:
        return fuse.open_out(self._directory.open_directory(self._node(header)))

    def _readdir(self, header: Header, chain: Chain) -> bytes:
        asked = fuse.transfer(self._arguments(chain))
        node, directory = self._node(header), self._directory
        file = directory.file(asked.fh, node, directory=True)
        plus = fuse.ENTRY_SIZE if header.opcode == Opcode.READDIRPLUS else 0
        room = min(asked.size, self._room(chain), _ENTRIES_MAX)
        # The host's entries are smaller than ours: what does not fit would be read again.
        entries = directory.entries(file, asked.offset, max(room // (4 if plus else 1), _DIRENT64_MAX))
        fitting, size = [], 0
        for entry in entries:
            size += plus + fuse.dirent_size(entry.name)
            if size > room:
                break
            fitting.append(entry)
        if entries and not fitting:
            raise Refused(errno.EINVAL)
        nodes: dict[bytes, bytes] = {}
        if plus:
            names = [entry.name for entry in fitting if entry.name not in (b".", b"..")]
            found = zip(names, directory.lookup_each(node, names), strict=True)
            nodes = {name: self._entry(*pair) for name, pair in found if pair is not None}
        reply = []
        for entry in fitting:
            if plus:
                reply.append(nodes.get(entry.name, fuse.NO_ENTRY))
            # The parent of what is shared is nothing that the guest should know of.
            ino = fuse.UNKNOWN_INO if entry.name == b".." else entry.ino
            reply.append(fuse.dirent(ino, entry.next, entry.type, entry.name))
        return b"".join(reply)

    # -- state

    def save(self) -> bytes:
        return state.pack(FsState(self.save_transport(), self._started))

    def restore(self, data: bytes) -> None:
        restored = state.unpack(FsState, data)
        self.restore_transport(restored.transport)
        self._end()
        self._started = restored.started

    def counters(self) -> dict[str, int]:
        nodes, files = self._directory.counts
        return {**super().counters(), "nodes": nodes, "open_files": files}
