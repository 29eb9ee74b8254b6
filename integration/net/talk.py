"""A jailed network card on a real tap, its rings driven from here: what the host's kernel makes of it.

Run by test_tap.py in a network namespace of its own, with "tap-name" or "tap-fd" to say how the card is given
the tap; prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from devproc import jail
from devproc.devices.virtio_net import GSO_TCPV4, HDR_NEEDS_CSUM, HEADER
from devproc.driver import PciDriver, Used
from integration.jail.stand_in import MEMORY_SIZE, Function, StandIn
from kvmcore.errors import ConfigError
from supervisor.config import NetConfig
from supervisor.host import Host
from supervisor.nets import open_net

TAP = "tap0"
HOST, GUEST = "192.0.2.1", "192.0.2.2"
MAC = "02:00:00:00:00:02"
RX, TX = 0, 1
TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
PLAIN = bytes(HEADER.size)
_HOST_ID = 2_000_003
_PATIENCE_S = 10.0
_ETHERTYPE_IP, _ETHERTYPE_ARP = 0x0800, 0x0806


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data)) if not len(data) % 2 else checksum(data + b"\0")
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def ip(protocol: int, payload: bytes) -> bytes:
    """An IPv4 packet of the guest's to the host."""
    addresses = socket.inet_aton(GUEST) + socket.inet_aton(HOST)
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, 64, protocol, 0) + addresses
    return head[:10] + struct.pack(">H", ~checksum(head) & 0xFFFF) + head[12:] + payload


def pseudo(protocol: int, size: int) -> int:
    """What a driver leaves in the checksum field for the device to complete."""
    return checksum(socket.inet_aton(GUEST) + socket.inet_aton(HOST) + struct.pack(">HH", protocol, size))


class Card:
    """A jailed virtio-net, and its driver."""

    def __init__(self, net: NetConfig, undo: ExitStack) -> None:
        tap = open_net(net, Host(undo, None, print))  # type: ignore[arg-type]
        self.tap = tap.fds["link"][0]
        links = iter(tap.fds["link"])

        class OnTap(StandIn):
            def _pair(self, kind: str, path: str | None = None) -> tuple[int, int]:
                if kind != "tap":
                    return super()._pair(kind, path)
                return socket.dup(next(links)), -1

        self.stand_in = OnTap(jail.Mode.FULL)
        params = (MEMORY_SIZE, 0, *tap.params)
        self.stand_in.spawn("virtio-net", "net1", host_id=_HOST_ID, params=params)  # type: ignore[arg-type]
        self.fds = self.stand_in.devices["net1"]["kept"]
        self.driver = PciDriver(Function(self.stand_in.devices["net1"]["access"]), self.stand_in.guest)
        self.driver.start(self.driver.offered())
        for _ in range(200):
            self.driver.queues[RX].request(1526)
        self.kick(RX)

    def kick(self, queue: int) -> None:
        if self.driver.queues[queue].kick_wanted():
            os.eventfd_write(self.fds["kick"][queue], 1)

    def send(self, frame: bytes, header: bytes = PLAIN) -> None:
        self.driver.queues[TX].request(header, frame)
        self.kick(TX)

    def used(self) -> list[Used]:
        """The next receive buffers that the card has filled."""
        irq = self.fds["irq"][1 + RX]
        until_s = time.monotonic() + _PATIENCE_S
        while not (used := self.driver.queues[RX].used()):
            self.driver.queues[RX].interrupts(1)
            if used := self.driver.queues[RX].used():
                break
            if not select.select([irq], [], [], max(0, until_s - time.monotonic()))[0]:
                raise TimeoutError("no frame")
            os.eventfd_read(irq)
        return used

    def hear(self, wanted: Callable[[bytes], bool]) -> tuple[bytes, bytes]:
        """Header and frame of the next one that `wanted` says yes to; others are passed over."""
        while True:
            used = self.used()
            while used:
                count = HEADER.unpack_from(used[0].data)[-1]
                data = b"".join(u.data for u in used[:count])
                del used[:count]
                if wanted(data[HEADER.size :]):
                    return data[: HEADER.size], data[HEADER.size :]


def ethernet(card: Card, kind: int, payload: bytes, to: bytes) -> bytes:
    return to + bytes.fromhex(MAC.replace(":", "")) + kind.to_bytes(2, "big") + payload


