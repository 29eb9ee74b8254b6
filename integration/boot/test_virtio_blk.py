"""Debian's virtio_blk and ext4 on our disks: bytes both ways, file systems that fsck finds clean, a root."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm
from integration.testbed import debian

pytestmark = pytest.mark.linux

MIB = 1 << 20
GROWN = 40 * MIB
WORDS = ("quiet", "tsc=reliable", "nokaslr", "mitigations=off")
MODULES = ("virtio_pci", "virtio_blk", "ext4")
SCRIPT = rf"""
sha() {{ sha256sum | cut -d' ' -f1; }}
echo "read: $(dd if=/dev/vda bs=64k 2>/dev/null | sha)"
dd if=/dev/urandom of=/tmp/x bs=4k count=256 2>/dev/null
dd if=/tmp/x of=/dev/vda bs=64k seek=8 conv=fsync 2>/dev/null && echo "wrote: $(sha < /tmp/x)"
dd if=/tmp/x of=/dev/vda bs=4k seek=2048 count=1 conv=fsync 2>/dev/null && echo "direct: yes"
echo "serial: $(cat /sys/block/vda/serial)"
for q in logical_block_size max_segments write_cache; do echo "$q: $(cat /sys/block/vda/queue/$q)"; done
echo "vectors: $(grep -c virtio.*req /proc/interrupts)"
blkdiscard -o 12582912 -l 1048576 /dev/vda && echo "discard: done"

echo "ro: $(cat /sys/block/vdb/ro)"
echo "packed: $(cut -c 35 /sys/block/vda/device/features /sys/block/vdb/device/features | tr -d '\n')"
dd if=/dev/zero of=/dev/vdb bs=512 count=1 2>/dev/null || echo "refused: yes"
echo "read-ro: $(dd if=/dev/vdb bs=64k 2>/dev/null | sha)"

mkdir -p /mnt
mount -t ext4 -o discard /dev/vdc /mnt && echo "mounted: yes"
echo "greeting: $(cat /mnt/greeting)"
cp /tmp/x /mnt/x && rm /mnt/bulk && sync
fstrim /mnt && echo "trimmed: yes"
umount /mnt && echo "unmounted: yes"

mkdir /fio && mount -t ext4 -o ro /dev/vdd /fio && cd /tmp
{images.FIO} --name=mixed --filename=/dev/vde --size=12m --rw=randrw --bsrange=4k-1m --direct=1 \
    --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --verify_state_save=0 \
    --thread --minimal > /tmp/fio && echo "verified: yes" || cat /tmp/fio
umount /fio

dmesg | grep -E 'BUG|Oops|WARNING:|I/O error|nobody cared|soft lockup|virtio.*(fail|error)' |
    grep -v 'dev vdb, sector 0 op 0x1:(WRITE)' | grep -v 'vdb, logical block 0, lost' | sed 's/^/trouble: /'
