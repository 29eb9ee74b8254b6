"""The file system of a bench beside the kernel's: the same is asked of both, and both say the same."""

from __future__ import annotations

import errno
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from hypothesis import given, settings
from hypothesis import strategies as st

from devproc import syscalls
from devproc.backends import directory
from devproc.fuzz import host, tree

NAMES: Final = (b"file", b"big", b"dir", b"link", b"new")
FLAGS: Final = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_TRUNC | os.O_WRONLY, os.O_APPEND | os.O_RDWR)
FULL: Final = (errno.ENOSPC, errno.EFBIG)  # where the kernel has more room

names = st.sampled_from(NAMES)
numbers = st.integers(0, 4)
sizes = st.sampled_from((0, 1, 7, 100))
operations = st.one_of(
    st.tuples(st.just("lookup"), numbers, names),
    st.tuples(st.just("lookup_each"), numbers),
    st.tuples(st.just("forget"), numbers, st.integers(0, 2)),
    st.tuples(st.sampled_from(("stat", "readlink", "open_directory")), numbers),
    st.tuples(st.sampled_from(("make_file", "make_directory")), numbers, names),
    st.tuples(st.just("make_symlink"), numbers, names),
    st.tuples(st.just("remove"), numbers, names, st.booleans()),
    st.tuples(st.just("rename"), numbers, names, numbers, names, st.sampled_from((0, 1, 2))),
    st.tuples(st.just("link"), numbers, numbers, names),
    st.tuples(st.just("chmod"), numbers, st.sampled_from((0o700, 0o1755))),
    st.tuples(st.just("truncate"), numbers, sizes),
    st.tuples(st.just("set_times"), numbers, st.sampled_from((5, syscalls.UTIME_OMIT))),
    st.tuples(st.just("open"), numbers, st.sampled_from(FLAGS)),
    st.tuples(st.just("create"), numbers, names, st.sampled_from((*FLAGS, os.O_EXCL))),
    st.tuples(st.just("close"), numbers),
    st.tuples(st.sampled_from(("read", "write", "seek")), numbers, sizes),
    st.tuples(st.just("allocate"), numbers, sizes, sizes, st.sampled_from((0, 1, 3))),
    st.tuples(st.just("resize"), numbers, sizes),
    st.tuples(st.sampled_from(("fsync", "entries")), numbers),
    st.tuples(st.just("forget_all")),
)
START: Final[tuple[tuple[Any, ...], ...]] = (
    *(("lookup", 0, name) for name in NAMES[:4]),
    ("open", 1, os.O_RDWR | os.O_APPEND),
    ("open", 2, os.O_RDWR),
    ("open_directory", 3),
)
"""From where more than a few operations have something to work on."""


