"""What Debian's drivers ask of every device that can be recorded, kept and said again in jails of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm

pytestmark = pytest.mark.linux

MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_balloon", "virtio_rng", "ext4")
TAP, HOST, GUEST = "tap0", "192.0.2.1", "192.0.2.2"
NAMESPACE = rf"""
ip link set lo up
ip tuntap add {TAP} mode tap
ip address add {HOST}/24 dev {TAP}
ip link set {TAP} up
"$@"
"""
SCRIPT = rf"""
dd if=/dev/vda of=/disk bs=64k 2> /dev/null
dd if=/disk of=/dev/vda bs=4k seek=512 count=256 conv=fsync 2> /dev/null && echo "written: yes"
ip address add {GUEST}/24 dev eth0; ip link set eth0 up
ping -c 5 -A {HOST} | sed -n 's/ packets received.*//p' | sed 's/.*, /pings: /'
echo "random: $(dd if=/dev/hwrng bs=16 count=4 2> /dev/null | wc -c)"
echo "from the guest" > /dev/hvc0
dd if=/dev/vdb of=/dev/null bs=1M count=1 2> /dev/null || echo "second: none"
hwclock -u > /dev/null 2>&1
dmesg | grep -E 'BUG|Oops|WARNING:|I/O error|soft lockup|virtio.*(fail|error)' | sed 's/^/trouble: /'
"""
DEVICES = ("serial1", "pit", "rtc", "i8042", "pci-host", "acpi-pm", "block1", "net1", "console", "balloon")


def test_what_linux_has_asked_is_answered_again_as_it_was(tmp_path: Path, booted: Callable[[], None]) -> None:
    kernel = images.kernel(images.CLOUD)
    initrd, disk, record = tmp_path / "initrd", tmp_path / "disk", tmp_path / "record"
    script = images.POWEROFF.replace(images.REPORT, images.REPORT + SCRIPT)
    initrd.write_bytes(images.initramfs(script, kernel, MODULES))
    disk.write_bytes(os.urandom(4 << 20))
    words = [w for p in ("quiet", "tsc=reliable", "nokaslr", "mitigations=off") for w in ("-p", p)]
    console = f"type=file,path={tmp_path / 'console'},hardware=virtio-console"
    vmsup = vm.run(
        *("--jail", "--irqchip", "split", "--record", str(record), "-i", str(initrd), *words),
        *("--block", str(disk), "--net", TAP, "--balloon"),
        *("--serial", "type=stdio,num=1,console", "--serial", console),
        str(kernel.bzimage),
        user=("unshare", "--net", "sh", "-c", NAMESPACE, "sh"),
    )
    assert vmsup.code == 0, vmsup.errors
    booted()
    assert vmsup["written:"] == "yes"
    assert vmsup["pings:"] == "5"
    assert not [text for _, text in vmsup.lines if text.startswith("trouble:")], vmsup.console
    assert {f.stem for f in record.iterdir()} >= set(DEVICES)
    disk.unlink()
    replay = vm.command("replay", str(record))
    again = subprocess.run(replay, cwd=vm.ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    print(again.stdout)
