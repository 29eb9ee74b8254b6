"""The archive as busybox's cpio reads it, and Debian's modules in an order that insmod accepts."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from integration.testbed import debian, initramfs


@pytest.fixture(scope="module")
def busybox() -> str:
    try:
        return debian.tool("busybox", "busybox-static")
    except debian.TestbedError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def kernel() -> debian.Kernel:
    try:
        return debian.kernel(debian.CLOUD)
    except debian.TestbedError as e:
        pytest.skip(str(e))


def test_busybox_cpio_unpacks_what_was_archived(busybox: str, tmp_path: Path) -> None:
    nodes = {
        "a/b/odd": initramfs.file(b"123", 0o640),
        "a/link": initramfs.symlink("b/odd"),
        "empty": initramfs.DIRECTORY,
    }
    image = initramfs.archive(nodes)
    subprocess.run([busybox, "cpio", "-idm"], cwd=tmp_path, input=image, check=True, capture_output=True)
    assert (tmp_path / "a/link").read_bytes() == b"123"
    assert (tmp_path / "a/link").readlink() == Path("b/odd")
    assert (tmp_path / "a/b/odd").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "empty").is_dir()


def test_archive_does_not_depend_on_the_order_of_its_nodes() -> None:
    one, two = {"x": initramfs.file(b"1")}, {"y/z": initramfs.file(b"2")}
    assert initramfs.archive(one | two) == initramfs.archive(two | one)


def test_a_module_comes_after_all_it_depends_on(kernel: debian.Kernel) -> None:
    nodes = initramfs.modules(kernel, ["virtio-blk", "virtio_net"])
    order = nodes["modules/order"].data.decode().split()
    assert {"virtio_blk", "virtio", "virtio_ring", "virtio_net", "net_failover"} <= set(order)
    for position, name in enumerate(order):
        depends = re.search(rb"\0depends=([^\0]*)\0", nodes[f"modules/{name}.ko"].data)
        assert depends is not None
        assert set(filter(None, depends[1].decode().replace("-", "_").split(","))) <= set(order[:position])


def test_a_built_in_module_needs_nothing_and_an_unknown_one_is_refused(kernel: debian.Kernel) -> None:
    assert initramfs.modules(kernel, ["8250"]).keys() == {"modules/order"}
    with pytest.raises(debian.TestbedError, match="has no module nonesuch"):
        initramfs.modules(kernel, ["nonesuch"])


@pytest.mark.parametrize("package", [debian.GENERIC, debian.CLOUD])
def test_the_elf_inside_debians_bzimage_is_an_x86_64_executable(package: str) -> None:
    try:
        kernel = debian.kernel(package)
    except debian.TestbedError as e:
        pytest.skip(str(e))
    header = kernel.vmlinux.open("rb").read(20)
    assert header[:5] == b"\x7fELF\x02"
    assert header[16:20] == b"\x02\0\x3e\0"  # ET_EXEC, EM_X86_64
