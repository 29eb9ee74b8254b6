"""A directory in its full jail: served as whoever owns it, and with nothing else in reach."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devproc.catalog import CATALOG
from devproc.fuse import Opcode
from devproc.virtio import spec
from integration.ordinary import let_in
from supervisor.attest import attest

V1 = spec.F_VERSION_1
EVERY_RING = spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED
MEMORY = 16 << 20, 0
USER = 1000
OWNER = 4321
ROOM = 4096
REQUESTS = 1

Ask = tuple[bytes | int, ...]


def ask(opcode: int, nodeid: int = 1, body: bytes = b"", room: int = ROOM) -> Ask:
    head = struct.pack("<IIQQIIII", 40 + len(body), opcode, 7, nodeid, 0, 0, 0, 0)
    return (head + body, 16, *([room] if room else []))


def transfer(handle: int, offset: int, size: int) -> bytes:
    return struct.pack("<QQIIQII", handle, offset, size, 0, 0, 0, 0)


def errors(answers: list[bytes]) -> list[str]:
    """What each was answered by, as a word."""
    found = [-struct.unpack("<Ii", a[:8])[1] for a in answers]
    return [errno.errorcode[e] if e else "ok" for e in found]


INIT = ask(Opcode.INIT, 0, struct.pack("<4I", 7, 38, 0, 0))


@pytest.fixture
def tree(supervisor: Any, tmp_path: Path) -> Iterator[Path]:
    let_in(tmp_path)
    shared = tmp_path / "shared"
    (shared / "dir").mkdir(parents=True)
    (shared / "dir/file").write_bytes(b"shared with the guest")
    (shared / "out").symlink_to("/")
    (tmp_path / "secret").write_bytes(b"not shared")
    if os.geteuid() == 0:
        owner = OWNER if supervisor.who == "root" else USER
        for path in shared, *shared.rglob("*"):
            os.chown(path, owner, owner, follow_symlinks=False)
    yield shared


def start(supervisor: Any, tree: Path, read_only: int = 0) -> int:
    params = (*MEMORY, b"tag", read_only)
    host_id = 2_000_002 if supervisor.who == "root" else 0
    answer = supervisor(
        "spawn", "virtio-fs", "fs", params=params, images={"directory": str(tree)}, host_id=host_id
    )
    return int(answer["pid"])


# Node 2 is what the first look-up, or the first that is made, gets; handles count from 1.
EVERYTHING = [
    INIT,
    ask(Opcode.LOOKUP, 1, b"dir\0"),
    ask(Opcode.LOOKUP, 2, b"file\0"),
    ask(Opcode.OPEN, 3, struct.pack("<II", os.O_RDWR, 0)),
    ask(Opcode.READ, 3, transfer(1, 0, 6), 6),
    ask(Opcode.WRITE, 3, transfer(1, 0, 6) + b"SHARED"),
    ask(Opcode.FSYNC, 3, struct.pack("<QII", 1, 0, 0)),
    ask(Opcode.FALLOCATE, 3, struct.pack("<QQQII", 1, 0, 4096, 0, 0)),
    ask(Opcode.LSEEK, 3, struct.pack("<QQII", 1, 0, 4, 0)),
    ask(
        Opcode.SETATTR,
        3,
        struct.pack("<II6Q8I", 1 | 8 | 32, 0, 0, 21, 0, 0, 5, 0, 0, 0, 0, 0o600, 0, 0, 0, 0),
    ),
    ask(Opcode.RELEASE, 3, struct.pack("<QIIQ", 1, 0, 0, 0)),
    ask(
        Opcode.SETATTR,
        3,
        struct.pack("<II6Q8I", 1 | 8 | 32, 0, 0, 21, 0, 0, 5, 0, 0, 0, 0, 0o640, 0, 0, 0, 0),
    ),
    ask(Opcode.CREATE, 1, struct.pack("<4I", os.O_RDWR, 0o666, 0, 0) + b"made\0"),
    ask(Opcode.MKDIR, 1, struct.pack("<II", 0o777, 0) + b"new\0"),
    ask(Opcode.MKNOD, 5, struct.pack("<4I", 0o100644, 0, 0, 0) + b"node\0"),
    ask(Opcode.SYMLINK, 5, b"soft\0/etc/passwd\0"),
    ask(Opcode.READLINK, 7),
    ask(Opcode.LINK, 5, struct.pack("<Q", 3) + b"hard\0"),
    ask(Opcode.RENAME2, 5, struct.pack("<QII", 1, 1, 0) + b"soft\0moved\0"),
    ask(Opcode.UNLINK, 5, b"hard\0"),
    ask(Opcode.UNLINK, 5, b"node\0"),
    ask(Opcode.RMDIR, 1, b"new\0"),
    ask(Opcode.OPENDIR, 1, bytes(8)),
    ask(Opcode.READDIRPLUS, 1, transfer(3, 0, ROOM)),
    ask(Opcode.STATFS),
    ask(Opcode.DESTROY, 0),
]


@pytest.mark.parametrize("features", [V1, V1 | EVERY_RING], ids=["split", "packed"])
def test_it_does_everything_its_policy_is_for(supervisor: Any, tree: Path, features: int) -> None:
    start(supervisor, tree)
    answers = supervisor("converse", "fs", features, EVERYTHING, REQUESTS)
    assert errors(answers) == ["ok"] * len(EVERYTHING)
    assert answers[4][16:] == b"shared"
    assert answers[16][16:] == b"/etc/passwd"
    assert sorted(os.listdir(tree)) == ["dir", "made", "moved", "out"]
    file, made = tree / "dir/file", tree / "made"
    assert file.read_bytes() == b"SHARED with the guest"
    assert (file.stat().st_mtime, file.stat().st_mode) == (5, 0o100640)
    assert made.stat().st_mode == 0o100666, "no mask of ours"
    assert (made.stat().st_uid, made.stat().st_gid) == (tree.stat().st_uid, tree.stat().st_gid)
    assert supervisor("ask_ping", "fs") == 7
    assert supervisor("stop", "fs") == (os.CLD_EXITED, 0)


def test_nothing_but_what_is_shared_is_in_reach(supervisor: Any, tree: Path) -> None:
    start(supervisor, tree)
    answers = supervisor(
        "converse",
        "fs",
        V1,
        [
            INIT,
            ask(Opcode.LOOKUP, 1, b"out\0"),
            ask(Opcode.LOOKUP, 2, b"etc\0"),
            ask(Opcode.LOOKUP, 1, b"..\0"),
            ask(Opcode.LOOKUP, 1, b"../secret\0"),
            ask(Opcode.LOOKUP, 1, b"secret\0"),
            ask(Opcode.LINK, 1, struct.pack("<Q", 2) + b"again\0"),
            ask(Opcode.MKNOD, 1, struct.pack("<4I", 0o020666, 0x103, 0, 0) + b"null\0"),
        ],
        REQUESTS,
    )
    assert errors(answers) == ["ok", "ok", "ENOTDIR", "EINVAL", "EINVAL", "ENOENT", "ok", "EPERM"]
    assert supervisor("stop", "fs") == (os.CLD_EXITED, 0)


def test_what_is_read_only_is_so_for_the_kernel_too(supervisor: Any, tree: Path) -> None:
    pid = start(supervisor, tree, read_only=1)
    changed = supervisor(
        "converse", "fs", V1, [INIT, EVERYTHING[12], ask(Opcode.LOOKUP, 1, b"dir\0")], REQUESTS
    )
    assert errors(changed) == ["ok", "EROFS", "ok"]
    if os.geteuid() == 0:
        mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
        assert all({"ro", "nosuid", "nodev", "noexec"} <= set(m[5].split(",")) for m in mounts)
    assert supervisor("stop", "fs") == (os.CLD_EXITED, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="much of a device is hidden from all but root")
def test_its_jail_is_as_declared(supervisor: Any, tree: Path) -> None:
    pid = start(supervisor, tree)
    findings = attest([("fs", pid, CATALOG["virtio-fs"])], supervisor.pid).unproven
    assert [str(f) for f in findings if f.process == "fs"] == []
    assert os.listdir(f"/proc/{pid}/root/dir") == ["file"]
    mounts = [line.split() for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()]
    assert {m[4] for m in mounts} == {"/"}
    assert supervisor("stop", "fs") == (os.CLD_EXITED, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root's directories")
def test_what_root_shares_of_its_own_is_served_without_its_capabilities(supervisor: Any, tree: Path) -> None:
    if supervisor.who != "root":
        pytest.skip("an ordinary user has no directory of root's")
    for path in tree, tree / "dir":
        os.chown(path, 0, 0)
    os.chown(tree / "dir/file", OWNER, OWNER)
    (tree / "dir/file").chmod(0o600)
    pid = start(supervisor, tree)
    assert "CapEff:\t0000000000000000" in Path(f"/proc/{pid}/status").read_text()
    open_it = ask(Opcode.OPEN, 3, struct.pack("<II", os.O_RDONLY, 0))
    answers = supervisor("converse", "fs", V1, [*EVERYTHING[:3], open_it, EVERYTHING[12]], REQUESTS)
    assert errors(answers) == ["ok", "ok", "ok", "EACCES", "ok"]
    assert (tree / "made").stat().st_uid == 0
    assert supervisor("stop", "fs") == (os.CLD_EXITED, 0)
