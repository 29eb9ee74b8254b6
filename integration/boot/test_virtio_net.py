"""Debian's virtio_net on our card: on a tap with two queues and offloads, and on passt without privileges."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm
from integration.ordinary import as_user

pytestmark = pytest.mark.linux

HOST, GUEST = "192.0.2.1", "192.0.2.2"
OUTSIDE, GATEWAY = "198.51.100.1", "198.51.100.254"
# In a network namespace of its own; "$@" is what runs vmsup.  $DIR/file is served; what comes is in $DIR/up,
# then in $DIR/lossy.
SERVERS = r"""
busybox httpd -f -p 8080 -h "$DIR" & httpd=$!
"$PYTHON" -c "$SINK" "$DIR/up" "$DIR/lossy" & sink=$!
iperf3 -s > /dev/null & iperf3=$!
"$@"; code=$?
kill $httpd $sink $iperf3
exit $code
"""
# Unlike nc it does not close its own half first.
SINK = """
import socket, sys
server = socket.create_server(("", 7777))
for name in sys.argv[1:]:
    client, _ = server.accept()
    with open(name, "wb") as f:
        while data := client.recv(65536):
            f.write(data)
    client.close()
"""
ON_TAP = rf"""
ip link set lo up
ip tuntap add tap0 mode tap multi_queue
ip address add {HOST}/24 dev tap0
ip link set tap0 up
"""
# passt wants a default route; that there is nobody behind it does not matter here.
ON_PASST = rf"""
ip link set lo up
ip link add out0 type veth peer name out1
ip address add {OUTSIDE}/24 dev out0
ip link set out0 up
ip link set out1 up
ip route add default via {GATEWAY}
"""
# In the guest: bytes both ways, whole; then a flood, which must leave it alive.
TRAFFIC = r"""
echo "file: $(wget -q -O - http://$HOST:8080/file | sha256sum)"
dd if=/dev/urandom of=/up bs=64k count=16 2> /dev/null
nc $HOST 7777 < /up
echo "up: $(stat -c %s /up) $(sha256sum < /up)"
echo "flood: $(timeout 60 iperf3 -c $HOST -u -b 0 -l 1000 -R -t 2 | grep receiver)"
echo "after: $(wget -q -O - http://$HOST:8080/file | sha256sum)"
"""
# What the guest sends is delayed, lost, doubled and put out of order before the card has it.
LOSSY = r"""
/usr/sbin/tc qdisc add dev eth0 root netem delay 2ms loss 3% duplicate 3% reorder 25%
nc $HOST 7777 < /up
echo "lossy: $(wget -q -O - http://$HOST:8080/file | sha256sum)"
echo "netem: $(/usr/sbin/tc -s qdisc show dev eth0 | tr '\n' ' ')"
/usr/sbin/tc qdisc del dev eth0 root
"""
TROUBLE = r"""
grep virtio /proc/interrupts | sed 's/^/interrupts: /'
dmesg | grep -E 'BUG|Oops|WARNING:|nobody cared|soft lockup|virtio.*(fail|error)|eth0.*(error|timed out)' |
    sed 's/^/trouble: /'
