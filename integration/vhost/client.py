"""A small vhost-user front end, which is also the guest: real rings in real memory, `vmsup device` behind."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from devproc.driver import Driver, PackedDriver, SplitDriver, Used
from devproc.vhost import message
from devproc.vhost.connection import Connection
from devproc.vhost.message import MemoryRegion, Payload, Request, VringAddr, VringFile, VringState
from devproc.virtio import spec
from integration.vhost.programs import listens
from kvmcore.memory import GuestMemory

USER = 0x7F00_0000_0000
MEMORY_SIZE = 4 << 20
WAIT_S = 30.0


class Guest:
    """Memory in two files, and in the second from a page on: [0, 2 MiB) and [2 MiB, 4 MiB)."""

    def __init__(self) -> None:
        self.memory = GuestMemory.create([(0, MEMORY_SIZE)])
        half = MEMORY_SIZE // 2
        self.regions = (
            MemoryRegion(half, half, USER, half),
            MemoryRegion(0, half, USER + (1 << 30), 0),
        )
        self.files = (self.memory.fd, self.memory.fd)

    def user_address(self, gpa: int) -> int:
        for r in self.regions:
            if r.guest_address <= gpa < r.guest_address + r.size:
                return r.user_address + gpa - r.guest_address
        raise AssertionError(f"{gpa:#x}")


class Client:
    """One connection; requests are acknowledged, so what is wrong is known at once."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(path))
        self.connection = Connection(self.sock)
        self.sock.settimeout(WAIT_S)
        self.drivers: dict[int, Driver] = {}
        self.kicks: dict[int, int] = {}
        self.calls: dict[int, int] = {}

    def ask(self, request: Request, payload: Payload = None, fds: Sequence[int] = ()) -> Any:
        """Its answer, or 0."""
        self.connection.send(message.pack(request, payload, need_reply=True), fds)
        received = self.connection.receive()
        return message.parse_reply(request, received.header, received.body)

    def is_dropped(self) -> bool:
        """Whether the back end closes the connection, with no answer."""
        with contextlib.suppress(ConnectionError):
            return self.sock.recv(1) == b""
        return True

    def negotiate(self, features: int) -> None:
        self.ask(Request.GET_PROTOCOL_FEATURES)
        self.connection.send(message.pack(Request.SET_PROTOCOL_FEATURES, message.PROTOCOL_F_REPLY_ACK))
        self.ask(Request.SET_OWNER)
        self.ask(Request.SET_FEATURES, features | message.F_PROTOCOL_FEATURES)

    def set_memory(self, guest: Guest) -> None:
        self.ask(Request.SET_MEM_TABLE, guest.regions, guest.files)

    def set_up(
        self, guest: Guest, index: int, features: int, size: int = 16, position: int | None = None
    ) -> None:
        """Ring `index`, as QEMU does it, from `position` on; enabled, not kicked."""
        packed = features & spec.F_RING_PACKED
        at = {} if position is None else {"position": position}
        kind = PackedDriver if packed else SplitDriver
        # Either side of the border between the regions.
        driver = kind(guest.memory, (index % 2) * (MEMORY_SIZE // 2) + 0x10000, size, features, **at)
        driver.interrupts(1)
        self.drivers[index] = driver
        base = position if position is not None else (0x8000 if packed else 0)
        self.ask(Request.SET_VRING_NUM, VringState(index, size))
        self.ask(Request.SET_VRING_BASE, VringState(index, base))
        used, available = map(guest.user_address, (driver.device, driver.driver))
        self.ask(
            Request.SET_VRING_ADDR,
            VringAddr(index, 0, guest.user_address(driver.desc), used, available, 0),
        )
        self.set_eventfds(index)
        self.ask(Request.SET_VRING_ENABLE, VringState(index, 1))

    def set_eventfds(self, index: int) -> None:
        for request, fds in ((Request.SET_VRING_CALL, self.calls), (Request.SET_VRING_KICK, self.kicks)):
            if index in fds:
                os.close(fds[index])
            fds[index] = os.eventfd(0)
            self.ask(request, VringFile(index, True), [fds[index]])

    def converse(self, index: int, *requests: tuple[bytes | int, ...]) -> list[bytes]:
        """What the device answers to `requests`, all made available at once."""
        driver = self.drivers[index]
        order = [driver.request(*parts) for parts in requests]
        if driver.kick_wanted():
            os.eventfd_write(self.kicks[index], 1)
        done: dict[int, Used] = {}
        until_s = time.monotonic() + WAIT_S
        while True:
            driver.interrupts(1)  # then look: what was used before that brings none
            driver.memory.fence()
            done |= {used.id: used for used in driver.used()}
            if len(done) == len(order):
                break
            left_s = max(0.0, until_s - time.monotonic())
            ready = select.select([self.calls[index], self.sock], [], [], left_s)[0]
            assert ready, "no interrupt"
            assert self.sock not in ready, "the back end has closed the connection"
            os.eventfd_read(self.calls[index])
        return [done[id].data for id in order]

    def close(self) -> None:
        self.connection.close()
        for fd in (*self.kicks.values(), *self.calls.values()):
            os.close(fd)


class BackEnd:
    """A running `vmsup device`."""

    def __init__(self, path: Path, *words: str, before: Sequence[str] = ()) -> None:
        self.path = path
        self.process = subprocess.Popen(
            [
                *before,
                sys.executable,
                "-P",
                "-m",
                "supervisor.cli",
                "device",
                *words,
                "--socket",
                str(path),
                "--device-timeout=30",
            ],
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        assert self.process.stderr is not None
        self._stderr = self.process.stderr.fileno()
        self._said = b""
        until_s = time.monotonic() + WAIT_S
        while not listens(self.process.pid, path):
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < until_s
            time.sleep(0.02)

    def line(self) -> str:
        """The next line that it says."""
        while b"\n" not in self._said:
            assert select.select([self._stderr], [], [], WAIT_S)[0], "it says nothing"
            said = os.read(self._stderr, 4096)
            assert said, "it has ended"
            self._said += said
        line, _, self._said = self._said.partition(b"\n")
        return line.decode()

    def device(self) -> int:
        """The pid of the device's process."""
        return self.process_named("rng|block1|net1")

    def process_named(self, pattern: str) -> int:
        """The pid of the one whose title matches."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        titles = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in children}
        (found,) = (pid for pid, title in titles.items() if re.search(pattern, title))
        return found

    def stop(self) -> tuple[int, str]:
        """End it: exit code, and what it had still to say."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, (self._said + said).decode()


@contextlib.contextmanager
def back_end(path: Path, *words: str) -> Iterator[BackEnd]:
    running = BackEnd(path, *words)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()
