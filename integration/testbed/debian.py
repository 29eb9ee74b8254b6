"""Debian's kernels, downloaded by package name through apt and unpacked into the cache; nothing is installed.

What is inside a bzImage: Documentation/arch/x86/boot.rst, fields setup_sects, payload_offset, payload_length.
Left out: kernels compressed with anything but xz (Debian's generic flavour) and lz4 (its cloud flavour).
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from integration.testbed import cache

GENERIC = "linux-image-amd64"
CLOUD = "linux-image-cloud-amd64"  # no MP-table support, no 9p, most of virtio as modules

# Two thirds of the generic flavour, and no virtual machine here has the hardware.
_UNWANTED = (
    "sound",
    "drivers/gpu",
    "drivers/media",
    "drivers/net/ethernet",
    "drivers/net/wireless",
    "drivers/staging",
)


class TestbedError(Exception):
    """The testbed cannot be had, or failed; one line, perhaps followed by the tail of a log."""

    __test__ = False  # its name would make pytest look for tests in it


@dataclass(frozen=True)
class Kernel:
    """One unpacked kernel package."""

    root: Path

    @property
    def modules(self) -> Path:
        """lib/modules/RELEASE."""
        return next((self.root / "lib/modules").iterdir())

    @property
    def release(self) -> str:
        """What `uname -r` says."""
        return self.modules.name

    @property
    def bzimage(self) -> Path:
        """The image exactly as Debian ships it."""
        return self.root / "boot" / f"vmlinuz-{self.release}"

    @property
    def vmlinux(self) -> Path:
        """The ELF file that was compressed inside `bzimage`."""
        return self.root / "vmlinux"


def tool(name: str, package: str) -> str:
    """The path of a program.

    Raises:
        TestbedError: it is not installed; names the Debian package.
    """
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise TestbedError(f"{name} not found: install the Debian package {package}")
    return path


def kernel(package: str) -> Kernel:
    """The kernel that the metapackage `package` (GENERIC or CLOUD) stands for.

    Raises:
        TestbedError: it is not in the cache and cannot be downloaded or unpacked.
    """
    return Kernel(cache.once(package, lambda into: _fetch(package, into)))


def _fetch(package: str, into: Path) -> None:
    depends = _apt("apt-cache", "depends", package, cwd=into)
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise TestbedError(f"apt knows no kernel behind {package}: run apt-get update")
    _apt("apt-get", "download", found[1], cwd=into)
    (deb,) = into.glob("*.deb")
    excludes = [f"--exclude=./lib/modules/*/kernel/{d}" for d in _UNWANTED]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as unpacked:
        subprocess.run(
            ["tar", "-x", *excludes, "./boot", "./lib"], cwd=into, stdin=unpacked.stdout, check=True
        )
    if unpacked.returncode:
        raise TestbedError(f"dpkg-deb cannot unpack {deb.name}")
    deb.unlink()
    unpacked_kernel = Kernel(into)
    unpacked_kernel.vmlinux.write_bytes(elf_inside(unpacked_kernel.bzimage.read_bytes()))


def _apt(*command: str, cwd: Path) -> str:
    try:
        return subprocess.run(command, cwd=cwd, check=True, text=True, capture_output=True).stdout
    except FileNotFoundError:
        raise TestbedError(
            f"{command[0]} not found: kernels come from Debian packages, through apt"
        ) from None
    except subprocess.CalledProcessError as e:
        last = (e.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise TestbedError(f"{' '.join(command)}: {last} (is apt-get update needed?)") from None


def elf_inside(bzimage: bytes) -> bytes:
    """The uncompressed ELF kernel inside a bzImage.

    Raises:
        TestbedError: it is compressed in a way not known here.
    """
    setup_sects = bzimage[0x1F1] or 4  # boot.rst: "if this field contains 0, the real value is 4"
    start = (setup_sects + 1) * 512 + int.from_bytes(bzimage[0x248:0x24C], "little")
    payload = bzimage[start : start + int.from_bytes(bzimage[0x24C:0x250], "little")]
    if payload.startswith(b"\xfd7zXZ\0"):
        elf = lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
    elif payload.startswith(b"\x02\x21\x4c\x18"):
        # The kernel's build appends the uncompressed size, which lz4 would take for one more block.
        lz4 = [tool("lz4", "lz4"), "-dc"]
        elf = subprocess.run(lz4, input=payload[:-4], check=True, capture_output=True).stdout
    else:
        raise TestbedError(f"a kernel compressed with magic {payload[:4].hex()}; only xz and lz4 are known")
    if not elf.startswith(b"\x7fELF"):
        raise TestbedError("no ELF file inside the bzImage")
    return elf
