"""Debian's drivers taken off our functions and put back, again and again, all of them in one guest."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm

pytestmark = pytest.mark.linux

HOST, GUEST = "192.0.2.1", "192.0.2.2"
TIMES = int(os.environ.get("VMSUP_RELOADS", "3"))  # fifty take a quarter of an hour in the testbed
DRIVERS = (
    "virtio_rng",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "virtiofs",
)
ON_TAP = f"""
ip tuntap add tap0 mode tap
ip address add {HOST}/24 dev tap0
ip link set tap0 up
exec "$@"
"""
SCRIPT = rf"""
times=$(seq {TIMES})
driver_of() {{ set -- /sys/bus/virtio/drivers/$1/virtio[0-9]*; [ -L "$1" ]; }}
# Linux breaks a console's queues when it goes: a port that is still coming then complains of no buffers.
settled() {{
    while [ $1 = virtio_console ] && [ ! -e /sys/kernel/debug/virtio-ports/vport*p0 ]; do sleep 0.1; done
}}
use() {{
    echo "$1-rng: $(dd if=/dev/hwrng bs=64 count=1 2>/dev/null | wc -c)"
    echo "$1-block: $(sha256sum < /dev/vda | cut -d' ' -f1)"
    ip address add {GUEST}/24 dev eth0; ip link set eth0 up
    echo "$1-net: $(ping -c 3 -i 0.2 {HOST} | grep -c 'bytes from')"
    echo "$1" > /dev/hvc0
    mount -t virtiofs share /mnt && echo "$1-fs: $(cat /mnt/file)"; umount /mnt
}}
mkdir -p /mnt; mount -t debugfs debugfs /sys/kernel/debug
use first
for driver in {" ".join(DRIVERS)}; do
    count=0
    for n in $times; do
        rmmod $driver && insmod /modules/$driver.ko && driver_of $driver && count=$((count + 1))
        settled $driver
    done
    echo "reloaded $driver: $count"
    cd /sys/bus/virtio/drivers/$driver
    set -- virtio[0-9]*; count=0
    for n in $times; do
        echo $1 > unbind && ! driver_of $driver && echo $1 > bind && driver_of $driver && count=$((count + 1))
        settled $driver
    done
    cd /
    echo "bound $driver: $count"
done
count=0
for n in $times; do
    rmmod virtio_pci && insmod /modules/virtio_pci.ko && count=$((count + 1))
    settled virtio_console
done
echo "reloaded virtio_pci: $count"
for driver in {" ".join(DRIVERS)}; do driver_of $driver || echo "lost: $driver"; done
use last
dmesg | grep -E 'BUG|Oops|WARNING|nobody cared|soft lockup|hung|(virtio|fuse|vsock|I/O).*(fail|error)' |
    sed 's/^/trouble: /'
"""


def test_every_driver_comes_and_goes_again_and_again(tmp_path: Path, booted: Callable[[], None]) -> None:
    if shutil.which("ip") is None:
        pytest.skip("there is no ip (Debian: iproute2)")
    kernel = images.kernel(images.CLOUD)
    initrd, disk, console, share = (tmp_path / name for name in ("initrd", "disk", "console", "share"))
    script = images.POWEROFF.replace(images.REPORT, images.REPORT + SCRIPT)
    initrd.write_bytes(images.initramfs(script, kernel, ("virtio_pci", *DRIVERS)))
    disk.write_bytes(os.urandom(1 << 20))
    share.mkdir()
    (share / "file").write_text("shared\n")
    words = [w for p in ("quiet", "tsc=reliable", "nokaslr", "mitigations=off") for w in ("-p", p)]
    vmsup = vm.run(
        *("--block", str(disk), "--net", "tap0", "--balloon", "--shared-dir", f"{share},tag=share"),
        *("--vsock", f"3,path={tmp_path}/v"),
        *("--serial", f"file,path={console},hardware=virtio-console", "--serial", "stdio,console"),
        *("-i", str(initrd), *words, str(kernel.bzimage)),
        user=("unshare", "--net", "sh", "-c", ON_TAP, "sh"),
        timeout_s=400 if TIMES < 10 else 3000,
    )
    assert vmsup.code == 0, vmsup.errors
    vmsup.find(images.UP)
    booted()
    assert "trouble:" not in vmsup.console, vmsup.console
    digest = hashlib.sha256(disk.read_bytes()).hexdigest()
    for when in ("first", "last"):
        said = [vmsup[f"{when}-{what}:"] for what in ("rng", "block", "net", "fs")]
        assert said == ["64", digest, "3", "shared"]
    for driver in DRIVERS:
        assert vmsup[f"reloaded {driver}:"] == vmsup[f"bound {driver}:"] == str(TIMES)
    assert vmsup["reloaded virtio_pci:"] == str(TIMES)
    assert "lost:" not in vmsup.console
    assert console.read_text().split() == ["first", "last"]
