"""A shared directory as its driver sees it: real rings, real requests, and a real directory of the host."""

from __future__ import annotations

import errno
import os
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devproc.backends import directory as backend
from devproc.catalog import CATALOG
from devproc.driver import PciDriver
from devproc.fuse import Opcode
from devproc.virtio import spec
from devproc.virtio.chain import part

V1 = spec.F_VERSION_1
EVERY_RING = V1 | spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED
NEEDS_RESET = spec.DEVICE_NEEDS_RESET
HIPRIO, REQUESTS = 0, 1
ROOT = 1
ROOM = 4096
# Asked for by Linux 6.1
INIT_FLAGS = 0x73FF_FFFB


class Entry(NamedTuple):
    nodeid: int
    mode: int
    size: int
    uid: int
    gid: int
    nlink: int
    ino: int


def attributes(data: bytes) -> Entry:
    """struct fuse_attr, without a node."""
    ino, size, _, _, _, _, _, _, _, mode, nlink, uid, gid, *_ = struct.unpack("<6Q10I", data[:88])
    return Entry(0, mode, size, uid, gid, nlink, ino)


class Guest:
    """A driver that has brought the device up and sends what it likes."""

    def __init__(self, bench: Any, features: int = V1, init: bool = True, **params: Any) -> None:
        self.bench = bench("virtio-fs", **params)
        self.model = self.bench.model
        self.tree = Path(self.bench.tree.name)
        self.driver: PciDriver = self.bench.driver()
        self.driver.start(features)
        self.bench.pump()
        self.unique = 0
        if init:
            error, _ = self.ask(Opcode.INIT, 0, struct.pack("<4I", 7, 38, 1 << 20, INIT_FLAGS) + bytes(48))
            assert error == 0

    def send(self, *parts: bytes | int, queue: int = REQUESTS) -> bytes:
        """One chain; what the device wrote."""
        ring = self.driver.queues[queue]
        ring.request(*parts)
        self.bench.kick("kick", queue)
        (used,) = ring.used()
        ring.interrupts(1)
        return used.data

    def ask(
        self,
        opcode: int,
        nodeid: int = ROOT,
        body: bytes = b"",
        room: int = ROOM,
        data: bytes = b"",
        size: int = 0,
    ) -> tuple[int, bytes]:
        """(error number, reply); `size` is a wrong length for the header to say."""
        self.unique += 1
        length = size or 40 + len(body) + len(data)
        head = struct.pack("<IIQQIIII", length, opcode, self.unique, nodeid, 1000, 1000, 77, 0)
        answer = self.send(*(p for p in (head, body, data) if p), *(n for n in (16, room) if n))
        length, error, unique = struct.unpack("<IiQ", answer[:16])
        assert unique == self.unique
        assert length == len(answer)
        assert error <= 0
        assert not error or length == 16
        return -error, answer[16:]

    def ok(self, opcode: int, nodeid: int = ROOT, body: bytes = b"", **how: Any) -> bytes:
        error, reply = self.ask(opcode, nodeid, body, **how)
        assert error == 0, errno.errorcode[error]
        return reply

    def error(self, opcode: int, nodeid: int = ROOT, body: bytes = b"", **how: Any) -> int:
        return self.ask(opcode, nodeid, body, **how)[0]

    def lookup(self, *names: str, at: int = ROOT) -> Entry:
        """Down a path, component by component."""
        for name in names:
            reply = self.ok(Opcode.LOOKUP, at, name.encode() + b"\0")
            at = struct.unpack("<Q", reply[:8])[0]
        return attributes(reply[40:])._replace(nodeid=at)

    def getattr(self, nodeid: int) -> Entry:
        return attributes(self.ok(Opcode.GETATTR, nodeid, bytes(16))[16:])

    def open(self, nodeid: int, flags: int = os.O_RDWR) -> int:
        return int(struct.unpack("<Q", self.ok(Opcode.OPEN, nodeid, struct.pack("<II", flags, 0))[:8])[0])

    def opendir(self, nodeid: int = ROOT) -> int:
        return int(struct.unpack("<Q", self.ok(Opcode.OPENDIR, nodeid, bytes(8))[:8])[0])

    def create(self, parent: int, name: str, mode: int = 0o644, flags: int = os.O_RDWR) -> tuple[Entry, int]:
        reply = self.ok(Opcode.CREATE, parent, struct.pack("<4I", flags, mode, 0, 0) + name.encode() + b"\0")
        nodeid, handle = struct.unpack("<Q", reply[:8])[0], struct.unpack("<Q", reply[128:136])[0]
        return attributes(reply[40:])._replace(nodeid=nodeid), handle

    def read(self, nodeid: int, handle: int, offset: int, size: int) -> bytes:
        return self.ok(Opcode.READ, nodeid, transfer(handle, offset, size), room=size)

    def write(self, nodeid: int, handle: int, offset: int, data: bytes) -> int:
        reply = self.ok(Opcode.WRITE, nodeid, transfer(handle, offset, len(data)), data=data)
        return int(struct.unpack("<I", reply[:4])[0])

    def setattr(self, nodeid: int, valid: int, **values: int) -> int:
        """The error."""
        return self.error(Opcode.SETATTR, nodeid, setattr_in(valid, **values))

    def forget(self, nodeid: int, lookups: int, queue: int = HIPRIO) -> None:
        head = struct.pack("<IIQQIIII", 48, Opcode.FORGET, 0, nodeid, 0, 0, 0, 0)
        assert self.send(head, struct.pack("<Q", lookups), queue=queue) == b""

    def listing(self, opcode: int = Opcode.READDIR, size: int = ROOM) -> list[tuple[str, int]]:
        """(name, node id) of every entry of the root, in as many requests as it takes."""
        handle, offset, found = self.opendir(), 0, []
        while reply := self.ok(opcode, ROOT, transfer(handle, offset, size), room=size):
            while reply:
                nodeid = 0
                if opcode == Opcode.READDIRPLUS:
                    nodeid = struct.unpack("<Q", reply[:8])[0]
                    reply = reply[128:]
                _, offset, length, _ = struct.unpack("<QQII", reply[:24])
                found.append((reply[24 : 24 + length].decode(), nodeid))
                reply = reply[(24 + length + 7) // 8 * 8 :]
        self.ok(Opcode.RELEASEDIR, ROOT, struct.pack("<QIIQ", handle, 0, 0, 0))
        return found

    def counter(self, name: str) -> int:
        return int(self.model.counters()[name])


def transfer(handle: int, offset: int, size: int) -> bytes:
    return struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)


