"""One device process in its jail: random accesses, all that the supervisor can ask, a virtio driver's part.

What `vmsup policy learn` watches when there is no VM to watch, and what `vmsup policy verify` runs under the
shipped policy.  Left out: what takes long (an alarm a minute away) and what only a bug can bring about (a
model that raises).
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from devproc import jail, wire, zygote
from devproc.catalog import CATALOG, Entry
from devproc.channel import ChannelClosed
from devproc.driver import PciDriver
from devproc.vhost.message import HEADER_SIZE, Request, pack_reply, parse, parse_header
from devproc.virtio import spec
from devproc.wire import PeerError, Space
from kvmcore import layout
from kvmcore.exitloop import Core, DeviceGone
from kvmcore.memory import GuestMemory
from supervisor import machine
from supervisor.config import RunConfig
from supervisor.host import Opened
from supervisor.proxy import Proxy
from supervisor.reaper import DeviceDied
from supervisor.spawn import Spawner

Say = Callable[[str, str], None]
Filters = Callable[[Entry], zygote.Filters]
Watch = Callable[[str, str], Callable[[int], None] | None]

ACCESSES: Final = 2000
_SEED: Final = 1
_MEM_BELOW_4G: Final = 256 << 20
_DISK_SIZE: Final = 1 << 20
_PAGE_SIZE: Final = 4096
_REQUEST_SIZE: Final = 16  # a request of virtio-blk: read from sector 0
_TIMEOUT_S: Final = 5.0
_PAUSE_S: Final = 0.1  # for deadlines that the accesses have set


def exercise(device: str, say: Say, filters: Filters | None = None, watch: Watch | None = None) -> None:
    """Put `device` through a life that ends by Stop, and one that ends by an access to no register.

    In the first its accesses come through the mailbox, in the second over the access channel.

    Args:
        device: a catalogue name.
        say: takes (device, line) for every line that the device logs.
        filters: what it is jailed by [its policy].
        watch: of (catalogue name, instance name): takes its listener, see `Proxy.await_ready`.

    Raises:
        DeviceDied: it did not live as it should; the text names the system call that it was killed for.
        SpawnError: it could not be started.
    """
    instance = _instance(CATALOG[device])
    with contextlib.ExitStack() as undo:
        nursery = zygote.start([device], filters)
        undo.callback(os.waitpid, nursery.pid, 0)
        undo.callback(nursery.close)
        for live, transport in ((_stop, "mailbox"), (_stray, "socket")):
            with _process(nursery, instance, transport, say, watch) as life:
                life.explained(live)


def _instance(entry: Entry) -> machine.Instance:
    """A device of the kind with the least of each parameter, or as the default machine has it."""
    if entry.virtio is None:
        instances = machine.instances(RunConfig(kernel="", irqchip="split"), _MEM_BELOW_4G, 0)
        return next(i for i in instances if i.entry.name == entry.name)
    given = {"mem_below_4g": _MEM_BELOW_4G, entry.fsize: _DISK_SIZE}
    params = [given.get(p.name, p.low) if p.type is int else bytes(p.low) for p in entry.params]
    return machine.Instance(entry.name, entry, params=tuple(params), pci_slot=1)


class _Life:
    """A device process, and the host's end of whatever it holds; to `PciDriver` the function itself.

    Args:
        events: eventfds by the name of their descriptor.
    """

    def __init__(
        self,
        proxy: Proxy,
        core: Core,
        memory: GuestMemory,
        events: Mapping[str, tuple[int, ...]],
        typed: int,
        shown: int,
    ) -> None:
        self.proxy = proxy
        self.core = core
        self._memory = memory
        self._events = events
        signals = [d.name for d in proxy.instance.entry.descriptors if d.kind == "signal"]
        self._signals = [fd for name in signals for fd in events[name]]
        self._typed = typed
        self._shown = shown
        self._random = random.Random(_SEED)

    def explained(self, live: Callable[[_Life], None]) -> None:
        """Call `live`; should it fail, say why the device did."""
        try:
            live(self)
        except (DeviceGone, ChannelClosed, PeerError, TimeoutError) as e:
            listener = self.proxy.listener
            if listener is not None and select.select([listener], [], [], 0)[0]:
                self.proxy.on_violation()
            raise DeviceDied(self.proxy.name, str(e) or "closed its control channel") from None

    def ask(self, message: wire.Message) -> wire.Message:
        self.proxy.control.send(message)
        return self.hear()

    def hear(self) -> wire.Message:
        while isinstance(message := self.proxy.control.recv(), wire.Log):
            pass  # what it says of a driver as bad as this one
        return message

    def read(self, space: int, offset: int, size: int) -> int:
        return self.core.read(self.proxy.index, space, offset, size)

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        self.core.write(self.proxy.index, space, offset, size, data, False)

    def drive(self) -> None:
        """As the driver of a virtio function: both kinds of ring and of interrupt, a buffer in each queue."""
        if self.proxy.instance.entry.virtio is None:
            return
        driver = PciDriver(self, self._memory)
        for features, msix in ((spec.F_VERSION_1, True), (driver.offered(), False)):
            driver.start(features, msix=msix)
            for queue, kick in zip(driver.queues, self._events["kick"], strict=True):
                queue.request(_PAGE_SIZE)
                queue.request(bytes(_REQUEST_SIZE), _PAGE_SIZE)
                os.eventfd_write(kick, 1)
            os.eventfd_write(self._events["resample"][0], 1)
            self.ask(wire.Ping(1))  # it is answered after the kicks
            self._turn()
            for number in (2, 3):  # the third one after what was typed
                self.ask(wire.Ping(number))

    def access(self, accesses: int) -> None:
        """Random accesses to random registers, with input coming in and output taken off."""
        rng, core, index = self._random, self.core, self.proxy.index
        for n in range(accesses):
            region = rng.choice(self.proxy.instance.entry.regions)
            size = rng.choice([s for s in wire.SIZES if s <= region.size])
            offset = rng.randrange(region.size - size + 1)
            if rng.random() < 0.5:
                core.read(index, region.space, offset, size)
            else:
                posted = rng.random() < 0.8
                core.write(index, region.space, offset, size, rng.getrandbits(8 * size), posted)
            if n % 50 == 0:
                self._turn()

    def _turn(self) -> None:
        for fd in (self._shown, *self._signals):
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 1 << 16)
        with contextlib.suppress(BlockingIOError):
            os.write(self._typed, b"typed")

    def control(self) -> None:
        """Everything that may be asked while it serves."""
        self.ask(wire.Ping(1))
        saved = self.ask(wire.Save())
        assert isinstance(saved, wire.State)
        self.ask(wire.Restore(saved.state))
        self.ask(wire.Stats())

    def await_end(self, status: int) -> None:
        proxy = self.proxy
        until_s = time.monotonic() + _TIMEOUT_S
        while os.waitid(os.P_PID, proxy.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            listening = [] if proxy.listener is None else [proxy.listener]
            if select.select(listening, [], [], 0.01)[0]:
                proxy.on_violation()
            if time.monotonic() > until_s:
                raise TimeoutError("does not end")
        proxy.reaped = True
        ended = os.waitstatus_to_exitcode(os.waitpid(proxy.pid, 0)[1])
        if ended != status:
            raise DeviceDied(proxy.name, f"ended with {ended}, expected {status}")


def _stop(life: _Life) -> None:
    life.drive()
    life.access(ACCESSES // 2)
    life.control()
    time.sleep(_PAUSE_S)
    life.access(ACCESSES // 2)
    life.control()
    life.proxy.ask_to_stop()
    life.await_end(0)


def _stray(life: _Life) -> None:
    life.access(ACCESSES // 4)
    with contextlib.suppress(DeviceGone):
        life.core.read(life.proxy.index, Space.BAR5, 0, 1)
    answer = life.hear()
    if not isinstance(answer, wire.Failed):
        raise PeerError(f"{type(answer).__name__} instead of Failed")
    life.await_end(1)


@contextlib.contextmanager
def _process(
    nursery: zygote.Zygote, instance: machine.Instance, transport: str, say: Say, watch: Watch | None
) -> Iterator[_Life]:
    with contextlib.ExitStack() as undo:
        signals = {name: os.eventfd(0, os.EFD_NONBLOCK) for name in ("panic", "poweroff", "reset")}
        theirs, typed = os.pipe2(os.O_NONBLOCK)
        shown, output = os.pipe2(os.O_NONBLOCK)
        shared = os.open(undo.enter_context(tempfile.TemporaryDirectory()), os.O_PATH | os.O_DIRECTORY)
        disk = os.memfd_create("disk")
        os.truncate(disk, _DISK_SIZE)
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        device, exchange = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        undo.callback(device.close)
        undo.callback(exchange.close)
        undo.callback(near.close)
        undo.callback(far.close)
        for fd in (*signals.values(), theirs, typed, shown, output, disk, shared):
            undo.callback(os.close, fd)
        backend, program = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        undo.callback(backend.close)
        threading.Thread(target=_serve, args=[program]).start()
        undo.callback(program.shutdown, socket.SHUT_RDWR)
        memory = GuestMemory.create(layout.ram_regions(_MEM_BELOW_4G))
        undo.callback(memory.close)
        # by the kind of a descriptor that an opener opens
        stand_ins = {
            "input": theirs, "output": output, "disk": disk, "tap": near.fileno(), "stream": near.fileno(),
            "directory": shared,
            "exchange": device.fileno(), "line": theirs, "back-end": backend.fileno(),
        }  # fmt: skip
        own = [(d, len(numbers)) for d, numbers in instance.entry.own_slots() if d.kind in stand_ins]
        fds = {d.name: (stand_ins[d.kind],) * count for d, count in own}
        opened = {instance.name: Opened(fds)}
        core = Core(round(_TIMEOUT_S * 1000))
        spawner = Spawner(
            nursery, core, jail.Mode.FULL, _TIMEOUT_S, signals, memory.fd, opened, say, transport=transport
        )
        undo.callback(spawner.close)
        proxy = spawner.spawn(instance)
        undo.callback(_end, proxy)
        proxy.await_ready(jail.Mode.FULL, watch and watch(instance.entry.name, instance.name))
        proxy.control.sock.settimeout(_TIMEOUT_S)
        events = {name: (fd,) for name, fd in signals.items()} | spawner.eventfds.get(instance.name, {})
        yield _Life(proxy, core, memory, events, typed, shown)


def _serve(front: socket.socket) -> None:
    """As a vhost-user back end that has nothing to do."""
    with front, front.makefile("rwb") as stream:
        while header := stream.read(HEADER_SIZE):
            asked = parse_header(header)
            body = stream.read(asked.size)
            if asked.request == Request.GET_VRING_BASE:
                _, ring = parse(asked, body, 0)
                stream.write(pack_reply(Request.GET_VRING_BASE, ring))
                stream.flush()


def _end(proxy: Proxy) -> None:
    proxy.kill()
    if not proxy.reaped:
        os.waitpid(proxy.pid, 0)
    proxy.on_log()
    proxy.close()
