"""A directory of the host, and what is below it, by nodes: files that were looked up, and by which name.

Spec: openat2(2), path_resolution(7).  Every access begins at the directory itself and goes down by a node's
names, by openat2 with RESOLVE_BENEATH, and no symbolic link, no other mount and no "magic link" on the way;
what is found must be the very inode that was looked up, or the node is stale (ESTALE).  So no descriptor is
kept for a node, and what the host moves out of the directory is out of reach; what is open stays open.
Left out: mounts below the directory, paths longer than PATH_MAX, changing the mode of what its owner may
neither read nor write, and where the file system does not say when a file was made, telling it from a deleted
one that had its number and type.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from devproc import syscalls
from devproc.syscalls import Dirent, Stat

ROOT_ID: Final = 1
NODES_MAX: Final = 200_000
FILES_MAX: Final = 2000
MODE_BITS: Final = 0o1777
"""The mode bits that a file can be given: not set-user-ID and set-group-ID, which the host would honour."""

_PATH_MAX: Final = 4096
_RESOLVE: Final = (
    syscalls.RESOLVE_BENEATH
    | syscalls.RESOLVE_NO_SYMLINKS
    | syscalls.RESOLVE_NO_MAGICLINKS
    | syscalls.RESOLVE_NO_XDEV
)
_ALWAYS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK
_OPEN_FLAGS: Final = os.O_ACCMODE | os.O_APPEND | os.O_DSYNC | os.O_SYNC
_MOVED: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV)

Inode = tuple[tuple[int, int], int, int, int]
"""Device, number, type, and when it was made: the number of a deleted one may be used again."""


class Node:
    """A file that was looked up, `lookups` times more than forgotten; `children` nodes have it as parent."""

    __slots__ = ("children", "files", "id", "inode", "lookups", "name", "parent")

    def __init__(self, id: int, inode: Inode, parent: Node | None, name: bytes) -> None:
        self.id = id
        self.inode = inode
        self.parent = parent
        self.name = name
        self.lookups = 0
        self.children = 0
        self.files: list[File] = []

    @property
    def kind(self) -> int:
        """S_IFREG, S_IFDIR..."""
        return self.inode[2]


class File:
    """An open file or directory."""

    __slots__ = ("directory", "fd", "node")

    def __init__(self, fd: int, node: Node, directory: bool) -> None:
        self.fd = fd
        self.node = node
        self.directory = directory


class Directory:
    """The directory `fd`, an O_PATH descriptor.  Names must be single components; all methods raise OSError.

    Attributes:
        uid, gid: ours, which own what is made here.
    """

    def __init__(self, fd: int) -> None:
        self._fd: Final = fd
        self.uid, self.gid = os.geteuid(), os.getegid()
        self._last_id = ROOT_ID  # none is used twice, so that an old id is no other file
        self._last_handle = 0
        self._files: dict[int, File] = {}
        self._nodes: dict[int, Node] = {}
        self._inodes: dict[Inode, Node] = {}
        self.forget_all()

    # -- nodes

    def forget_all(self) -> None:
        """Close every file, forget every node but the directory itself."""
        for file in self._files.values():
            os.close(file.fd)
        self._files.clear()
        self._nodes.clear()
        self._inodes.clear()
        self._root = Node(ROOT_ID, _inode(syscalls.statx(self._fd)), None, b"")
        self._nodes[ROOT_ID] = self._inodes[self._root.inode] = self._root

    @property
    def counts(self) -> tuple[int, int]:
        """Nodes that are known, files that are open."""
        return len(self._nodes), len(self._files)

    def node(self, id: int) -> Node:
        node = self._nodes.get(id)
        if node is None or not (node.lookups or node is self._root):
            raise _error(errno.ESTALE)
        return node

    def lookup(self, parent: Node, name: bytes) -> tuple[Node, Stat]:
        """What `name` is, which counts as a look-up of it."""
        with self._at(parent) as fd:
            return self._lookup_at(fd, parent, name)

    def lookup_each(self, parent: Node, names: Sequence[bytes]) -> list[tuple[Node, Stat] | None]:
        """`lookup` of each, None of what cannot be looked up."""
        found: list[tuple[Node, Stat] | None] = []
        with self._at(parent) as fd:
            for name in names:
                try:
                    found.append(self._lookup_at(fd, parent, name))
                except OSError:
                    found.append(None)
        return found

    def forget(self, id: int, lookups: int) -> None:
        """Take back look-ups; all there are, if that is more, and none of what is not known."""
        node = self._nodes.get(id)
        if node is not None and node is not self._root:
            node.lookups = max(0, node.lookups - lookups)
            self._drop(node)

    def stat(self, node: Node) -> Stat:
        with self._node(node) as fd:
            return syscalls.statx(fd)

    def readlink(self, node: Node) -> bytes:
        with self._node(node) as fd:
            return os.readlink(b"", dir_fd=fd)

    # -- what changes the tree

    def make_file(self, parent: Node, name: bytes, mode: int) -> None:
        with self._at(parent) as fd:
            os.close(_open(fd, name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode & MODE_BITS))

    def make_directory(self, parent: Node, name: bytes, mode: int) -> None:
        with self._at(parent) as fd:
            os.mkdir(name, mode & MODE_BITS, dir_fd=fd)

    def make_symlink(self, parent: Node, name: bytes, target: bytes) -> None:
        """Nothing here ever follows it."""
        with self._at(parent) as fd:
            os.symlink(target, name, dir_fd=fd)

    def remove(self, parent: Node, name: bytes, *, directory: bool) -> None:
        with self._at(parent) as fd:
            if directory:
                os.rmdir(name, dir_fd=fd)
            else:
                os.unlink(name, dir_fd=fd)

    def rename(self, parent: Node, name: bytes, to_parent: Node, to_name: bytes, flags: int) -> None:
        """`flags` are RENAME_NOREPLACE or RENAME_EXCHANGE of renameat2(2)."""
        with self._at(parent) as fd, self._at(to_parent) as to_fd:
            moved = self._known(fd, name)
            other = self._known(to_fd, to_name) if flags & syscalls.RENAME_EXCHANGE else None
            syscalls.renameat2(fd, name, to_fd, to_name, flags)
        if moved is not None:
            self._move(moved, to_parent, to_name)
        if other is not None:
            self._move(other, parent, name)

    def link(self, node: Node, parent: Node, name: bytes) -> None:
        """Another name for a file."""
        if node.parent is None:
            raise _error(errno.EPERM)
        with self._opened(node, os.O_PATH), self._at(node.parent) as fd, self._at(parent) as to_fd:
            os.link(node.name, name, src_dir_fd=fd, dst_dir_fd=to_fd, follow_symlinks=False)

    # -- attributes

    def chmod(self, node: Node, mode: int) -> None:
        if node.kind not in (stat.S_IFREG, stat.S_IFDIR):
            raise _error(errno.EOPNOTSUPP)
        with self._readable_or_writable(node) as fd:
            os.fchmod(fd, mode & MODE_BITS)

    def truncate(self, node: Node, size: int) -> None:
        if node.kind != stat.S_IFREG:
            raise _error(errno.EINVAL)
        with self._opened(node, os.O_WRONLY) as fd:
            os.ftruncate(fd, size)

    def set_times(self, node: Node, times: bytes) -> None:
        """`times` as utimensat(2) has them."""
        with self._node(node) as fd:
            syscalls.utimensat(fd, b"", times, syscalls.AT_EMPTY_PATH)

    def statfs(self, node: Node) -> os.statvfs_result:
        with self._node(node) as fd:
            return os.fstatvfs(fd)

    # -- open files

    def open(self, node: Node, flags: int) -> int:
        """Open a regular file; the handle.  Of O_ `flags` what has no meaning here does not count."""
        if node.kind != stat.S_IFREG:
            raise _error(errno.EISDIR if node.kind == stat.S_IFDIR else errno.EACCES)
        fd = self._reopen(node, flags & _OPEN_FLAGS)
        try:
            if flags & os.O_TRUNC:  # only now is it known to be the right one
                os.ftruncate(fd, 0)
        except OSError:
            os.close(fd)
            raise
        return self._keep_open(fd, node, directory=False)

    def create(self, parent: Node, name: bytes, flags: int, mode: int) -> tuple[Node, Stat, int]:
        """Open a file that is made if there is none; a look-up of it, and the handle."""
        with self._at(parent) as at:
            try:
                flags_at = flags & _OPEN_FLAGS | os.O_CREAT | os.O_EXCL
                fd = _open(at, name, flags_at, mode & MODE_BITS)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                node, found = self._lookup_at(at, parent, name)
                try:
                    return node, found, self.open(node, flags)
                except OSError:
                    self.forget(node.id, 1)
                    raise
        try:
            found = syscalls.statx(fd)
            node = self._count(parent, name, found)
        except OSError:
            os.close(fd)
            raise
        return node, found, self._keep_open(fd, node, directory=False)

    def open_directory(self, node: Node) -> int:
        """The handle of a directory, for `entries`."""
        if node.kind != stat.S_IFDIR:
            raise _error(errno.ENOTDIR)
        return self._keep_open(self._reopen(node, os.O_RDONLY), node, directory=True)

    def file(self, handle: int, node: Node, *, directory: bool = False) -> File:
        """What `handle` is, which must be an open file, or directory, of `node`."""
        file = self._files.get(handle)
        if file is None or file.node is not node or file.directory is not directory:
            raise _error(errno.EBADF)
        return file

    def close(self, handle: int) -> None:
        """Close it, if it is open."""
        file = self._files.pop(handle, None)
        if file is not None:
            file.node.files.remove(file)
            os.close(file.fd)

    def read(self, file: File, offset: int, into: Sequence[memoryview]) -> int:
        """Fill `into` as far as the file goes; bytes."""
        return os.preadv(file.fd, into, offset)

    def write(self, file: File, offset: int, data: Sequence[memoryview]) -> int:
        """Write `data`, as much as there is room for; bytes."""
        return os.pwritev(file.fd, data, offset)

    def resize(self, file: File, size: int) -> None:
        os.ftruncate(file.fd, size)

    def fsync(self, file: File) -> None:
        os.fsync(file.fd)

    def allocate(self, file: File, mode: int, offset: int, size: int) -> None:
        """`mode` is FALLOC_FL_* of fallocate(2)."""
        syscalls.fallocate(file.fd, mode, offset, size)

    def seek(self, file: File, offset: int, whence: int) -> int:
        """Where data or a hole begins: SEEK_DATA, SEEK_HOLE."""
        return os.lseek(file.fd, offset, whence)

    def entries(self, file: File, offset: int, size: int) -> list[Dirent]:
        """What the kernel puts into `size` from `offset` on, which is 0 or another entry's `next`."""
        os.lseek(file.fd, offset, os.SEEK_SET)
        return syscalls.getdents64(file.fd, size)

    # -- inside

    def _path(self, node: Node) -> bytes:
        names = []
        size = 0
        at: Node | None = node
        while at is not None and at.parent is not None:
            names.append(at.name)
            size += len(at.name) + 1
            if size > _PATH_MAX:
                raise _error(errno.ENAMETOOLONG)
            at = at.parent
        return b"/".join(reversed(names)) or b"."

    def _reopen(self, node: Node, flags: int) -> int:
        """A descriptor of `node`, which its names must still lead to."""
        try:
            fd = _open(self._fd, self._path(node), flags)
        except OSError as e:
            raise _error(errno.ESTALE) if e.errno in _MOVED else e from None
        if _inode(syscalls.statx(fd)) != node.inode:
            os.close(fd)
            raise _error(errno.ESTALE)
        return fd

    @contextmanager
    def _opened(self, node: Node, flags: int) -> Iterator[int]:
        fd = self._reopen(node, flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _at(self, node: Node) -> Iterator[int]:
        """The O_PATH descriptor of a directory."""
        if node.kind != stat.S_IFDIR:
            raise _error(errno.ENOTDIR)
        with self._opened(node, os.O_PATH) as fd:
            yield fd

    @contextmanager
    def _node(self, node: Node) -> Iterator[int]:
        """A descriptor of any node; an open file's, because it may have no name any more."""
        if node.files:
            yield node.files[-1].fd
        else:
            with self._opened(node, os.O_PATH) as fd:
                yield fd

    @contextmanager
    def _readable_or_writable(self, node: Node) -> Iterator[int]:
        if node.files:
            yield node.files[-1].fd
            return
        try:
            fd = self._reopen(node, os.O_RDONLY)
        except PermissionError:
            fd = self._reopen(node, os.O_WRONLY)
        try:
            yield fd
        finally:
            os.close(fd)

    def _lookup_at(self, fd: int, parent: Node, name: bytes) -> tuple[Node, Stat]:
        found = _stat_at(fd, name)
        return self._count(parent, name, found), found

    def _known(self, fd: int, name: bytes) -> Node | None:
        try:
            return self._inodes.get(_inode(_stat_at(fd, name)))
        except OSError:  # the call that follows says why
            return None

    def _count(self, parent: Node, name: bytes, found: Stat) -> Node:
        """The node of what was found, with one more look-up."""
        inode = _inode(found)
        node = self._inodes.get(inode)
        if node is self._root:
            raise _error(errno.ELOOP)
        if node is None:
            if len(self._nodes) >= NODES_MAX:
                raise _error(errno.ENFILE)
            self._last_id += 1
            node = Node(self._last_id, inode, parent, name)
            parent.children += 1
            self._nodes[node.id] = self._inodes[inode] = node
        elif node.parent is not parent or node.name != name:
            self._move(node, parent, name)
        node.lookups += 1
        return node

    def _move(self, node: Node, parent: Node, name: bytes) -> None:
        before = node.parent
        assert before is not None
        node.parent, node.name = parent, name
        parent.children += 1
        before.children -= 1
        self._drop(before)

    def _drop(self, node: Node) -> None:
        """Forget it if nothing needs it any more, then its parent."""
        while node.parent is not None and not node.lookups and not node.children:
            self._nodes.pop(node.id, None)
            if self._inodes.get(node.inode) is node:
                del self._inodes[node.inode]
            node.parent.children -= 1
            node = node.parent

    def _keep_open(self, fd: int, node: Node, *, directory: bool) -> int:
        if len(self._files) >= FILES_MAX:
            os.close(fd)
            raise _error(errno.ENFILE)
        file = File(fd, node, directory)
        node.files.append(file)
        self._last_handle += 1
        self._files[self._last_handle] = file
        return self._last_handle


def _open(fd: int, path: bytes, flags: int, mode: int = 0) -> int:
    if flags & os.O_PATH:
        return syscalls.openat2(fd, path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0, _RESOLVE)
    return syscalls.openat2(fd, path, flags | _ALWAYS, mode, _RESOLVE)


def _stat_at(fd: int, name: bytes) -> Stat:
    at = _open(fd, name, os.O_PATH)
    try:
        return syscalls.statx(at)
    finally:
        os.close(at)


def _inode(found: Stat) -> Inode:
    return found.dev, found.ino, stat.S_IFMT(found.mode), found.btime_ns


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