def setattr_in(
    valid: int, fh: int = 0, size: int = 0, mode: int = 0, uid: int = 0, gid: int = 0, **t: int
) -> bytes:
    times = t.get("atime", 0), t.get("mtime", 0), 0
    parts = t.get("atime_ns", 0), t.get("mtime_ns", 0), 0
    return struct.pack("<II6Q8I", valid, 0, fh, size, 0, *times, *parts, mode, 0, uid, gid, 0)


def rename_in(newdir: int, before: bytes, after: bytes, flags: int = 0) -> bytes:
    return struct.pack("<QII", newdir, flags, 0) + before + b"\0" + after + b"\0"


@pytest.fixture
def guest(bench: Any) -> Guest:
    return Guest(bench)


# -- what it is


def test_it_has_its_tag_and_one_request_queue(bench: Any) -> None:
    driver = Guest(bench, tag="größe".encode()).driver
    assert driver.function.read(2, 2, 2) == 0x105A
    assert bytes(driver.config(at, 1) for at in range(36)) == "größe".encode().ljust(36, b"\0")
    assert driver.config(36, 4) == 1


@pytest.mark.parametrize("features", [V1, EVERY_RING], ids=["split", "packed"])
def test_a_session_begins_with_what_both_know(bench: Any, features: int) -> None:
    guest = Guest(bench, features, init=False)
    reply = guest.ok(Opcode.INIT, 0, struct.pack("<4I", 7, 38, 1 << 17, INIT_FLAGS) + bytes(48))
    major, minor, readahead, flags, _, _, most, granularity, pages, *_ = struct.unpack(
        "<4I2H2I2H", reply[:32]
    )
    assert (major, minor, readahead, most, granularity, pages) == (7, 31, 1 << 17, 1 << 20, 1, 256)
    assert not flags & ~INIT_FLAGS
    assert len(reply) == 64


def test_an_old_protocol_is_refused_and_a_new_one_told_ours(bench: Any) -> None:
    guest = Guest(bench, init=False)
    assert guest.error(Opcode.INIT, 0, struct.pack("<4I", 7, 30, 0, 0)) == errno.EPROTO
    assert guest.ok(Opcode.INIT, 0, struct.pack("<4I", 8, 0, 0, 0))[:8] == struct.pack("<II", 7, 31)
    assert guest.error(Opcode.GETATTR, ROOT, bytes(16)) == errno.EIO, "it asks again first"


# -- files


@pytest.mark.parametrize("features", [V1, EVERY_RING], ids=["split", "packed"])
def test_what_the_guest_writes_is_in_the_hosts_file_and_read_back(bench: Any, features: int) -> None:
    guest = Guest(bench, features)
    entry, handle = guest.create(ROOT, "file", 0o640)
    data = os.urandom(10_000)
    assert guest.write(entry.nodeid, handle, 5, data) == len(data)
    assert (guest.tree / "file").read_bytes() == bytes(5) + data
    assert guest.read(entry.nodeid, handle, 1000, 5000) == (bytes(5) + data)[1000:6000]
    assert guest.read(entry.nodeid, handle, 10_000, 5000) == data[-5:], "and ends where it ends"
    assert guest.read(entry.nodeid, handle, 20_000, 5000) == b""
    assert guest.ok(Opcode.FSYNC, entry.nodeid, struct.pack("<QII", handle, 1, 0)) == b""
    assert guest.ok(Opcode.RELEASE, entry.nodeid, struct.pack("<QIIQ", handle, 0, 0, 0)) == b""
    assert guest.error(Opcode.READ, entry.nodeid, transfer(handle, 0, 5)) == errno.EBADF


