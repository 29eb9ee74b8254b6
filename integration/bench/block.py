"""A disk against QEMU's: fio in the same guest on the same image, which is in the host's page cache.

4 KiB at random and 1 MiB in sequence, past the guest's page cache, one request or 32 at a time.  QEMU's disk
has an iothread, as whoever wants speed of it gives it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from integration.bench import guest
from integration.bench.report import Result
from integration.boot import images

TARGET = 1.0
ROUNDS = 3
DISK_SIZE = 128 << 20
JOB = rf"""
mkdir /fio
mount -t ext4 -o ro /dev/vdb /fio
jobs=
for size in 4k 1m; do for way in read write; do for depth in 1 32; do
    [ $size = 4k ] && pattern=rand$way || pattern=$way
    jobs="$jobs --name=$way,$size,depth-$depth --stonewall --rw=$pattern --bs=$size --iodepth=$depth"
done; done; done
cd /tmp
{images.FIO} --filename=/dev/vda --direct=1 --ioengine=libaio --thread --time_based --runtime=2 \
    --ramp_time=1 --gtod_reduce=1 --clocksource=clock_gettime --disk_util=0 --output-format=terse $jobs |
    awk -F';' '/^3;/ {{ print "{guest.FIGURE}", $3, $7 + $48 }}'
"""  # fio's man page, TERSE OUTPUT, version 3: the job's name, KiB/s read, KiB/s written


def results() -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as name:
        directory = Path(name)
        disk, tools = directory / "disk", images.fio()
        disk.write_bytes(bytes(DISK_SIZE))
        linux = guest.Guest.of(directory, JOB, ("virtio_pci", "virtio_blk", "ext4"))
        drives = [f"if=none,id=a,format=raw,file={disk}", f"if=none,id=b,format=raw,readonly=on,file={tools}"]
        found = guest.interleaved(
            {
                "ours": linux.vmsup("--block", str(disk), "--block", f"{tools},ro"),
                "theirs": linux.qemu(
                    *("-object", "iothread,id=io"),
                    *("-drive", drives[0], "-device", "virtio-blk-pci,drive=a,iothread=io"),
                    *("-drive", drives[1], "-device", "virtio-blk-pci,drive=b"),
                ),
            },
            ROUNDS,
        )
    return [
        Result.ratio(f"block {what}, bytes/s to QEMU's", sides["ours"], sides["theirs"], TARGET, "higher")
        for what, sides in found.items()
    ]