"""

SWITCH = """
for word in $(cat /proc/cmdline); do
    case $word in root=*) root=${word#root=} ;; ro|rw) mode=$word ;; esac
done
mkdir -p /root
mount -t ext4 -o "$mode" "$root" /root && exec switch_root /root /init
"""
INIT = """#!/bin/busybox sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
size() { busybox cat /sys/block/vda/size; }
before=$(size)
echo "root: $(busybox grep ' / ' /proc/mounts)"
for n in 0 1 2 3 4 5 6 7 8 9; do
    echo "file $n" > /file$n
    busybox sync && echo "synced: $n"
    if [ $n = 3 ]; then
        while [ $(size) = $before ]; do busybox sleep 0.1; done
        echo "size: $(size)"
    fi
    busybox dd if=/dev/zero of=/unsynced$n bs=64k count=20 2>/dev/null
done
busybox sleep 1000
"""


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    """A root file system of busybox with two more files, in a raw image."""
    if shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin") is None:
        pytest.skip("mke2fs (Debian: e2fsprogs) is not installed")
    root = tmp_path / "root"
    for name in ("bin", "proc", "sys", "dev"):
        (root / name).mkdir(parents=True)
    shutil.copy(debian.tool("busybox", "busybox-static"), root / "bin/busybox")
    (root / "init").write_text(INIT)
    (root / "init").chmod(0o755)
    (root / "greeting").write_text("from the host\n")
    (root / "bulk").write_bytes(os.urandom(6 * MIB))
    image = tmp_path / "ext4.raw"
    subprocess.run(
        ["/usr/sbin/mke2fs", "-q", "-t", "ext4", "-d", str(root), str(image), "32M"], check=True, timeout=60
    )
    return image


@pytest.fixture
def fio() -> Path:
    """The image with fio on it."""
    try:
        return images.fio()
    except images.TestbedError as e:
        pytest.skip(str(e))


def clean(image: Path) -> bool:
    done = subprocess.run(
        ["/usr/sbin/e2fsck", "-fn", str(image)], capture_output=True, text=True, check=False
    )
    return done.returncode == 0


def file_in(image: Path, name: str) -> bytes:
    command = ["/usr/sbin/debugfs", "-R", f"cat /{name}", str(image)]
    return subprocess.run(command, capture_output=True, check=True).stdout


def run(tmp_path: Path, script: str, *options: str, params: tuple[str, ...] = ()) -> vm.Result:
    kernel = images.kernel(images.CLOUD)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(images.initramfs(script, kernel, MODULES))
    words = [w for p in (*WORDS, *params) for w in ("-p", p)]
    return vm.run("-i", str(initrd), *words, *options, str(kernel.bzimage))


def test_linux_reads_writes_discards_and_mounts(
    tmp_path: Path, booted: Callable[[], None], ext4: Path, fio: Path
) -> None:
    raw, ro, qcow2, scratch = (tmp_path / name for name in ("raw", "ro", "ext4.qcow2", "scratch"))
    before = os.urandom(16 * MIB)
    raw.write_bytes(before)
    ro.write_bytes(before)
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", "-f", "raw", str(ext4), str(qcow2)], check=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(scratch), "12M"], check=True)
    blocks = raw.stat().st_blocks
    vmsup = run(
        tmp_path,
        images.POWEROFF.replace(images.REPORT, images.REPORT + SCRIPT),
        *("-c", "2"),
        *("--block", f"{raw},id=the-first,queues=2"),
        *("--block", f"{ro},ro,packed-queue"),
        *("--block", f"{qcow2},format=qcow2"),
        *("--block", f"{fio},ro"),
        *("--block", f"{scratch},format=qcow2"),
    )
    assert vmsup.code == 0, vmsup.errors
    booted()
    digest = hashlib.sha256(before).hexdigest()
    assert vmsup["read:"] == vmsup["read-ro:"] == digest
    after = bytearray(raw.read_bytes())
    written = bytes(after[8 << 16 : (8 << 16) + MIB])
    assert hashlib.sha256(written).hexdigest() == vmsup["wrote:"]
    expected = bytearray(before)
    expected[8 << 16 : (8 << 16) + MIB] = written
    expected[8 * MIB : 8 * MIB + 4096] = written[:4096]
    expected[12 * MIB : 13 * MIB] = bytes(MIB)
    assert after == expected
    assert blocks - raw.stat().st_blocks == MIB // 512
    assert ro.read_bytes() == before
    assert vmsup["serial:"] == "the-first"
    assert (vmsup["logical_block_size:"], vmsup["max_segments:"]) == ("512", "254")
    assert vmsup["write_cache:"] == "write back"
    assert vmsup["packed:"] == "01"
    assert vmsup["vectors:"] == "6"  # two queues of one disk, and one of each other
    for yes in ("direct", "refused", "mounted", "trimmed", "unmounted", "verified"):
        assert vmsup[f"{yes}:"] == "yes"
    assert (vmsup["discard:"], vmsup["ro:"], vmsup["greeting:"]) == ("done", "1", "from the host")
    assert "trouble:" not in vmsup.console, vmsup.console
    for image in (qcow2, scratch):
        subprocess.run(["qemu-img", "check", "-f", "qcow2", str(image)], check=True)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(qcow2), str(ext4)], check=True)
    assert clean(ext4)
    assert file_in(ext4, "x") == written


def test_a_root_file_system_grows_and_survives_a_power_cut(
    tmp_path: Path, booted: Callable[[], None], ext4: Path
) -> None:
    kernel = images.kernel(images.CLOUD)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(images.initramfs(SWITCH, kernel, MODULES))
    words = [w for p in WORDS for w in ("-p", p)]
    seen = []
    socket = str(tmp_path / "socket")
    disk = f"{ext4},root,max-size={GROWN}"
    options = ("-i", str(initrd), *words, "--block", disk, "-s", socket, str(kernel.bzimage))
    with vm.start(*options, stderr=subprocess.DEVNULL) as vmsup:
        assert vmsup.stdout is not None
        killer = threading.Timer(300, vmsup.kill)
        killer.start()
        for raw in vmsup.stdout:
            seen.append(raw.decode(errors="replace").strip())
            if seen[-1] == "synced: 3":
                subprocess.run(vm.command("resize", socket, "block1", str(GROWN)), cwd=vm.ROOT, check=True)
            if seen[-1] == "synced: 5":
                vmsup.kill()
        killer.cancel()
    booted()
    assert "synced: 5" in seen, seen[-20:]
    assert f"size: {GROWN // 512}" in seen
    (root,) = [line for line in seen if line.startswith("root:")]
    assert root.startswith("root: /dev/vda / ext4 rw,")
    replayed = subprocess.run(
        ["/usr/sbin/e2fsck", "-fp", str(ext4)], capture_output=True, text=True, check=False
    )
    assert replayed.returncode in (0, 1), replayed.stdout
    assert clean(ext4)
    for n in range(6):
        assert file_in(ext4, f"file{n}") == b"file %d\n" % n