class Side:
    """One of the two directories; nodes and files in the order in which they came."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared
        self.nodes: list[int] = [directory.ROOT_ID]
        self.files: list[tuple[int, Any]] = [(0, None)]

    def asked(self, what: str, *args: Any) -> object:
        """What it says; what cannot be the same in both is left out."""
        try:
            return self._asked(what, *args)
        except OSError as e:
            return OSError, e.errno

    def _asked(self, what: str, *args: Any) -> object:
        shared = self.shared
        if what == "forget_all":
            shared.forget_all()
            del self.nodes[1:], self.files[1:]
            return shared.counts
        index, *more = args
        handle, owner = self.files[index % len(self.files)]
        match what:
            case "close":
                return shared.close(handle)
            case "read" | "write" | "seek" | "allocate" | "resize" | "fsync" | "entries":
                return self._of_file(what, shared.file(handle, owner, directory=what == "entries"), *more)
        id = self.nodes[index % len(self.nodes)]
        if what == "forget":
            return shared.forget(id, *more)
        node = shared.node(id)
        match what:
            case "lookup":
                return self._found(*shared.lookup(node, *more))
            case "lookup_each":
                return [found and self._found(*found) for found in shared.lookup_each(node, NAMES)]
            case "stat":
                return self._said(shared.stat(node))
            case "readlink":
                return node.kind == stat.S_IFLNK and shared.readlink(node)
            case "open_directory":
                return self._opened(shared.open_directory(node), node)
            case "make_file" | "make_directory":
                return getattr(shared, what)(node, *more, 0o755)
            case "make_symlink":
                return shared.make_symlink(node, *more, b"dir/file")
            case "remove":
                return shared.remove(node, more[0], directory=more[1])
            case "rename":
                name, to, *rest = more
                return shared.rename(node, name, shared.node(self.nodes[to % len(self.nodes)]), *rest)
            case "link":
                to, name = more
                return shared.link(node, shared.node(self.nodes[to % len(self.nodes)]), name)
            case "set_times":
                return shared.set_times(node, struct.pack("=4Q", 7, more[0], 9, 5))
            case "open":
                return self._opened(shared.open(node, *more), node)
            case "create":
                made, found, opened = shared.create(node, *more, 0o644)
                return self._opened(opened, made), self._found(made, found)
        return getattr(shared, what)(node, *more)

    def _of_file(self, what: str, file: Any, *args: Any) -> object:
        shared = self.shared
        match what:
            case "read":
                buffers = [memoryview(bytearray(3)), memoryview(bytearray(200))]
                return shared.read(file, args[0], buffers), bytes(buffers[0]), bytes(buffers[1])
            case "write":
                return shared.write(file, args[0], [memoryview(b"some"), memoryview(b"thing")])
            case "seek":
                return shared.seek(file, args[0], os.SEEK_HOLE) >= args[0]  # holes are left out
            case "allocate":
                offset, size, mode = args
                return shared.allocate(file, mode, offset, size)
            case "entries":
                found, at = [], 0
                while entries := shared.entries(file, at, 280):
                    found += [(e.name, e.type) for e in entries]
                    at = entries[-1].next
                return sorted(found)
        return getattr(shared, what)(file, *args)

    def _opened(self, handle: int, node: Any) -> object:
        self.files.append((handle, node))
        return handle, self.shared.counts

    def _found(self, node: Any, found: Any) -> object:
        self.nodes.append(node.id)
        return node.id, node.lookups, self._said(found)

    def _said(self, found: Any) -> object:
        if stat.S_ISDIR(found.mode):  # whose size and links are the file system's own
            return found.mode
        return found.mode, found.size, found.nlink, [ns for ns in (found.atime_ns,) if ns < 10**11]


@contextmanager
def both() -> Iterator[tuple[Side, Side]]:
    """The directory of a bench, and one of the host with the same in it."""
    start = tree.planted()
    mask = os.umask(0)
    with tempfile.TemporaryDirectory() as path:
        plant(start.inode, path.encode())
        fd = os.open(path, os.O_PATH)
        host_side = Side(directory.Directory(fd))
        try:
            yield Side(host.Directory(start)), host_side
        finally:
            host_side.shared.forget_all()
            os.close(fd)
            os.umask(mask)


def plant(inode: tree.Inode, path: bytes) -> None:
    """What is in a directory, in one of the host."""
    os.chmod(path, stat.S_IMODE(inode.mode))
    for name, (_, entry) in inode.names.items():
        below = os.path.join(path, name)
        match entry.kind:
            case stat.S_IFDIR:
                os.mkdir(below)
                plant(entry, below)
            case stat.S_IFLNK:
                os.symlink(entry.data, below)
                continue
            case stat.S_IFIFO:
                os.mkfifo(below)
            case _:
                with open(below, "wb") as file:
                    file.write(entry.data)
        os.chmod(below, stat.S_IMODE(entry.mode))


@settings(max_examples=200, deadline=None)
@given(st.lists(operations, min_size=20, max_size=60))
def test_it_is_as_the_kernels(asked: list[tuple[Any, ...]]) -> None:
    with both() as (ours, kernels):
        for one in (*START, *asked):
            said = ours.asked(*one)
            if said in [(OSError, error) for error in FULL]:
                return
            assert said == kernels.asked(*one), one
            assert ours.shared.counts == kernels.shared.counts
            opened = ours.shared._fd.inode.volume.opened
            assert opened == 1 + ours.shared.counts[1], f"{one}: a descriptor is left open"