def resolve(card: Card) -> bytes:
    """The host's address, by ARP."""
    mac = bytes.fromhex(MAC.replace(":", ""))
    ask = struct.pack(">HHBBH", 1, _ETHERTYPE_IP, 6, 4, 1) + mac + socket.inet_aton(GUEST)
    ask += bytes(6) + socket.inet_aton(HOST)
    card.send(ethernet(card, _ETHERTYPE_ARP, ask, b"\xff" * 6))
    _, answer = card.hear(lambda f: f[12:14] == b"\x08\x06" and f[20:22] == b"\0\2")
    return answer[22:28]


def ping(card: Card, host: bytes, size: int) -> bool:
    """Whether the host answers an echo request of `size` bytes with the same."""
    payload = bytes(i & 0xFF for i in range(size))
    echo = struct.pack(">BBHHH", 8, 0, 0, 1, 1) + payload
    echo = echo[:2] + struct.pack(">H", ~checksum(echo) & 0xFFFF) + echo[4:]
    card.send(ethernet(card, _ETHERTYPE_IP, ip(1, echo), host))
    _, answer = card.hear(lambda f: f[23:24] == b"\1" and f[34:35] == b"\0")
    return answer[42:] == payload


def checksum_to_host(card: Card, host: bytes) -> bool:
    """Whether a datagram arrives whose checksum the host's kernel has to know to be left to it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind((HOST, 0))
        listener.settimeout(_PATIENCE_S)
        size = 8 + 5
        udp = struct.pack(">HHHH", 1000, listener.getsockname()[1], size, pseudo(17, size)) + b"hello"
        header = HEADER.pack(HDR_NEEDS_CSUM, 0, 0, 0, 34, 6, 0)
        card.send(ethernet(card, _ETHERTYPE_IP, ip(17, udp), host), header)
        return listener.recvfrom(100)[0] == b"hello"


def checksum_from_host(card: Card) -> bool:
    """Whether the host leaves the checksum of a datagram to the guest, whose driver wants that."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as speaker:
        speaker.sendto(b"hello", (GUEST, 1000))
    header, _ = card.hear(lambda f: f[23:24] == b"\x11" and f[42:] == b"hello")
    flags, _, _, _, start, offset, _ = HEADER.unpack(header)
    return bool(flags & HDR_NEEDS_CSUM) and (start, offset) == (34, 6)


def segments_to_host(card: Card, host: bytes) -> int:
    """Bytes that the host's TCP acknowledges, in its RST, of one segment that is to be cut into many."""
    size, sequence = 20000, 1000
    tcp = struct.pack(">HHIIBBHHH", 1000, 9, sequence, 1, 0x50, 0x08, 1000, pseudo(6, 20), 0)
    tcp = tcp[:12] + b"\x50\x00" + tcp[14:]  # no flags: not an answer to anything
    tcp = tcp[:16] + struct.pack(">H", pseudo(6, 20 + size)) + tcp[18:]
    header = HEADER.pack(HDR_NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16, 0)
    card.send(ethernet(card, _ETHERTYPE_IP, ip(6, tcp + bytes(size)), host), header)
    _, answer = card.hear(lambda f: f[23:24] == b"\x06" and bool(f[47] & 4))
    return int(struct.unpack(">I", answer[42:46])[0]) - sequence


def opened(flags: int) -> int:
    """A descriptor of the tap, as whoever starts vmsup may open it."""
    fd = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", TAP.encode(), flags))
    return fd


def main(how: str) -> None:
    for words in (
        f"tuntap add {TAP} mode tap",
        f"address add {HOST}/24 dev {TAP}",
        f"link set {TAP} up",
        f"neighbor add {GUEST} lladdr {MAC} dev {TAP}",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    with ExitStack() as undo:
        if how == "tap-name":
            net = NetConfig(tap_name=TAP, mac=MAC)
        else:
            bare = opened(IFF_TAP | IFF_NO_PI)
            with contextlib.suppress(ConfigError):
                open_net(NetConfig(tap_fd=bare), Host(undo, None, print))  # type: ignore[arg-type]
                raise AssertionError("a tap without headers was taken")
            os.close(bare)
            net = NetConfig(tap_fd=opened(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR), mac=MAC)
        card = Card(net, undo)
        host = resolve(card)
        print(
            json.dumps(
                {
                    "pings": [ping(card, host, size) for size in (0, 56, 1472)],
                    "checksum_to_host": checksum_to_host(card, host),
                    "checksum_from_host": checksum_from_host(card),
                    "segments_to_host": segments_to_host(card, host),
                    "end": card.stand_in.stop("net1"),
                }
            )
        )


if __name__ == "__main__":
    main(sys.argv[1])
