"""A network card against QEMU's, each on a tap of a network namespace: iperf3 both ways, and pings in turn.

QEMU's card is in QEMU itself: vhost-net is not a device of the monitor's but the host kernel's.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from integration.bench import guest
from integration.bench.report import Result
from integration.boot import images

TARGET = 0.9
ROUNDS = 3
HOST, GUEST = "192.0.2.1", "192.0.2.2"
TAP = "tap0"
NAMESPACE = rf"""
ip link set lo up
ip tuntap add {TAP} mode tap
ip address add {HOST}/24 dev {TAP}
ip link set {TAP} up
iperf3 -s > /dev/null & server=$!
"$@"; code=$?
kill $server
exit $code
"""
JOB = rf"""
ip address add {GUEST}/24 dev eth0; ip link set eth0 up; ip link set lo up
ping -c 3 {HOST} > /dev/null
for way in sent received; do
    [ $way = sent ] && reverse= || reverse=-R
    iperf3 -c {HOST} -t 3 -f k $reverse | awk -v way=$way '/receiver/ {{ print "{guest.FIGURE}", way, $7 }}'
done
ping -q -A -c 300 {HOST} | awk -F'[/= ]+' '/round-trip/ {{ print "{guest.FIGURE}", "pings", 1000 / $6 }}'
"""


def results() -> list[Result]:
    with tempfile.TemporaryDirectory(prefix="vmsup-bench-") as name:
        iperf3 = images.program("/usr/bin/iperf3")
        linux = guest.Guest.of(Path(name), JOB, ("virtio_pci", "virtio_net"), **iperf3)
        wrapped = ("unshare", "--net", "sh", "-c", NAMESPACE, "sh")
        tap = f"tap,id=n,ifname={TAP},script=no,downscript=no,vhost=off"
        card = ("-netdev", tap, "-device", "virtio-net-pci,netdev=n,romfile=")
        found = guest.interleaved(
            {
                "ours": [*wrapped, *linux.vmsup("--net", TAP)],
                "theirs": [*wrapped, *linux.qemu(*card)],
            },
            ROUNDS,
        )
    return [
        Result.ratio(f"net {what}, a second to QEMU's", sides["ours"], sides["theirs"], TARGET, "higher")
        for what, sides in found.items()
    ]
