"""Debian's drivers on a disk of QEMU's storage daemon and a directory of virtiofsd's."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm
from integration.vhost.programs import NEEDS_STORAGE_DAEMON, NEEDS_VIRTIOFSD, storage_daemon, virtiofsd

pytestmark = [pytest.mark.linux, NEEDS_STORAGE_DAEMON, NEEDS_VIRTIOFSD]

SIZE = 32 << 20
WORDS = ("quiet", "tsc=reliable", "nokaslr", "mitigations=off")
SCRIPT = r"""
sum() { sha256sum | cut -d' ' -f1; }
mkdir -p /disk /shared
mount -t virtiofs shared /shared && echo "shared: $(sum < /shared/file)"
echo "queues: $(ls /sys/block/vda/mq | wc -l)"
mke2fs -q /dev/vda && mount -t ext2 /dev/vda /disk && cp /shared/file /disk && umount /disk &&
    echo "copied: yes"
for n in 1 2 3; do for driver in virtio_blk virtiofs; do
    [ $driver = virtiofs ] && umount /shared
    cd /sys/bus/virtio/drivers/$driver
    for d in virtio*; do echo $d > unbind; echo $d > bind; done
    cd /
done; mount -t virtiofs shared /shared; done
mount -t ext2 -o ro /dev/vda /disk && cp /disk/file /shared/back && sync && echo "back: $(sum < /disk/file)"
umount /shared /disk
dmesg | grep -E 'BUG|Oops|WARNING:|nobody cared|soft lockup|(virtio|fuse|vda).*(fail|error)' |
    sed 's/^/trouble: /'
"""


def test_linux_works_on_what_other_programs_serve(tmp_path: Path, booted: Callable[[], None]) -> None:
    shared, image = tmp_path / "shared", tmp_path / "image"
    shared.mkdir()
    data = os.urandom(1 << 20)
    (shared / "file").write_bytes(data)
    image.touch()
    os.truncate(image, SIZE)
    disk, directory = tmp_path / "disk", tmp_path / "directory"
    kernel = images.kernel(images.CLOUD)
    initrd = tmp_path / "initrd"
    script = images.POWEROFF.replace(images.REPORT, images.REPORT + SCRIPT)
    initrd.write_bytes(images.initramfs(script, kernel, ("virtio_pci", "virtio_blk", "virtiofs", "ext4")))
    words = [word for p in WORDS for word in ("-p", p)]
    words += ["--vhost-user", f"block,socket={disk}", "--vhost-user", f"fs,socket={directory},tag=shared"]
    with storage_daemon(image, disk), virtiofsd(shared, directory):
        vmsup = vm.run("-c", "2", "-i", str(initrd), *words, str(kernel.bzimage))
    assert vmsup.code == 0, vmsup.errors
    booted()
    assert vmsup.errors == ""
    assert "trouble:" not in vmsup.console
    assert vmsup["queues:"] == "2"
    assert vmsup["copied:"] == "yes"
    assert vmsup["shared:"] == vmsup["back:"] == hashlib.sha256(data).hexdigest()
    assert (shared / "back").read_bytes() == data
