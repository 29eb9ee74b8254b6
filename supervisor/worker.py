"""The one device process of a back end, replaced whenever what it was handed at its start has changed.

A sealed process takes no descriptors, so memory, kicks and calls of another VMM are handed to a new one, and
the queues go on where the old one has left them.  It is the same process as under `vmsup run`, and it is
driven by the same registers; bus mastering is what lets it look at its rings.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Final

from devproc import jail, wire
from devproc.catalog import CATALOG
from devproc.vhost import message
from devproc.vhost.message import Memory, Request
from devproc.vhost.position import at_positions, positions
from devproc.virtio import spec
from devproc.wire import Space
from devproc.zygote import Zygote
from kvmcore.exitloop import Core
from kvmcore.memory import GuestMemory
from supervisor import reaper
from supervisor.host import Opened
from supervisor.machine import Function, Instance
from supervisor.proxy import CLOSED, Proxy
from supervisor.reaper import DeviceDied
from supervisor.spawn import Spawner

_PAGE: Final = 4096
_COMMAND: Final = 0x04
_MASTER: Final = 0x0004
_MSIX_CONTROL: Final = spec.CONFIG_MSIX + 2
_MSIX_ENABLE: Final = 0x8000


@dataclass(frozen=True)
class Vring:
    """A ring that is to be served: guest-physical addresses, where to go on, eventfds (`call` None: none)."""

    size: int
    desc: int
    driver: int
    device: int
    position: int
    kick: int
    call: int | None


class NotAccepted(Exception):
    """The device does not take what the front end has set up; one line."""


class Worker:
    """Starts and stops the process.

    Args:
        function: its kind and parameters; `opened` what it works on.
        undo: takes what closes our own descriptors.
        say: takes (name, line) for every line the device logs.

    Attributes:
        proxies: the process, if there is one.
        queues: how many the device has.
    """

    def __init__(
        self,
        zygote: Zygote,
        function: Function,
        opened: Opened,
        mode: jail.Mode,
        timeout_s: float,
        undo: ExitStack,
        say: Callable[[str, str], None],
    ) -> None:
        self.proxies: list[Proxy] = []
        self._vrings: Mapping[int, Vring] = {}
        self._zygote = zygote
        self._function = function
        self._opened = opened
        self._mode = mode
        self._timeout_s = timeout_s
        self._say = say
        self._entry = CATALOG[function.kind]
        assert self._entry.virtio is not None
        self.queues: Final = len(self._entry.virtio.queue_sizes)
        # Of a ring that is not served nobody hears, and nobody kicks it; nor of a configuration that has
        # changed, which nobody can have it do.
        eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        for fd in eventfds:
            undo.callback(os.close, fd)
        self._unheard, self._unkicked = eventfds
        # A process that only knows its configuration has a guest without memory worth the name.
        self._nothing = GuestMemory.create([(0, _PAGE)])
        undo.callback(self._nothing.close)

    def features(self) -> int:
        """What the device offers."""
        proxy = self._process()
        low, high = (self._feature(proxy, select) for select in (0, 1))
        return low | high << 32

    def _feature(self, proxy: Proxy, select: int) -> int:
        proxy.write(Space.BAR0, spec.DEVICE_FEATURE_SELECT, 4, select)
        return proxy.read(Space.BAR0, spec.DEVICE_FEATURE, 4)

    def read_config(self, offset: int, size: int) -> bytes:
        """`size` bytes of the device's configuration, of which there are at most `message.CONFIG_MAX`."""
        proxy = self._process()
        return bytes(proxy.read(Space.BAR0, spec.BAR_DEVICE + offset + i, 1) for i in range(size))

    def write_config(self, offset: int, data: bytes) -> None:
        """Write the device's configuration, of which the device decides what is writable."""
        proxy = self._process()
        for i, byte in enumerate(data):
            proxy.write(Space.BAR0, spec.BAR_DEVICE + offset + i, 1, byte)

    def serve(self, features: int, memory: Memory, files: Sequence[int], vrings: Mapping[int, Vring]) -> None:
        """Start a process that serves `vrings`; there must be none that serves any.

        Args:
            memory, files: the front end's regions, and a descriptor for each.

        Raises:
            NotAccepted: it does not take this for its guest.
            DeviceDied: it fails.
        """
        self.stop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(ours, [message.pack(Request.SET_MEM_TABLE, memory)], list(files))
            try:
                proxy = self._start(theirs.fileno(), 0, vrings)
            except DeviceDied as e:
                with suppress(DeviceDied):
                    self.stop()
                raise NotAccepted(str(e)) from None
        self._negotiate(proxy, features)
        proxy.write(Space.CONFIG, _MSIX_CONTROL, 2, _MSIX_ENABLE)
        for index, vring in vrings.items():
            self._set_up(proxy, index, vring)
        if self._add_status(proxy, spec.DRIVER_OK) & spec.DEVICE_NEEDS_RESET:
            raise NotAccepted("the device does not accept where the rings are")
        saved = proxy.ask(wire.Save())
        try:
            if not isinstance(saved, wire.State):
                raise ValueError("does not save its state")
            state = at_positions(saved.state, {i: vring.position for i, vring in vrings.items()})
        except ValueError as e:
            raise NotAccepted(str(e)) from None
        proxy.ask(wire.Restore(state))
        self._vrings = vrings
        proxy.write(Space.CONFIG, _COMMAND, 2, _MASTER)

    def halt(self) -> dict[int, int]:
        """Stop serving: where each queue is to be gone on with.

        Raises:
            DeviceDied: it fails.
        """
        vrings, self._vrings = self._vrings, {}
        if not vrings:
            return {}
        proxy = self.proxies[0]
        proxy.write(Space.CONFIG, _COMMAND, 2, 0)
        saved = proxy.ask(wire.Save())
        try:
            if not isinstance(saved, wire.State):
                raise ValueError("does not save its state")
            now = dict(enumerate(positions(saved.state)))
        except ValueError as e:
            raise DeviceDied(proxy.name, f"broke the protocol: {e}") from None
        self.stop()
        # A device that needs a reset has forgotten: the ring is taken up where it was when that began.
        return {i: vring.position if (at := now.get(i)) is None else at for i, vring in vrings.items()}

    def stop(self) -> None:
        """End the process, after it has written out what it holds.

        Raises:
            DeviceDied: it had died already, or does so now.
        """
        self._vrings = {}
        if not self.proxies:
            return
        proxy = self.proxies[0]
        proxy.ask_to_stop()
        until_s = time.monotonic() + self._timeout_s + self._entry.patience_s
        try:
            while select.select([proxy.control], [], [], max(0.0, until_s - time.monotonic()))[0]:
                proxy.on_control()
        except DeviceDied as e:
            if e.cause != CLOSED:
                raise
        proxy.kill()  # which one that has closed everything is past noticing
        how = os.waitid(os.P_PID, proxy.pid, os.WEXITED)
        proxy.reaped = True
        proxy.on_log()
        self.proxies.remove(proxy)
        proxy.close()
        assert how is not None
        if (how.si_code, how.si_status) != (os.CLD_EXITED, 0):
            raise DeviceDied(proxy.name, reaper.cause(how))

    def _process(self) -> Proxy:
        return self.proxies[0] if self.proxies else self._start(self._nothing.fd, _PAGE, {})

    def _start(self, memory: int, size: int, vrings: Mapping[int, Vring]) -> Proxy:
        wanted = [vrings.get(i) for i in range(self.queues)]
        calls = [self._unheard if v is None or v.call is None else v.call for v in wanted]
        fds = {
            **self._opened.fds,
            "memory": (memory,),
            "irq": (self._unheard, *calls),
            "intx": (self._unheard,),
            "resample": (self._unkicked,),
            "kick": tuple(self._unkicked if v is None else v.kick for v in wanted),
        }
        name = self._function.name
        spawner = Spawner(
            self._zygote,
            Core(round(self._timeout_s * 1000)),
            self._mode,
            self._timeout_s,
            {},
            memory,
            {name: Opened(fds, self._opened.params)},
            self._say,
            "socket",
        )
        proxy = spawner.spawn(Instance(name, self._entry, params=(size, 0, *self._function.params)))
        self.proxies.append(proxy)
        proxy.await_ready(self._mode)
        return proxy

    def _add_status(self, proxy: Proxy, bits: int) -> int:
        status = proxy.read(Space.BAR0, spec.DEVICE_STATUS, 1) | bits
        proxy.write(Space.BAR0, spec.DEVICE_STATUS, 1, status)
        return proxy.read(Space.BAR0, spec.DEVICE_STATUS, 1)

    def _negotiate(self, proxy: Proxy, features: int) -> None:
        self._add_status(proxy, spec.ACKNOWLEDGE | spec.DRIVER)
        for select_ in (0, 1):
            proxy.write(Space.BAR0, spec.DRIVER_FEATURE_SELECT, 4, select_)
            proxy.write(Space.BAR0, spec.DRIVER_FEATURE, 4, features >> 32 * select_ & 0xFFFF_FFFF)
        if not self._add_status(proxy, spec.FEATURES_OK) & spec.FEATURES_OK:
            raise NotAccepted(f"the device does not accept features {features:#x}")

    def _set_up(self, proxy: Proxy, index: int, vring: Vring) -> None:
        def put(at: int, size: int, value: int) -> None:
            proxy.write(Space.BAR0, at, size, value)

        put(spec.QUEUE_SELECT, 2, index)
        put(spec.QUEUE_SIZE, 2, vring.size)
        if proxy.read(Space.BAR0, spec.QUEUE_SIZE, 2) != vring.size:
            raise NotAccepted(f"the device does not accept {vring.size} entries in queue {index}")
        for at, gpa in (
            (spec.QUEUE_DESC, vring.desc),
            (spec.QUEUE_DRIVER, vring.driver),
            (spec.QUEUE_DEVICE, vring.device),
        ):
            put(at, 4, gpa & 0xFFFF_FFFF)
            put(at + 4, 4, gpa >> 32)
        put(spec.QUEUE_MSIX_VECTOR, 2, index + 1)
        put(spec.QUEUE_ENABLE, 2, 1)
