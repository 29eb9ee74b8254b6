"""A supervisor's part in a device's life, run in a process of its own and driven over a pipe.

Run as `python stand_in.py FD MODE`, as root or as an ordinary user, so that a test of either can look at
/proc with the rights of whoever runs the tests.  MODE is the jail mode that its zygote is for; empty, any.
"""

from __future__ import annotations

import os
import select
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from devproc.record import replace

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

from hostile import HOSTILE, VICTIM  # noqa: E402

from devproc import jail, syscalls, wire, zygote  # noqa: E402
from devproc.catalog import CATALOG, Descriptor, Entry  # noqa: E402
from devproc.channel import Channel, ChannelClosed  # noqa: E402
from devproc.devices import virtio_vsock as vsock  # noqa: E402
from devproc.devices.virtio_vsock import Op  # noqa: E402
from devproc.driver import PciDriver  # noqa: E402
from devproc.violations import read_violation  # noqa: E402
from kvmcore.mailbox import Mailbox  # noqa: E402
from kvmcore.memory import GuestMemory  # noqa: E402
from policies.compile import compile_notify  # noqa: E402
from policies.parse import load  # noqa: E402
from supervisor.attest import attest  # noqa: E402

LAYERS = [s.name for s in jail.STEPS if not s.always]
WITHOUT = {layer: {layer} for layer in LAYERS} | {"namespaces": {"namespaces", "identity", "root"}}
MEMORY_SIZE = 16 << 20
SPARE = (*HOSTILE.descriptors, Descriptor("spare", "signal", "one too many"))
# In the catalogue here: an rtc with a layer left out of its jail, an attacker with a descriptor too many.
WEAK = {
    "weak-descriptors": replace(HOSTILE, name="weak-descriptors", descriptors=SPARE),
    **{
        f"weak-{layer}": replace(CATALOG["rtc"], name=f"weak-{layer}", without=frozenset(without))
        for layer, without in WITHOUT.items()
    },
}


def filters(entry: Entry) -> zygote.Filters:
    page = VICTIM if entry.name in ("hostile", *WEAK) else entry.name
    return compile_notify(load(page, entry.slots()), jail.SETUP_CALLS)


