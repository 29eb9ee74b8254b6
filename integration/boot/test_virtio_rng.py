"""Debian's virtio_pci and virtio_rng on our function: by MSI-X, by INTA, after the driver was taken off."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm

pytestmark = pytest.mark.linux

SLOT = "0000:00:01.0"
SCRIPT = rf"""
cat /proc/iomem | grep {SLOT} | sed 's/^/iomem: /'
lspci -vv -s {SLOT} | sed 's/^/lspci: /'
echo "rng: $(cat /sys/class/misc/hw_random/rng_current)"
read_rng() {{ dd if=/dev/hwrng bs=512 count=8 2>/dev/null | sha256sum; }}
echo "first: $(read_rng)"
cd /sys/bus/virtio/drivers/virtio_rng
for n in 1 2 3; do echo virtio0 > unbind; echo virtio0 > bind; done
echo "second: $(read_rng)"
grep virtio /proc/interrupts | sed 's/^/interrupts: /'
dmesg | grep -E 'BUG|Oops|WARNING:|nobody cared|soft lockup|virtio.*(fail|error)' | sed 's/^/trouble: /'
"""


@pytest.mark.parametrize(("irqchip", "msi"), [("kernel", True), ("split", False)])
def test_linux_takes_random_numbers(
    tmp_path: Path, booted: Callable[[], None], irqchip: str, msi: bool
) -> None:
    kernel = images.kernel(images.CLOUD)
    initrd = tmp_path / "initrd"
    script = images.POWEROFF.replace(images.REPORT, images.REPORT + SCRIPT)
    files = images.program("/usr/bin/lspci")
    initrd.write_bytes(images.initramfs(script, kernel, ("virtio_pci", "virtio_rng"), files))
    words = ["quiet", "tsc=reliable", "nokaslr", "mitigations=off", *([] if msi else ["pci=nomsi"])]
    params = [w for p in words for w in ("-p", p)]
    vmsup = vm.run("--irqchip", irqchip, "-i", str(initrd), *params, str(kernel.bzimage))
    assert vmsup.code == 0, vmsup.errors
    booted()
    assert "trouble:" not in vmsup.console
    assert vmsup["rng:"] == "virtio_rng.0"
    assert re.fullmatch(r"[0-9a-f]{64}\s+-", vmsup["first:"])
    assert vmsup["first:"] != vmsup["second:"]
    interrupts = [text for _, text in vmsup.lines if text.startswith("interrupts:")]
    kind, name = ("MSI", "virtio0-input") if msi else ("IO-APIC", "virtio0")
    (line,) = [text for text in interrupts if text.split()[-1].startswith(name) and kind in text]
    assert int(line.split()[2]) > 8
    lspci = "\n".join(text for _, text in vmsup.lines if text.startswith("lspci:"))
    assert f"MSI-X: Enable{'+' if msi else '-'}" in lspci
    assert lspci.count("VirtIO: ") == 5