"""
LEASE = r"""#!/bin/sh
[ "$1" = bound ] || exit 0
ip address add $ip/$mask dev $interface
ip route add default via $router
echo "lease: $ip $router $mtu"
"""


def start(host: str, script: str, *options: str, user: tuple[str, ...] = ()) -> tuple[vm.Result, str, str]:
    """The guest's run; SHA-256 of the file it was served, and that of what it sent with how much that is."""
    for tool in ("busybox", "iperf3", "ip"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool}")
    kernel = images.kernel(images.CLOUD)
    served = os.urandom(1 << 20)
    files = images.program("/usr/bin/iperf3") | images.program("/usr/sbin/tc")
    files["lease"] = images.file(LEASE.encode())
    script = images.POWEROFF.replace(images.REPORT, images.REPORT + script + TROUBLE)
    initrd = images.initramfs(script, kernel, ("virtio_pci", "virtio_net", "sch_netem"), files)
    words = [w for p in ("quiet", "tsc=reliable", "nokaslr", "mitigations=off") for w in ("-p", p)]
    with tempfile.TemporaryDirectory() as name:
        readable = Path(name)
        readable.chmod(0o755)  # by an ordinary user too
        (readable / "file").write_bytes(served)
        (readable / "up").touch()
        (readable / "initrd").write_bytes(initrd)
        copy = shutil.copy(kernel.bzimage, readable / "kernel")
        names = (f"DIR={readable}", f"PYTHON={sys.executable}", f"SINK={SINK}")
        namespace = ("unshare", "--net", "env", *names, "sh", "-c", host + SERVERS, "sh", *user)
        result = vm.run("-i", str(readable / "initrd"), *words, *options, str(copy), user=namespace)
        sent = (readable / "up").read_bytes()
        if LOSSY in script:
            assert sha256((readable / "lossy").read_bytes()) == sha256(sent)
    return result, sha256(served), f"{len(sent)} {sha256(sent)}"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def received(text: str) -> tuple[int, int]:
    """(sent, received) of ping's last words."""
    found = re.search(r"(\d+) packets transmitted, (\d+) packets received", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


@pytest.mark.parametrize(("irqchip", "cpus"), [("kernel", 2), ("split", 1)])
def test_linux_talks_over_a_tap(booted: Callable[[], None], irqchip: str, cpus: int) -> None:
    up = f"ip address add {GUEST}/24 dev eth0; ip link set eth0 up\n"
    script = f"HOST={HOST}\n{up}" + TRAFFIC + LOSSY
    script += r"""
echo "features: $(cat /sys/class/net/eth0/device/features)"
echo "queues: $(ls -d /sys/class/net/eth0/queues/* | wc -l)"
echo "ping: $(ping -c 5 -i 0.2 $HOST | grep received)"
echo "large: $(ping -c 3 -s 8000 $HOST | grep received)"
"""
    packed = irqchip == "split"
    net = "tap0,queues=2,packed-queue" if packed else "tap0,queues=2"
    options = ("--irqchip", irqchip, "-c", str(cpus), "--net", net)
    vmsup, served, sent = start(ON_TAP, script, *options)
    assert vmsup.code == 0, vmsup.errors
    booted()
    assert "trouble:" not in vmsup.console
    for name, count in (("ping:", 5), ("large:", 3)):
        assert received(vmsup[name]) == (count, count)
    assert vmsup["file:"].split()[0] == vmsup["after:"].split()[0] == vmsup["lossy:"].split()[0] == served
    assert re.search(r"qdisc netem.* loss 3%.* reorder 25%.* Sent [1-9]", vmsup["netem:"])
    assert vmsup["up:"].split("  -")[0] == sent
    assert "receiver" in vmsup["flood:"]
    bits = {bit for bit, digit in enumerate(vmsup["features:"]) if digit == "1"}
    assert {0, 1, 2, 3, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 18, 22, 23} <= bits
    assert (34 in bits) == packed
    assert vmsup["queues:"] == str(2 * cpus)


def test_an_ordinary_user_s_guest_talks_through_passt(booted: Callable[[], None]) -> None:
    if shutil.which("passt") is None:
        pytest.skip("there is no passt")
    user = tuple(as_user())
    if subprocess.run([*user, "test", "-w", "/dev/kvm"], check=False).returncode:
        pytest.skip("an ordinary user may not use this machine's /dev/kvm")
    script = f"HOST={GATEWAY}\nip link set eth0 up; udhcpc -i eth0 -s /lease -q -n -f\n" + TRAFFIC
    vmsup, served, sent = start(ON_PASST, script, "--net", "passt", user=user)
    assert vmsup.code == 0, vmsup.errors
    booted()
    assert "trouble:" not in vmsup.console
    assert vmsup["lease:"] == f"{OUTSIDE} {GATEWAY} 65520"
    assert vmsup["file:"].split()[0] == vmsup["after:"].split()[0] == served
    assert vmsup["up:"].split("  -")[0] == sent
