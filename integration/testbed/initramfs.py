"""Initramfs images: a cpio "newc" archive of busybox, a script and kernel modules, the same bytes every time.

Format: Documentation/driver-api/early-userspace/buffer-format.rst.  Left out: compression (reading plain
bytes is cheaper than decompressing under emulation), hard links, times and owners (all zero).
"""

from __future__ import annotations

import lzma
import re
import stat
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from integration.testbed.debian import Kernel, TestbedError, tool


@dataclass(frozen=True)
class Node:
    """One entry: file type and permissions, contents (of a symlink: its target), device number."""

    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)


DIRECTORY = Node(stat.S_IFDIR | 0o755)


def file(data: bytes, mode: int = 0o755) -> Node:
    return Node(stat.S_IFREG | mode, data)


def symlink(target: str) -> Node:
    return Node(stat.S_IFLNK | 0o777, target.encode())


def archive(nodes: Mapping[str, Node]) -> bytes:
    """The archive of `nodes`, by path without a leading slash; parent directories are added."""
    whole = dict(nodes)
    for path in nodes:
        for parent in PurePosixPath(path).parents[:-1]:
            whole.setdefault(str(parent), DIRECTORY)
    entries = [*sorted(whole.items()), ("TRAILER!!!", Node(0))]  # a directory sorts before what is in it
    out = []
    for inode, (path, node) in enumerate(entries, 1):
        fields = (inode, node.mode, 0, 0, 1, 0, len(node.data), 0, 0, *node.rdev, len(path) + 1, 0)
        header = b"070701" + b"".join(b"%08X" % f for f in fields) + path.encode() + b"\0"
        out += [header, bytes(-len(header) % 4), node.data, bytes(-len(node.data) % 4)]
    return b"".join(out)


def busybox() -> dict[str, Node]:
    """A root file system of busybox and nothing else, with a link for each of its commands.

    Raises:
        TestbedError: busybox is missing.
    """
    program = tool("busybox", "busybox-static")
    names = subprocess.run([program, "--list"], check=True, text=True, capture_output=True).stdout.split()
    return {
        **{f"bin/{name}": symlink("busybox") for name in names},
        "bin/busybox": file(Path(program).read_bytes()),
        "dev/console": Node(stat.S_IFCHR | 0o600, rdev=(5, 1)),  # init's standard streams, before devtmpfs
        "proc": DIRECTORY,
        "sys": DIRECTORY,
        "tmp": DIRECTORY,
    }


def modules(kernel: Kernel, names: Iterable[str]) -> dict[str, Node]:
    """/modules: `names` and all they depend on, decompressed, and the file "order" to insert them by.

    A name that is built into the kernel needs nothing.

    Raises:
        TestbedError: the kernel has no such module.
    """
    found = {_canonical(path): path for path in kernel.modules.glob("kernel/**/*.ko*")}
    builtin = {_canonical(Path(line)) for line in (kernel.modules / "modules.builtin").read_text().split()}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name in builtin:
            return
        if name not in found:
            raise TestbedError(f"kernel {kernel.release} has no module {name}")
        raw = found[name].read_bytes()
        blob = lzma.decompress(raw) if found[name].suffix == ".xz" else raw
        depends = re.search(rb"\0depends=([^\0]*)\0", blob)
        for needed in depends[1].decode().split(",") if depends and depends[1] else ():
            add(needed.replace("-", "_"))
        ordered[name] = blob

    for name in names:
        add(name.replace("-", "_"))
    return {
        "modules/order": file("".join(f"{name}\n" for name in ordered).encode(), 0o644),
        **{f"modules/{name}.ko": file(blob, 0o644) for name, blob in ordered.items()},
    }


def _canonical(path: Path) -> str:
    # A module is kvm-amd.ko on disk, kvm_amd in "depends=" and in /proc/modules.
    return path.name.partition(".ko")[0].replace("-", "_")


def program(path: str) -> dict[str, Node]:
    """A dynamically linked program of this machine with the libraries that ldd names, at the same paths.

    Raises:
        TestbedError: it is not there.
    """
    if not Path(path).exists():
        raise TestbedError(f"{path} is not on this machine")
    linked = subprocess.run(["ldd", path], check=True, text=True, capture_output=True).stdout
    needed = [path, *re.findall(r"(/\S+) \(0x", linked)]
    return {name.lstrip("/"): file(Path(name).read_bytes()) for name in needed}
