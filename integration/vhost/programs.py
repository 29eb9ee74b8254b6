"""Debian's vhost-user back ends: QEMU's storage daemon, and virtiofsd."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_PATIENCE_S = 60
# QEMU 7.2's own, and the one in Rust that came after it.
_VIRTIOFSDS = {
    "/usr/lib/qemu/virtiofsd": ("-o", "source={}"),
    "/usr/libexec/virtiofsd": ("--shared-dir", "{}"),
}
_VIRTIOFSD = next((program for program in _VIRTIOFSDS if os.access(program, os.X_OK)), None)

NEEDS_STORAGE_DAEMON = pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None,
    reason="qemu-storage-daemon (Debian 12: qemu-system-common) is not installed",
)
NEEDS_VIRTIOFSD = pytest.mark.skipif(
    _VIRTIOFSD is None or os.geteuid() != 0,
    reason="virtiofsd (Debian 12: qemu-system-common) is not installed, or this is not root",
)

Program = subprocess.Popen[bytes]


@contextmanager
def storage_daemon(image: Path, path: Path) -> Iterator[Program]:
    """A disk with two queues."""
    export = f"type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={path},num-queues=2"
    blockdev = f"driver=file,node-name=d,filename={image},discard=unmap"
    yield from _listening(["qemu-storage-daemon", "--blockdev", blockdev, "--export", export], path)


@contextmanager
def virtiofsd(shared: Path, path: Path) -> Iterator[Program]:
    assert _VIRTIOFSD is not None
    words = [word.format(shared) for word in _VIRTIOFSDS[_VIRTIOFSD]]
    yield from _listening([_VIRTIOFSD, f"--socket-path={path}", *words], path)


def listens(pid: int, path: Path) -> bool:
    """Whether somebody listens at `path`, seen from process `pid`: it is there a moment before that."""
    try:
        sockets = Path(f"/proc/{pid}/net/unix").read_text().splitlines()
    except OSError:
        return False
    # Num RefCount Protocol Flags Type St Inode Path; the flag is __SO_ACCEPTCON
    return any(f"{path}" == s[-1] and s[3] == "00010000" for s in map(str.split, sockets))


def _listening(command: list[str], path: Path) -> Iterator[Program]:
    """The program, once it listens at `path`."""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as program:
        assert program.stderr is not None
        try:
            until_s = time.monotonic() + _PATIENCE_S
            while not listens(program.pid, path):
                assert program.poll() is None, program.stderr.read()
                assert time.monotonic() < until_s
                time.sleep(0.01)
            yield program
        finally:
            program.kill()