def test_attributes_are_the_hosts_and_its_owner_is_the_guests_root(guest: Guest) -> None:
    path = guest.tree / "file"
    path.write_bytes(bytes(1234))
    path.chmod(0o604)
    found, entry = path.stat(), guest.lookup("file")
    assert (entry.mode, entry.size, entry.nlink, entry.ino) == (found.st_mode, 1234, 1, found.st_ino)
    assert (entry.uid, entry.gid) == (0, 0)
    assert guest.getattr(entry.nodeid) == entry._replace(nodeid=0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
def test_others_files_are_nobodys(guest: Guest) -> None:
    path = guest.tree / "file"
    path.touch()
    os.chown(path, 1234, 1235)
    entry = guest.lookup("file")
    assert (entry.uid, entry.gid) == (65534, 65534)
    assert guest.setattr(entry.nodeid, 1 << 1, uid=65534) == 0, "it stays as it is"
    assert guest.setattr(entry.nodeid, 1 << 1, uid=0) == errno.EPERM


def test_the_tree_is_changed_as_the_guest_asks(guest: Guest) -> None:
    tree = guest.tree
    guest.ok(Opcode.MKDIR, ROOT, struct.pack("<II", 0o750, 0) + b"dir\0")
    assert stat.S_IMODE((tree / "dir").stat().st_mode) & ~0o022 == 0o750
    dir = guest.lookup("dir")
    guest.ok(Opcode.MKNOD, dir.nodeid, struct.pack("<4I", stat.S_IFREG | 0o600, 0, 0, 0) + b"a\0")
    guest.ok(Opcode.SYMLINK, dir.nodeid, b"soft\0../anywhere\0")
    soft = guest.lookup("dir", "soft")
    assert (
        guest.ok(Opcode.READLINK, soft.nodeid)
        == b"../anywhere"
        == os.fsencode(os.readlink(tree / "dir/soft"))
    )
    a = guest.lookup("dir", "a")
    guest.ok(Opcode.LINK, ROOT, struct.pack("<Q", a.nodeid) + b"hard\0")
    assert (tree / "hard").samefile(tree / "dir/a")
    assert guest.lookup("hard").nodeid == a.nodeid
    guest.ok(Opcode.RENAME, dir.nodeid, struct.pack("<Q", ROOT) + b"soft\0moved\0")
    assert (tree / "moved").is_symlink()
    assert guest.ok(Opcode.READLINK, soft.nodeid) == b"../anywhere", "the node is still the same"
    assert guest.error(Opcode.RENAME2, ROOT, rename_in(ROOT, b"moved", b"hard", 1)) == errno.EEXIST
    guest.ok(Opcode.RENAME2, ROOT, rename_in(ROOT, b"moved", b"hard", 2))
    assert (tree / "hard").is_symlink() and not (tree / "moved").is_symlink()
    assert guest.ok(Opcode.READLINK, soft.nodeid) == b"../anywhere"
    assert guest.error(Opcode.RENAME2, ROOT, rename_in(ROOT, b"moved", b"x", 4)) == errno.EINVAL, (
        "no whiteouts"
    )
    assert guest.error(Opcode.RMDIR, ROOT, b"dir\0") == errno.ENOTEMPTY
    guest.ok(Opcode.UNLINK, dir.nodeid, b"a\0")
    guest.ok(Opcode.RMDIR, ROOT, b"dir\0")
    assert sorted(os.listdir(tree)) == ["hard", "moved"]


def test_an_open_file_lives_on_without_a_name(guest: Guest) -> None:
    entry, handle = guest.create(ROOT, "file")
    guest.ok(Opcode.UNLINK, ROOT, b"file\0")
    assert guest.write(entry.nodeid, handle, 0, b"still here") == 10
    assert guest.getattr(entry.nodeid)._replace(ino=0) == Entry(0, entry.mode, 10, 0, 0, 0, 0)
    assert guest.setattr(entry.nodeid, 1 << 3 | 1 << 6, fh=handle, size=5) == 0
    assert guest.read(entry.nodeid, handle, 0, 100) == b"still"
    assert guest.setattr(entry.nodeid, 1, mode=0o600) == 0
    guest.ok(Opcode.RELEASE, entry.nodeid, struct.pack("<QIIQ", handle, 0, 0, 0))
    assert guest.error(Opcode.GETATTR, entry.nodeid, bytes(16)) == errno.ESTALE


def test_modes_sizes_and_times_are_set(guest: Guest) -> None:
    path = guest.tree / "file"
    path.write_bytes(b"0123456789")
    node = guest.lookup("file").nodeid
    assert guest.setattr(node, 1 | 1 << 3, mode=0o600, size=4) == 0
    assert guest.setattr(node, 1 << 4 | 1 << 5, atime=7, atime_ns=8, mtime=1 << 31, mtime_ns=9) == 0
    found = path.stat()
    assert (path.read_bytes(), stat.S_IMODE(found.st_mode)) == (b"0123", 0o600)
    assert (found.st_atime_ns, found.st_mtime_ns) == (7_000_000_008, (1 << 31) * 10**9 + 9)
    assert guest.setattr(node, 1 << 4, atime=1) == 0
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (10**9, found.st_mtime_ns), "one alone"
    assert guest.setattr(node, 1 << 5 | 1 << 8) == 0
    assert path.stat().st_mtime_ns < found.st_mtime_ns, "now"
    (guest.tree / "soft").symlink_to("file")
    assert guest.setattr(guest.lookup("soft").nodeid, 1 << 5, mtime=3) == 0
    assert (guest.tree / "soft").lstat().st_mtime_ns == 3 * 10**9
    assert path.stat().st_mtime_ns != 3 * 10**9, "of the link, not of what it names"


def test_create_opens_what_is_there_unless_told_not_to(guest: Guest) -> None:
    path = guest.tree / "file"
    path.write_bytes(b"before")
    entry, handle = guest.create(ROOT, "file")
    assert guest.read(entry.nodeid, handle, 0, 6) == b"before"
    body = struct.pack("<4I", os.O_RDWR | os.O_EXCL, 0o644, 0, 0) + b"file\0"
    assert guest.error(Opcode.CREATE, ROOT, body) == errno.EEXIST
    guest.create(ROOT, "file", flags=os.O_RDWR | os.O_TRUNC)
    assert path.read_bytes() == b""


def test_holes_are_found_and_room_is_kept(guest: Guest) -> None:
    entry, handle = guest.create(ROOT, "file")
    guest.write(entry.nodeid, handle, 1 << 20, b"x")
    where = guest.ok(Opcode.LSEEK, entry.nodeid, struct.pack("<QQII", handle, 0, 3, 0))
    assert 0 < struct.unpack("<Q", where)[0] <= 1 << 20
    assert guest.error(Opcode.LSEEK, entry.nodeid, struct.pack("<QQII", handle, 0, 0, 0)) == errno.EINVAL
    guest.ok(Opcode.FALLOCATE, entry.nodeid, struct.pack("<QQQII", handle, 0, 2 << 20, 0, 0))
    assert (guest.tree / "file").stat().st_size == 2 << 20
    bad = struct.pack("<QQQII", handle, 0, 4096, 0x40, 0)
    assert guest.error(Opcode.FALLOCATE, entry.nodeid, bad) == errno.EOPNOTSUPP


def test_statfs_is_the_hosts(guest: Guest) -> None:
    blocks, *_, size, length, fragment, _ = struct.unpack("<5Q4I", guest.ok(Opcode.STATFS)[:56])
    host = os.statvfs(guest.tree)
    assert (blocks, size, length, fragment) == (host.f_blocks, host.f_bsize, host.f_namemax, host.f_frsize)


@pytest.mark.parametrize("opcode", [Opcode.READDIR, Opcode.READDIRPLUS])
@pytest.mark.parametrize("size", [512, ROOM, 1 << 16])
def test_a_directory_is_listed_whole_in_pieces_of_any_size(guest: Guest, opcode: int, size: int) -> None:
    names = {f"{n}" * (n % 60 + 1) for n in range(150)}
    for name in names:
        (guest.tree / name).touch()
    found = guest.listing(opcode, size)
    assert sorted(name for name, _ in found) == sorted([".", "..", *names])
    if opcode == Opcode.READDIRPLUS:
        ids = dict(found)
        assert not ids["."] and not ids[".."], "no node: no look-up"
        name = max(names)
        assert guest.lookup(name).nodeid == ids[name]
        guest.forget(ids[name], 2)
        assert guest.error(Opcode.GETATTR, ids[name], bytes(16)) == errno.ESTALE, "one from each"


def test_the_parent_of_what_is_shared_is_not_told(guest: Guest) -> None:
    reply = guest.ok(Opcode.READDIR, ROOT, transfer(guest.opendir(), 0, ROOM))
    parent = guest.tree.parent.stat().st_ino
    while reply:
        ino, _, length, _ = struct.unpack("<QQII", reply[:24])
        assert ino != parent
        reply = reply[(24 + length + 7) // 8 * 8 :]


def test_what_is_left_out_is_not_asked_for_again(guest: Guest) -> None:
    """ENOSYS: Linux remembers."""
    for opcode in (21, 22, 23, 24, 25, 31, 32, 33, 34, 39, 40, 47, 48, 50, 4096, 0xFFFF_FFFF):
        assert guest.error(opcode, ROOT, bytes(64)) == errno.ENOSYS


def test_after_restore_nodes_are_looked_up_again(bench: Any) -> None:
    guest = Guest(bench)
    (guest.tree / "file").touch()
    node = guest.lookup("file").nodeid
    guest.model.restore(guest.model.save())
    assert guest.error(Opcode.GETATTR, node, bytes(16)) == errno.ESTALE
    assert guest.lookup("file").nodeid != node


def test_destroy_ends_the_session(guest: Guest) -> None:
    guest.create(ROOT, "file")
    guest.ok(Opcode.DESTROY, 0)
    assert (guest.counter("nodes"), guest.counter("open_files")) == (1, 0)
    assert guest.error(Opcode.GETATTR, ROOT, bytes(16)) == errno.EIO


def test_a_reset_closes_everything(guest: Guest) -> None:
    guest.create(ROOT, "file")
    guest.driver.reset()
    assert (guest.counter("nodes"), guest.counter("open_files")) == (1, 0)


# -- threats

NOT_NAMES = [b"", b".", b"..", b"/", b"/etc", b"a/b", b"../x", b"dir/..", b"./", b"x/"]


def by_name(name: bytes) -> list[tuple[int, bytes]]:
    """Every request that has a name, with `name` for one of its names."""
    n = name + b"\0"
    return [
        (Opcode.LOOKUP, n),
        (Opcode.UNLINK, n),
        (Opcode.RMDIR, n),
        (Opcode.SYMLINK, n + b"target\0"),
        (Opcode.MKNOD, struct.pack("<4I", stat.S_IFREG | 0o644, 0, 0, 0) + n),
        (Opcode.MKDIR, struct.pack("<II", 0o755, 0) + n),
        (Opcode.CREATE, struct.pack("<4I", os.O_RDWR, 0o644, 0, 0) + n),
        (Opcode.LINK, struct.pack("<Q", 2) + n),
        (Opcode.RENAME, struct.pack("<Q", ROOT) + n + b"to\0"),
        (Opcode.RENAME, struct.pack("<Q", ROOT) + b"file\0" + n),
        (Opcode.RENAME2, rename_in(ROOT, name, b"to")),
        (Opcode.RENAME2, rename_in(ROOT, b"file", name)),
    ]


@pytest.mark.parametrize("name", NOT_NAMES)
def test_what_is_no_name_is_refused(guest: Guest, name: bytes) -> None:
    """Threat 1: paths, dots and nothing."""
    (guest.tree / "file").touch()
    (guest.tree / "dir").mkdir()
    assert guest.lookup("file").nodeid == 2
    for opcode, body in by_name(name):
        assert guest.error(opcode, ROOT, body) == errno.EINVAL, Opcode(opcode).name
    assert sorted(os.listdir(guest.tree)) == ["dir", "file"]


def test_a_name_that_is_too_long_is_refused(guest: Guest) -> None:
    """Threat 1: 256 bytes; 255 are a name."""
    for opcode, body in by_name(b"n" * 256):
        assert guest.error(opcode, ROOT, body) == errno.ENAMETOOLONG
    guest.create(ROOT, "n" * 255)
    assert guest.error(Opcode.SYMLINK, ROOT, b"s\0" + b"t" * 4096 + b"\0") == errno.ENAMETOOLONG


def test_a_nul_does_not_end_a_name_early(guest: Guest) -> None:
    """Threat 1: what follows it is an argument too many."""
    for opcode, body in by_name(b"file\0rest"):
        assert guest.error(opcode, ROOT, body) == errno.EINVAL
    assert os.listdir(guest.tree) == []


@pytest.mark.parametrize(
    "target", ["/", "/etc", "..", "../..", ".", "real", "/proc/self/root", "/proc/self/fd/5"]
)
def test_a_symbolic_link_is_never_followed(guest: Guest, target: str) -> None:
    """Threat 2: absolute, relative, to inside, magic; the guest's or the host's."""
    (guest.tree / "real").mkdir()
    (guest.tree / "real/passwd").touch()
    guest.ok(Opcode.SYMLINK, ROOT, b"link\0" + target.encode() + b"\0")
    link = guest.lookup("link")
    assert stat.S_ISLNK(link.mode)
    for name in (b"passwd\0", b"etc\0", b"real\0"):
        assert guest.error(Opcode.LOOKUP, link.nodeid, name) == errno.ENOTDIR
    for opcode, body in by_name(b"passwd"):
        assert guest.error(opcode, link.nodeid, body) in (errno.ENOTDIR, errno.ESTALE), Opcode(opcode).name
    assert guest.error(Opcode.OPEN, link.nodeid, bytes(8)) == errno.EACCES
    assert guest.error(Opcode.OPENDIR, link.nodeid, bytes(8)) == errno.ENOTDIR
    assert guest.setattr(link.nodeid, 1, mode=0o777) == errno.EOPNOTSUPP
    assert guest.setattr(link.nodeid, 1 << 3, size=0) == errno.EINVAL
    body = struct.pack("<4I", os.O_RDWR, 0o644, 0, 0) + b"link\0"
    assert guest.error(Opcode.CREATE, ROOT, body) == errno.EACCES
    assert sorted(os.listdir(guest.tree)) == ["link", "real"]


def test_a_directory_that_becomes_a_link_is_not_followed_either(guest: Guest, tmp_path: Path) -> None:
    """Threat 2: the swap between look-up and use."""
    (guest.tree / "dir").mkdir()
    (guest.tree / "dir/file").write_text("inside")
    dir, file = guest.lookup("dir"), guest.lookup("dir", "file")
    (tmp_path / "file").write_text("outside")
    (guest.tree / "dir").rename(guest.tree / "was")
    (guest.tree / "dir").symlink_to(tmp_path)
    for opcode, body in by_name(b"file"):
        assert guest.error(opcode, dir.nodeid, body) == errno.ESTALE, Opcode(opcode).name
    for opcode, body in (
        (Opcode.OPEN, bytes(8)), (Opcode.GETATTR, bytes(16)), (Opcode.SETATTR, setattr_in(1 << 3)),
        (Opcode.LINK, struct.pack("<Q", file.nodeid) + b"x\0"),
    ):  # fmt: skip
        assert guest.error(opcode, file.nodeid if opcode != Opcode.LINK else ROOT, body) == errno.ESTALE
    assert (tmp_path / "file").read_text() == "outside"
    assert os.listdir(tmp_path) == ["file"]


def test_made_up_nodes_and_handles_are_refused(guest: Guest) -> None:
    """Threat 3: never given, forgotten, closed, of another file, of a directory."""
    a, a_handle = guest.create(ROOT, "a")
    b, b_handle = guest.create(ROOT, "b")
    for node in (0, 4, 1 << 32, (1 << 64) - 1):
        for opcode in Opcode:
            if opcode in (
                Opcode.INIT, Opcode.DESTROY, Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT,
                Opcode.RELEASE, Opcode.RELEASEDIR,
            ):  # fmt: skip
                continue
            body = dict(by_name(b"a")).get(opcode, bytes(88))
            if opcode == Opcode.WRITE:
                body = bytes(40)
            elif opcode == Opcode.LSEEK:
                body = struct.pack("<QQII", a_handle, 0, 3, 0)
            assert guest.error(opcode, node, body) == errno.ESTALE, opcode.name
    for handle in (0, a_handle, b_handle + 1, (1 << 64) - 1):
        assert guest.error(Opcode.READ, b.nodeid, transfer(handle, 0, 1)) == errno.EBADF
        assert guest.error(Opcode.WRITE, b.nodeid, transfer(handle, 0, 1), data=b"x") == errno.EBADF
        assert guest.setattr(b.nodeid, 1 << 3 | 1 << 6, fh=handle) == errno.EBADF
    assert guest.error(Opcode.READDIR, a.nodeid, transfer(a_handle, 0, 100)) == errno.EBADF
    assert guest.error(Opcode.READ, ROOT, transfer(guest.opendir(), 0, 100)) == errno.EBADF
    for _ in range(2):
        guest.ok(Opcode.RELEASE, b.nodeid, struct.pack("<QIIQ", b_handle, 0, 0, 0))
    assert guest.error(Opcode.READ, b.nodeid, transfer(b_handle, 0, 1)) == errno.EBADF


def test_an_id_is_never_another_files(guest: Guest) -> None:
    """Threat 3: what was forgotten stays stale, also when the same file is found again."""
    (guest.tree / "file").touch()
    first = guest.lookup("file").nodeid
    guest.forget(first, 1)
    assert guest.lookup("file").nodeid > first
    assert guest.error(Opcode.GETATTR, first, bytes(16)) == errno.ESTALE


def test_what_the_host_moves_away_is_out_of_reach(guest: Guest, tmp_path: Path) -> None:
    """Threat 4: a directory in use, moved out of what is shared."""
    (guest.tree / "dir/sub").mkdir(parents=True)
    (guest.tree / "dir/sub/file").write_text("was shared")
    sub, file = guest.lookup("dir", "sub"), guest.lookup("dir", "sub", "file")
    handle = guest.open(file.nodeid)
    os.rename(guest.tree / "dir", tmp_path / "dir")
    for opcode, body in by_name(b"file"):
        assert guest.error(opcode, sub.nodeid, body) == errno.ESTALE, Opcode(opcode).name
    assert guest.error(Opcode.OPENDIR, sub.nodeid, bytes(8)) == errno.ESTALE
    assert guest.error(Opcode.OPEN, file.nodeid, bytes(8)) == errno.ESTALE
    assert guest.read(file.nodeid, handle, 0, 100) == b"was shared", "what is open stays open"
    assert (tmp_path / "dir/sub/file").exists()


def test_another_file_in_the_place_of_one_is_not_touched(guest: Guest) -> None:
    """Threat 4: not even by O_TRUNC."""
    path = guest.tree / "file"
    path.write_text("one")
    node = guest.lookup("file").nodeid
    (guest.tree / "keep").hardlink_to(path)  # or its number may be used again
    path.unlink()
    path.write_text("another")
    assert guest.error(Opcode.OPEN, node, struct.pack("<II", os.O_RDWR | os.O_TRUNC, 0)) == errno.ESTALE
    assert guest.setattr(node, 1 << 3, size=0) == errno.ESTALE
    assert guest.setattr(node, 1, mode=0) == errno.ESTALE
    assert path.read_text() == "another"
    assert guest.lookup("file").nodeid != node


def test_forgetting_too_much_is_forgetting(guest: Guest) -> None:
    """Threat 5: counts beyond, twice, of the root, of nothing; a parent before its children."""
    (guest.tree / "dir").mkdir()
    (guest.tree / "dir/file").write_text("x")
    dir, file = guest.lookup("dir"), guest.lookup("dir", "file")
    guest.forget(dir.nodeid, (1 << 64) - 1)
    assert guest.error(Opcode.GETATTR, dir.nodeid, bytes(16)) == errno.ESTALE
    assert guest.getattr(file.nodeid).size == 1
    assert guest.counter("nodes") == 3, "the way to the file is still needed"
    for node, lookups in ((file.nodeid, 2), (file.nodeid, 1), (ROOT, 1 << 40), (99, 1), (0, 0)):
        guest.forget(node, lookups, queue=REQUESTS)
    assert guest.counter("nodes") == 1
    assert guest.lookup("dir", "file").nodeid


def test_forgets_come_in_batches_and_cut_short(guest: Guest) -> None:
    """Threat 5: BATCH_FORGET with a count that is true, and with one that is not."""
    for n in range(20):
        (guest.tree / str(n)).touch()
    nodes = [guest.lookup(str(n)).nodeid for n in range(20)]

    def batch(count: int, given: list[int]) -> None:
        body = struct.pack("<II", count, 0) + b"".join(struct.pack("<QQ", n, 1) for n in given)
        head = struct.pack("<IIQQIIII", 40 + len(body), Opcode.BATCH_FORGET, 0, 0, 0, 0, 0, 0)
        assert guest.send(head, body, queue=HIPRIO) == b""

    batch(21, nodes)
    batch((1 << 32) - 1, nodes)
    assert guest.counter("nodes") == 21
    batch(20, nodes)
    assert guest.counter("nodes") == 1
    assert guest.counter("errors") == 2


def test_nodes_and_files_have_a_limit(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threat 6: ENFILE, and room again after forgetting and closing."""
    monkeypatch.setattr(backend, "NODES_MAX", 4)
    monkeypatch.setattr(backend, "FILES_MAX", 2)
    before = len(os.listdir("/proc/self/fd"))
    entries = [guest.create(ROOT, name) for name in "ab"]
    assert guest.error(Opcode.OPENDIR, ROOT, bytes(8)) == errno.ENFILE
    (node, handle), _ = entries
    guest.ok(Opcode.RELEASE, node.nodeid, struct.pack("<QIIQ", handle, 0, 0, 0))
    third = guest.create(ROOT, "c")[0]
    assert guest.error(Opcode.MKDIR, ROOT, struct.pack("<II", 0o755, 0) + b"d\0") == errno.ENFILE
    guest.forget(third.nodeid, 1)
    guest.lookup("d")
    guest.ok(Opcode.DESTROY, 0)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_limit_on_files_is_within_the_processs(bench: Any) -> None:
    """Threat 6: RLIMIT_NOFILE leaves room for what is opened only for a moment."""
    assert CATALOG["virtio-fs"].opens >= backend.FILES_MAX + 16


@pytest.mark.parametrize(
    "kind", [stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR, 0xF000]
)
def test_only_regular_files_are_made(guest: Guest, kind: int) -> None:
    """Threat 7: by MKNOD."""
    body = struct.pack("<4I", kind | 0o666, 0x103, 0, 0) + b"special\0"
    assert guest.error(Opcode.MKNOD, ROOT, body) == errno.EPERM
    assert os.listdir(guest.tree) == []


def test_the_hosts_special_files_are_seen_and_not_opened(guest: Guest) -> None:
    """Threat 7: nor waited for."""
    os.mkfifo(guest.tree / "fifo")
    node = guest.lookup("fifo")
    assert stat.S_ISFIFO(node.mode)
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        assert guest.error(Opcode.OPEN, node.nodeid, struct.pack("<II", flags, 0)) == errno.EACCES
    assert guest.error(Opcode.CREATE, ROOT, struct.pack("<4I", 0, 0, 0, 0) + b"fifo\0") == errno.EACCES
    assert guest.setattr(node.nodeid, 1, mode=0o777) == errno.EOPNOTSUPP


def test_a_file_that_becomes_a_fifo_does_not_block(guest: Guest) -> None:
    """Threat 7: the swap between look-up and use."""
    (guest.tree / "file").touch()
    node = guest.lookup("file")
    (guest.tree / "file").unlink()
    os.mkfifo(guest.tree / "file")
    for flags in (os.O_RDONLY, os.O_WRONLY):
        assert guest.error(Opcode.OPEN, node.nodeid, struct.pack("<II", flags, 0)) in (
            errno.ESTALE,
            errno.ENXIO,
        )


def test_no_bits_are_set_that_the_host_would_honour(guest: Guest) -> None:
    """Threat 8: by CREATE, MKNOD, MKDIR, SETATTR; and no owner."""
    entry, _ = guest.create(ROOT, "a", 0o7777)
    guest.ok(Opcode.MKNOD, ROOT, struct.pack("<4I", stat.S_IFREG | 0o7777, 0, 0, 0) + b"b\0")
    guest.ok(Opcode.MKDIR, ROOT, struct.pack("<II", 0o7777, 0) + b"c\0")
    assert guest.setattr(entry.nodeid, 1, mode=0o7755) == 0
    for name in "abc":
        assert not (guest.tree / name).stat().st_mode & 0o6000
    assert stat.S_IMODE((guest.tree / "a").stat().st_mode) == 0o1755
    for valid, owner in ((1 << 1, {"uid": 1000}), (1 << 2, {"gid": 1000}), (3 << 1, {"uid": 0, "gid": 5})):
        assert guest.setattr(entry.nodeid, valid, **owner) == errno.EPERM
    assert guest.setattr(entry.nodeid, 3 << 1, uid=0, gid=0) == 0, "it is so already"


def test_nothing_that_is_read_only_changes(bench: Any) -> None:
    """Threat 9: every request that could."""
    guest = Guest(bench, read_only=1)
    (guest.tree / "file").write_text("as it was")
    (guest.tree / "dir").mkdir()
    file = guest.lookup("file").nodeid
    for opcode, body in [
        *((o, b) for o, b in by_name(b"file") if o != Opcode.LOOKUP),
        (Opcode.SETATTR, setattr_in(1 << 3)),
        (Opcode.WRITE, transfer(1, 0, 0)),
        (Opcode.FALLOCATE, bytes(32)),
    ]:
        assert guest.error(opcode, ROOT, body) == errno.EROFS, Opcode(opcode).name
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        assert guest.error(Opcode.OPEN, file, struct.pack("<II", flags, 0)) == errno.EROFS
    handle = guest.open(file, os.O_RDONLY)
    assert guest.read(file, handle, 0, 100) == b"as it was"
    assert sorted(os.listdir(guest.tree)) == ["dir", "file"]


@pytest.mark.parametrize("parts", [(b"x" * 39, 4096), (bytes(40),), (bytes(40), 15)])
def test_a_chain_without_room_for_headers_needs_a_reset(bench: Any, parts: tuple[bytes | int, ...]) -> None:
    """Threat 10: and only that."""
    guest = Guest(bench)
    guest.driver.queues[REQUESTS].request(*parts)
    guest.bench.kick("kick", REQUESTS)
    assert guest.driver.status & NEEDS_RESET
    guest.driver.start(V1)
    assert not guest.driver.status & NEEDS_RESET


def test_too_little_room_for_the_reply_and_nothing_is_done(guest: Guest) -> None:
    """Threat 10: nothing is made, opened or looked up that the driver would not know of."""
    (guest.tree / "file").touch()
    file = guest.lookup("file").nodeid
    for opcode, body in by_name(b"new"):
        if opcode in (Opcode.LOOKUP, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.CREATE, Opcode.LINK):
            assert guest.error(opcode, ROOT, body, room=127) == errno.EINVAL
    for opcode, node in (
        (Opcode.OPEN, file),
        (Opcode.OPENDIR, ROOT),
        (Opcode.GETATTR, file),
        (Opcode.STATFS, ROOT),
    ):
        assert guest.error(opcode, node, bytes(16), room=0) == errno.EINVAL
    guest.ok(Opcode.SYMLINK, ROOT, b"soft\0target\0")
    assert guest.error(Opcode.READLINK, guest.lookup("soft").nodeid, room=5) == errno.ENAMETOOLONG
    assert guest.error(Opcode.READDIR, ROOT, transfer(guest.opendir(), 0, 20)) == errno.EINVAL
    assert sorted(os.listdir(guest.tree)) == ["file", "soft"]
    assert (guest.counter("nodes"), guest.counter("open_files")) == (3, 1)


def test_arguments_that_are_cut_short_are_refused(guest: Guest) -> None:
    """Threat 11: every length from none to one too few."""
    (guest.tree / "file").touch()
    file = guest.lookup("file").nodeid
    lengths = {
        Opcode.INIT: 16, Opcode.GETATTR: 16, Opcode.SETATTR: 88, Opcode.OPEN: 8, Opcode.READ: 40,
        Opcode.RELEASE: 24, Opcode.FSYNC: 16, Opcode.FALLOCATE: 32, Opcode.LSEEK: 24, Opcode.READDIR: 40,
        Opcode.WRITE: 40,
    }  # fmt: skip
    for opcode, length in lengths.items():
        for size in {0, 1, length // 2, length - 1}:
            assert guest.error(opcode, file, bytes(size)) == errno.EINVAL, (opcode.name, size)
    for opcode, body in by_name(b"x"):
        for size in range(len(body)):
            assert guest.error(opcode, ROOT, body[:size]) == errno.EINVAL, (Opcode(opcode).name, size)
    for size in (1, 39, 41, 1 << 31):
        assert guest.error(Opcode.GETATTR, file, bytes(16), size=size) == errno.EINVAL
    assert guest.error(Opcode.LOOKUP, ROOT, bytes(1 << 15)) == errno.EINVAL
    assert guest.error(Opcode.WRITE, file, transfer(1, 0, 5), data=b"1234") == errno.EINVAL
    assert os.listdir(guest.tree) == ["file"]


def test_offsets_and_sizes_do_not_overflow(guest: Guest) -> None:
    """Threat 12: 63 bits and more, and times."""
    entry, handle = guest.create(ROOT, "file")
    for offset in (1 << 63, (1 << 64) - 1):
        assert guest.error(Opcode.READ, entry.nodeid, transfer(handle, offset, 10)) == errno.EINVAL
        assert guest.error(Opcode.WRITE, entry.nodeid, transfer(handle, offset, 1), data=b"x") == errno.EINVAL
        assert guest.setattr(entry.nodeid, 1 << 3, size=offset) == errno.EINVAL
        for body in ((handle, offset, 1), (handle, 0, offset)):
            request = struct.pack("<QQQII", *body, 0, 0)
            assert guest.error(Opcode.FALLOCATE, entry.nodeid, request) == errno.EINVAL
    last = (1 << 63) - 1
    assert guest.error(Opcode.WRITE, entry.nodeid, transfer(handle, last, 1), data=b"x")
    assert guest.error(Opcode.FALLOCATE, entry.nodeid, struct.pack("<QQQII", handle, last, last, 0, 0))
    assert guest.error(Opcode.READDIR, ROOT, transfer(guest.opendir(), 1 << 63, 512)) == errno.EINVAL
    assert guest.setattr(entry.nodeid, 1 << 4, atime_ns=10**9) == errno.EINVAL
    assert guest.ask(Opcode.READ, entry.nodeid, transfer(handle, 0, (1 << 32) - 1))[1] == b""


def test_a_transfer_is_bounded(guest: Guest) -> None:
    """Threat 12: however much room there is."""
    entry, handle = guest.create(ROOT, "file")
    os.truncate(guest.tree / "file", 4 << 20)
    request = transfer(handle, 0, 3 << 19)
    assert len(guest.ok(Opcode.READ, entry.nodeid, request, room=900_000)) == 900_000
    big = guest.bench.memory
    assert big.holds(0, 3 << 20)
    assert (
        guest.error(Opcode.WRITE, entry.nodeid, transfer(handle, 0, (1 << 20) + 1), data=b"x") == errno.EINVAL
    )


def test_nothing_before_a_session_and_a_new_one_starts_anew(bench: Any) -> None:
    """Threat 13: INIT first; again: everything is forgotten."""
    guest = Guest(bench, init=False)
    for opcode in (Opcode.LOOKUP, Opcode.GETATTR, Opcode.OPEN, Opcode.STATFS, 4096):
        assert guest.error(opcode, ROOT, bytes(88)) == errno.EIO
    guest.ok(Opcode.INIT, 0, struct.pack("<4I", 7, 31, 0, 0))
    entry, _ = guest.create(ROOT, "file")
    guest.ok(Opcode.INIT, 0, struct.pack("<4I", 7, 31, 0, 0))
    assert guest.error(Opcode.GETATTR, entry.nodeid, bytes(16)) == errno.ESTALE
    assert guest.counter("open_files") == 0


def test_requests_without_end_leave_room_for_others(guest: Guest) -> None:
    """Threat 14: a turn is 64 requests."""
    head = struct.pack("<IIQQIIII", 56, Opcode.GETATTR, 1, ROOT, 0, 0, 0, 0)
    queue = guest.driver.queues[REQUESTS]
    for _ in range(100):
        queue.request(head + bytes(16), 120)
    before = guest.counter("requests")
    guest.bench.ports["kick"][REQUESTS].handlers[0]()
    assert guest.counter("requests") == before + 64
    guest.bench.pump()
    assert len(queue.used()) == 100


def test_a_request_is_copied_once(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threat 15: what the driver changes after the first look does not count."""
    (guest.tree / "good").touch()
    reads: list[tuple[int, int]] = []
    memory = guest.bench.memory
    copy_out = memory.copy_out

    def watched(spans: Any, limit: int) -> bytes:
        spans = list(spans)
        data = copy_out(spans, limit)
        looked_at = part(spans, 0, limit)
        reads.extend(looked_at)
        for gpa, size in looked_at:  # the driver is quick
            memory.write(gpa, b"/" * size)
        return bytes(data)

    monkeypatch.setattr(memory, "copy_out", watched)
    entry = struct.pack("<IIQQIIII", 45, Opcode.LOOKUP, 9, ROOT, 0, 0, 0, 0) + b"good\0"
    queue = guest.driver.queues[REQUESTS]
    queue.request(entry, 200)
    guest.bench.kick("kick", REQUESTS)
    monkeypatch.undo()
    (used,) = queue.used()
    assert struct.unpack("<Ii", used.data[:8]) == (16 + 128, 0)
    at = [byte for gpa, size in reads for byte in range(gpa, gpa + size)]
    assert len(at) == len(set(at))


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs /proc to be a mount")
def test_other_mounts_are_not_reached() -> None:
    """Threat 16: /proc, were all of / shared, with its magic links."""
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        shared = backend.Directory(fd)
        with pytest.raises(OSError) as e:
            shared.lookup(shared.node(1), b"proc")
        assert e.value.errno == errno.EXDEV
    finally:
        os.close(fd)


def test_a_path_that_is_too_long_is_an_error(guest: Guest) -> None:
    """Threat 4: of the host's file system, too; what is there stays reachable."""
    at, name, deep = ROOT, "d" * 255, 0
    body = struct.pack("<II", 0o755, 0) + name.encode() + b"\0"
    while not (done := guest.ask(Opcode.MKDIR, at, body))[0]:
        at = struct.unpack("<Q", done[1][:8])[0]
        deep += 1
    error = done[0]
    assert error == errno.ENAMETOOLONG
    assert 14 < deep < 18
    assert guest.lookup(name).nodeid


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_any_bytes_are_answered(bench: Any, data: Any) -> None:
    """Threat 11: by a reply, and the device goes on."""
    guest = Guest(bench)
    opcodes = st.sampled_from([*Opcode, 21, 4096]) | st.integers(0, (1 << 32) - 1)
    names = st.sampled_from([b"a\0", b"b\0", b"..\0", b"a\0b\0", b"a/b\0", b"\0"]) | st.binary(max_size=20)
    for _ in range(data.draw(st.integers(1, 8))):
        opcode = data.draw(opcodes)
        node = data.draw(st.integers(0, 6))
        words = data.draw(st.lists(st.integers(0, 6) | st.integers(0, (1 << 64) - 1), max_size=12))
        body = b"".join(struct.pack("<Q", w) for w in words) + data.draw(names)
        if opcode in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
            head = struct.pack("<IIQQIIII", 40 + len(body), opcode, 0, node, 0, 0, 0, 0)
            assert guest.send(*(p for p in (head, body) if p)) == b""
        else:
            error, _ = guest.ask(opcode, node, body, room=data.draw(st.sampled_from([0, 16, 200, 4096])))
            assert error in errno.errorcode or error == 0
    assert not guest.driver.status & NEEDS_RESET
