"""QEMU as the front end: Debian's drivers on our disk, card and random numbers, one boot under TCG."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from integration.boot import images
from integration.testbed import debian
from integration.testbed.qemu import qemu
from integration.vhost.client import BackEnd

MIB = 1 << 20
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "ext4")
SCRIPT = r"""
echo  # the line that SeaBIOS has begun
sha() { sha256sum | cut -d' ' -f1; }
echo "read: $(dd if=/dev/vda bs=64k 2>/dev/null | sha)"
dd if=/dev/urandom of=/tmp/x bs=4k count=256 2>/dev/null
dd if=/tmp/x of=/dev/vda bs=64k seek=8 conv=fsync 2>/dev/null && echo "wrote: $(sha < /tmp/x)"
echo "serial: $(cat /sys/block/vda/serial)"
mkdir /mnt && mount -t ext4 /dev/vdb /mnt && cp /tmp/x /mnt/x && umount /mnt && echo "mounted: yes"

cd /sys/bus/virtio/drivers/virtio_blk
for n in 1 2; do for d in virtio*; do echo $d > unbind; echo $d > bind; done; done
mount -t ext4 /dev/vdb /mnt && echo "again: $(sha < /mnt/x)" && umount /mnt
cd /

ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up
ping -c 3 -W 10 192.0.2.1 >/dev/null && echo "ping: yes"
echo "random: $(head -c 16 /dev/hwrng | wc -c)"
dmesg | grep -E 'BUG|Oops|WARNING:|I/O error|nobody cared|virtio.*(fail|error)' | sed 's/^/trouble: /'
poweroff -f
"""
APPEND = (
    "console=ttyS0 quiet panic=-1 mitigations=off nokaslr tsc=reliable nowatchdog audit=0 apparmor=0 "
    "initcall_blacklist=ima_init,init_evm"
)
TAP = "ip tuntap add tap0 mode tap && ip addr add 192.0.2.1/24 dev tap0 && ip link set tap0 up && exec "


@pytest.fixture
def kernel() -> debian.Kernel:
    try:
        qemu()
        return images.kernel(images.CLOUD)
    except images.TestbedError as e:
        pytest.skip(str(e))


def test_debian_uses_our_devices_under_qemu(tmp_path: Path, kernel: debian.Kernel) -> None:
    if os.geteuid() != 0 or not os.path.exists("/dev/net/tun"):
        pytest.skip("making a tap in a network namespace needs root and /dev/net/tun")
    if shutil.which("mke2fs") is None:
        pytest.skip("mke2fs (Debian: e2fsprogs) is not installed")
    raw, fs = tmp_path / "raw", tmp_path / "fs"
    content = os.urandom(4 * MIB)
    raw.write_bytes(content)
    fs.write_bytes(b"")
    os.truncate(fs, 16 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", fs], check=True)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(images.initramfs(SCRIPT, kernel, MODULES))
    devices = {
        "vhost-user-blk-pci": ("block", "--block", f"{raw},id=abroad"),
        "vhost-user-blk-pci,num-queues=1": ("block", "--block", str(fs)),
        # With MSI-X, QEMU 7.2's virtio-net dereferences NULL in its own vhost_net_start, unless KVM is there.
        "virtio-net-pci,vectors=0,romfile=": ("net", "--net", "tap0"),
        "vhost-user-rng-pci": ("rng",),
    }
    words: list[str] = []
    running: list[BackEnd] = []
    try:
        for n, (device, what) in enumerate(devices.items()):
            path = tmp_path / f"{n}"
            before = ("unshare", "--net", "sh", "-c", TAP + '"$@"', "sh") if what[0] == "net" else ()
            running.append(BackEnd(path, *what, before=before))
            words += ["-chardev", f"socket,id=c{n},path={path}"]
            end = f"netdev=n{n}" if what[0] == "net" else f"chardev=c{n}"
            if what[0] == "net":
                words += ["-netdev", f"vhost-user,id=n{n},chardev=c{n}"]
            words += ["-device", f"{device},{end}"]
        guest = subprocess.run(
            [
                qemu(), "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "192", "-nodefaults",
                "-nographic", "-no-reboot", "-serial", "stdio",
                "-object", "memory-backend-memfd,id=mem,size=192M,share=on", "-numa", "node,memdev=mem",
                "-kernel", str(kernel.bzimage), "-initrd", str(initrd),
                "-append", APPEND, *words,
            ],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        ends = [b.stop() for b in running]
    finally:
        for b in running:
            b.process.kill()
    said = dict(re.findall(r"^(\w+): (.*?)\r?$", guest.stdout, re.M))
    written = raw.read_bytes()[512 * 1024 : 512 * 1024 + MIB]
    assert said == {
        "read": hashlib.sha256(content).hexdigest(),
        "wrote": hashlib.sha256(written).hexdigest(),
        "serial": "abroad",
        "mounted": "yes",
        "again": hashlib.sha256(written).hexdigest(),
        "ping": "yes",
        "random": "16",
    }, guest.stdout + guest.stderr
    assert ends == [(143, "vmsup: ended by SIGTERM\n")] * len(devices)
    subprocess.run(["e2fsck", "-fn", fs], check=True, capture_output=True)
