"""A jailed network card on a real tap against a driver that races with it: does anything ever stand still?

Run by test_tap.py in a network namespace of its own, with a seed, how many rounds, and race.c as a library;
prints one line of JSON for each round.  A card with a limit moves its frames in Python, one without in C.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress

from devproc.devices import virtio_net
from devproc.virtio import spec
from integration.net.talk import MAC, RX, TAP, TX, Card
from supervisor.config import NetConfig

MS = 1000
_BUFFERS = 10 << 20  # guest-physical; the rings are below
_MTU = 9000


class Queue(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("desc", "avail", "used")),
        ("buffers", ctypes.c_uint64),
        *((name, ctypes.c_uint32) for name in ("size", "buffer_size")),
        *((name, ctypes.c_int) for name in ("kick", "irq", "event_idx", "receives")),
    )


class Race(ctypes.Structure):
    _fields_ = (
        *((name, Queue) for name in ("rx", "tx")),
        *((name, ctypes.c_int) for name in ("tap", "host", "pid")),
        *((name, ctypes.c_uint32) for name in ("seed", "ms", "frame_max")),
        *((name, ctypes.c_uint64) for name in ("received", "sent")),
        ("why", ctypes.c_char * 160),
    )


def drain(fd: int) -> None:
    with suppress(BlockingIOError):
        os.eventfd_read(fd)


def race(card: Card, host: socket.socket, driver: ctypes.CDLL, choose: random.Random) -> dict[str, object]:
    """One round; what it was and what came of it."""
    event_idx, size = choose.random() < 0.7, choose.choice([4, 8, 16, 64, 256])
    features = spec.F_VERSION_1 | virtio_net.F_MRG_RXBUF | (spec.F_EVENT_IDX if event_idx else 0)
    card.driver.start(features, size=size)
    memory, pid = card.stand_in.guest, card.stand_in.devices["net1"]["pid"]
    os.sched_setaffinity(pid, choose.choice([os.sched_getaffinity(0), {min(os.sched_getaffinity(0))}]))
    given = Race(tap=card.tap, host=host.fileno(), pid=pid, seed=choose.getrandbits(24), ms=MS)
    given.frame_max = choose.choice([100, 1514, _MTU])
    at = _BUFFERS
    for index, queue, sizes in ((RX, given.rx, (64, 256, 1526)), (TX, given.tx, (256, 1526))):
        ring = card.driver.queues[index]
        queue.desc = memory.host_address(ring.desc, 16 * size)
        queue.avail = memory.host_address(ring.driver, 6 + 2 * size)
        queue.used = memory.host_address(ring.device, 6 + 8 * size)
        queue.buffers, queue.size, queue.buffer_size = at, size, choose.choice(sizes)
        queue.kick, queue.irq = card.fds["kick"][index], card.fds["irq"][1 + index]
        queue.event_idx, queue.receives = event_idx, index == RX
        drain(queue.irq)
        at += size * queue.buffer_size
    memory.write(_BUFFERS, bytes(at - _BUFFERS))  # headers that ask for nothing
    driver.race(ctypes.byref(given))
    card.driver.reset()
    buffers = given.rx.buffer_size, given.tx.buffer_size
    how = (
        f"seed {given.seed}, size {size}, event_idx {event_idx}, buffers {buffers}, frames {given.frame_max}"
    )
    return {"how": how, "received": given.received, "sent": given.sent, "why": given.why.decode()}


def main(seed: int, rounds: int, driver: str) -> None:
    choose = random.Random(seed)
    for words in (f"tuntap add {TAP} mode tap", f"link set {TAP} mtu {_MTU} up"):
        subprocess.run(["ip", *words.split()], check=True)
    for limit in (0, 1 << 30):
        with ExitStack() as undo, socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as host:
            card = Card(NetConfig(tap_name=TAP, mac=MAC, pps=limit), undo)
            host.bind((TAP, 0))
            for _ in range(rounds):
                print(json.dumps(race(card, host, ctypes.CDLL(driver), choose)), flush=True)
            card.stand_in.stop("net1")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