def readable(fds: Sequence[int], within_s: float = 5) -> set[int]:
    """Those of `fds` that can be read; with all devices there are more numbers than select takes."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return {fd for fd, _ in poll.poll(within_s * 1000)}


class Function:
    """A device process as its driver sees it."""

    def __init__(self, access: socket.socket) -> None:
        self.access = access

    def _ask(self, message: wire.Message) -> wire.Message:
        self.access.send(wire.encode(message))
        return wire.decode(self.access.recv(wire.ACCESS_FRAME_MAX + 1))

    def read(self, space: int, offset: int, size: int) -> int:
        answer = self._ask(wire.Read(space, offset, size))
        assert isinstance(answer, wire.Value)
        return answer.data

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        assert self._ask(wire.Write(space, offset, size, data, False)) == wire.Done()


class StandIn:
    """Methods are the requests; each answer is a plain value."""

    def __init__(self, mode: jail.Mode | None) -> None:
        CATALOG["hostile"] = HOSTILE
        CATALOG.update(WEAK)
        if os.geteuid() == 0:  # an attempt to mount that succeeds, without a jail, must not reach the host
            syscalls.unshare(syscalls.CLONE_NEWNS)
            syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        self.zygote = zygote.start((), filters, mode=mode)
        self.devices: dict[str, dict[str, Any]] = {}
        self.guest = GuestMemory.create([(0, MEMORY_SIZE)])

    def pids(self) -> list[int]:
        return [self.zygote.pid, *(d["pid"] for d in self.devices.values())]

    def spawn(
        self,
        device: str,
        name: str,
        mode: str = "full",
        host_id: int = 0,
        params: tuple[int, ...] | None = None,
        withhold: int = 0,
        ask_for: str = "",
        images: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Start `device` and wait for it; `withhold` descriptors or `ask_for` another to get it wrong.

        `images` are paths for its descriptors of kinds "disk" and "directory", by their names.
        """
        started = time.perf_counter_ns()
        entry = CATALOG[device]
        if params is None:
            params = tuple(p.low if p.type is int else bytes(p.low) for p in entry.params)
            if entry.guest_memory:
                params = (MEMORY_SIZE, 0, *params[2:])
        log_ours, log = os.pipe()
        access_ours, access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control_ours, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        kept: dict[str, list[int]] = {}
        given = []
        for d in entry.descriptors:
            for _ in range(d.count or 1):
                theirs, ours = self._pair(d.kind, (images or {}).get(d.name))
                given.append(theirs)
                kept.setdefault(d.name, []).append(ours)
        mailbox = Mailbox.create()
        fds = [log, access.fileno(), control.fileno(), *mailbox.fds, *given]
        fds = fds[: len(fds) - withhold]
        pid = self.zygote.spawn(
            ask_for or device, name, fds, host_id=host_id, mode=jail.Mode(mode), params=params
        )
        for fd in (log, *mailbox.fds, *given):
            os.close(fd)
        access.close()
        control.close()
        control_ours.settimeout(5)
        access_ours.settimeout(5)
        channel = zygote.control_channel(control_ours)
        self.devices[name] = d = {
            "pid": pid, "log": log_ours, "access": access_ours, "control": channel, "kept": kept
        }  # fmt: skip
        greeting = zygote.await_ready(channel, device, jail.Mode(mode), 5)
        d["listener"] = greeting.listener
        return {
            "pid": pid,
            "digest": greeting.digest,
            "listener": greeting.listener is not None,
            "notes": greeting.notes,
            "ns": time.perf_counter_ns() - started,
        }

    def _pair(self, kind: str, path: str | None = None) -> tuple[int, int]:
        """A descriptor for a device to have, and its other end or another for the same."""
        match kind:
            case "input":
                return os.pipe()
            case "output":
                ours, theirs = os.pipe()
                return theirs, ours
            case "memory":
                return os.dup(self.guest.fd), os.dup(self.guest.fd)
            case "directory":
                flags = os.O_PATH | os.O_DIRECTORY
                return os.open(path or HERE, flags), os.open(path or HERE, flags)
            case "disk" if path is not None:
                return os.open(path, os.O_RDWR), os.open(path, os.O_RDONLY)
            case "disk":
                with tempfile.TemporaryFile() as image:
                    image.truncate(1 << 20)
                    return os.dup(image.fileno()), os.dup(image.fileno())
            case "exchange":
                pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
                return pair[0].detach(), pair[1].detach()
            case "tap" | "stream" | "back-end":
                pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                return pair[0].detach(), pair[1].detach()
            case _:
                event = os.eventfd(0, os.EFD_NONBLOCK)
                return event, os.dup(event)

    def converse(
        self, name: str, features: int, requests: list[tuple[bytes | int, ...]], at: int = 0
    ) -> list[bytes]:
        """What queue `at` of a virtio device answers to each request, one interrupt for each."""
        d = self.devices[name]
        driver = PciDriver(Function(d["access"]), self.guest)
        driver.start(features)
        queue, irq = driver.queues[at], d["kept"]["irq"][at + 1]
        answers = []
        for parts in requests:
            queue.request(*parts)
            queue.interrupts(1)
            if queue.kick_wanted():
                os.eventfd_write(d["kept"]["kick"][at], 1)
            assert readable([irq]), "no interrupt"
            os.eventfd_read(irq)
            answers += [used.data for used in queue.used()]
        return answers

    def talk(self, name: str, features: int) -> list[bytes]:
        """A guest dials port 80, and a host program calls it, by way of a virtio-vsock process.

        The payloads that the guest hears, what the exchange hears, then what the two host programs hear.
        """
        d = self.devices[name]
        driver = PciDriver(Function(d["access"]), self.guest)
        driver.start(features)
        (exchange,) = d["kept"]["exchange"]
        channel = socket.socket(fileno=os.dup(exchange))
        channel.settimeout(5)

        def send(op: Op, host_port: int, data: bytes = b"", flags: int = 0) -> None:
            header = vsock.HEADER.pack(3, 2, 1024, host_port, len(data), 1, op, flags, 1 << 16, 0)
            driver.queues[vsock.TX].request(header + data)
            os.eventfd_write(d["kept"]["kick"][vsock.TX], 1)

        def hear(op: Op) -> bytes:
            """The payload of the next packet, which is an `op`."""
            queue = driver.queues[vsock.RX]
            queue.request(4096)
            os.eventfd_write(d["kept"]["kick"][vsock.RX], 1)
            until_s = time.monotonic() + 5
            while not (used := queue.used()):
                assert time.monotonic() < until_s, f"no {op.name}"
                time.sleep(0.001)
            assert vsock.HEADER.unpack(used[0].data[: vsock.HEADER.size])[6] == op
            return used[0].data[vsock.HEADER.size :]

        def connect(word: bytes) -> socket.socket:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            ours.settimeout(5)
            with theirs:
                socket.send_fds(channel, [word], [theirs.fileno()])
            return ours

        send(Op.REQUEST, 80)
        port = channel.recv(8)
        dialled = connect(b"D")
        hear(Op.RESPONSE)
        dialled.send(b"to the guest")
        heard = [hear(Op.RW)]
        send(Op.RW, 80, b"to the host")
        caller = connect(b"A")
        caller.send(b"CONNECT 1024\n")
        hear(Op.REQUEST)
        send(Op.RESPONSE, vsock.HOST_PORT)
        caller.send(b"called")
        heard.append(hear(Op.RW))
        send(Op.SHUTDOWN, vsock.HOST_PORT, flags=vsock.SHUTDOWN_RCV)
        send(Op.SHUTDOWN, 80, flags=vsock.SHUTDOWN_SEND)
        said = b""
        while more := dialled.recv(99):
            said += more
        send(Op.SHUTDOWN, vsock.HOST_PORT, flags=vsock.SHUTDOWN_SEND)
        hear(Op.RST)
        heard += [port, said, caller.recv(99)]
        for sock in (dialled, caller, channel):
            sock.close()
        return heard

    def crowd(self, name: str, count: int) -> int:
        """With how many of `count` host programs that call a virtio-vsock process it stays connected."""
        d = self.devices[name]
        PciDriver(Function(d["access"]), self.guest).start()
        channel = socket.socket(fileno=os.dup(d["kept"]["exchange"][0]))
        channel.settimeout(5)
        callers = []
        for _ in range(count):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            callers.append(ours)
            with theirs:
                socket.send_fds(channel, [b"A"], [theirs.fileno()])
        for _ in range(count):  # one is answered in each turn of its loop
            self.ask_ping(name)
        connected = len(callers) - len(readable([caller.fileno() for caller in callers], within_s=0))
        for sock in (*callers, channel):
            sock.close()
        return connected

    def fill(self, gpa: int, data: bytes) -> None:
        self.guest.write(gpa, data)

    def guest_blocks(self) -> int:
        """How much the host holds for the guest, in blocks of 512 bytes."""
        return os.fstat(self.guest.fd).st_blocks

    def type(self, name: str, port: int, data: bytes) -> None:
        os.write(self.devices[name]["kept"]["input"][port], data)

    def shown(self, name: str, port: int) -> bytes:
        """What a port has printed, of which there must be some."""
        fd = self.devices[name]["kept"]["output"][port]
        return os.read(fd, 4096) if readable([fd]) else b""

    def set(self, name: str, setting: str, value: int) -> None:
        self.devices[name]["control"].send(wire.Set(setting, value))

    def counters(self, name: str) -> dict[str, int]:
        channel: Channel = self.devices[name]["control"]
        channel.send(wire.Stats())
        answer = channel.recv()
        assert isinstance(answer, wire.Counters)
        return dict(zip(answer.items[::2], answer.items[1::2], strict=True))  # type: ignore[arg-type]

    def image(self, name: str) -> bytes:
        """What is in the image of a disk."""
        (fd,) = self.devices[name]["kept"]["disk"]
        return os.pread(fd, os.fstat(fd).st_size, 0)

    def read(self, name: str, offset: int, size: int = 8, space: int = 0) -> tuple[Any, ...]:
        """("value", n), ("violation", nr, args) after which the device is dead, or ("died", wait status)."""
        d = self.devices[name]
        access, listener = d["access"], d["listener"]
        access.send(wire.encode(wire.Read(space, offset, size)))
        ready = readable([access.fileno()] + ([listener] if listener is not None else []))
        if access.fileno() in ready:
            frame = access.recv(wire.ACCESS_FRAME_MAX + 1)
            if frame:
                message = wire.decode(frame)
                assert isinstance(message, wire.Value)
                return ("value", message.data)
            return ("died", *self.reap(name))
        if listener in ready and (violation := read_violation(listener)) is not None:
            assert violation.pid == d["pid"]
            self.kill(name)
            return ("violation", violation.nr, violation.args)
        return ("died", *self.reap(name)) if ready else ("silence",)

    def write(self, name: str, offset: int, data: int, space: int = 0) -> None:
        self.devices[name]["access"].send(wire.encode(wire.Write(space, offset, 1, data, True)))

    def garbage(self, name: str, frame: bytes) -> None:
        self.devices[name]["access"].send(frame)

    def next_word(self, name: str) -> str:
        channel: Channel = self.devices[name]["control"]
        try:
            return repr(channel.recv())
        except ChannelClosed:
            return "closed"

    def ask_ping(self, name: str) -> int:
        channel: Channel = self.devices[name]["control"]
        channel.send(wire.Ping(7))
        answer = channel.recv()
        assert isinstance(answer, wire.Pong)
        return answer.token

    def log(self, name: str) -> str:
        fd = self.devices[name]["log"]
        text = b""
        while readable([fd], within_s=0) and (more := os.read(fd, 4096)):
            text += more
        return text.decode()

    def stop(self, name: str) -> tuple[int, int]:
        self.devices[name]["control"].send(wire.Stop())
        return self.reap(name)

    def close_access(self, name: str) -> tuple[int, int]:
        self.devices[name]["access"].close()
        return self.reap(name)

    def look(self, name: str) -> list[tuple[str, str]]:
        """(field, verdict) of what this process cannot see to be as declared for an rtc."""
        report = attest([(name, self.devices[name]["pid"], CATALOG["rtc"])], os.getpid())
        return [(f.field, f.verdict) for f in report.unproven if f.process == name]

    def drop_privileges(self) -> None:
        jail.drop_privileges()

    def kill(self, name: str) -> tuple[int, int]:
        os.kill(self.devices[name]["pid"], 9)
        return self.reap(name)

    def reap(self, name: str) -> tuple[int, int]:
        """(si_code, si_status) as waitid(2) gives them."""
        result = os.waitid(os.P_PID, self.devices[name]["pid"], os.WEXITED)
        assert result is not None
        return result.si_code, result.si_status


def main(fd: int, mode: str) -> None:
    pipe = Connection(fd)
    me = StandIn(jail.Mode(mode) if mode else None)
    pipe.send(os.getpid())
    while True:
        try:
            method, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(me, method)(*args, **kwargs))
        except Exception as e:
            answer = (False, f"{type(e).__name__}: {e}")
        pipe.send(answer)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
