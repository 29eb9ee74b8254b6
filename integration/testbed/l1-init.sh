#!/bin/sh
# L1's init, first half, in the initramfs: load modules, wait for a job, put this machine's / under an overlay.
fail() { echo "l1: $*"; echo "FAIL $*" >&9; sleep 1000; }
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module.ko" || echo "l1: insmod $module failed"; done < /modules/order
echo 0 > /sys/module/kvm/parameters/halt_poll_ns     # polling L2's halts takes the core L2's wake-up needs
echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled # 500 times fewer faults of L2
for port in /sys/class/virtio-ports/*; do read -r name < "$port/name"; eval "PORT_$name=/dev/${port##*/}"; done
exec 9<>"$PORT_control"
read -r clock < /sys/devices/system/clocksource/clocksource0/current_clocksource
[ "$clock" = tsc ] || fail "clocksource is $clock, not tsc"
[ -c /dev/kvm ] || fail "no /dev/kvm"

echo READY >&9
read -r go now size <&9         # the snapshot is taken while L1 waits here: nothing of the host is mounted yet
[ "$go" = GO ] || fail "not a job: $go"
date -u -s "@$now" > /dev/null
mkdir /host /over /new
P9=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o $P9,ro,cache=loose hostroot /host || fail "mount hostroot"
mount -t tmpfs -o size=75% tmpfs /over
mkdir /over/upper /over/work
mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work root /new || fail "mount overlay"
mkdir -p /new/.l1 /new/dev /new/proc /new/sys
cp /bin/busybox /stage2 /new/.l1/
head -c "$size" "$PORT_job" > /new/.l1/job
for dir in dev proc sys; do mount --move /$dir /new/$dir; done
share() { mkdir -p "/new$2" && mount -t 9p -o $P9,cache=mmap "$1" "/new$2" || fail "mount $2"; }
. /new/.l1/job
shares
export PORT_stdout PORT_stderr
exec switch_root /new /.l1/busybox sh /.l1/stage2
