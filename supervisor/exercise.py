"""One device process in its jail, without a guest: random accesses, and all that the supervisor can ask.

What `vmsup policy learn` watches when there is no VM to watch, and what `vmsup policy verify` runs under the
shipped policy.  Left out: what takes long (an alarm a minute away) and what only a bug can bring about (a
model that raises).
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import time
from collections.abc import Callable, Iterator
from typing import Final

from devproc import jail, wire, zygote
from devproc.catalog import Entry
from devproc.channel import ChannelClosed
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
_TIMEOUT_S: Final = 5.0
_PAUSE_S: Final = 0.1  # for deadlines that the accesses have set


def exercise(device: str, say: Say, filters: Filters | None = None, watch: Watch | None = None) -> None:
    """Put `device` through a life that ends by Stop, and one that ends by an access to no register.

    Args:
        device: a catalogue name.
        say: takes (device, line) for every line that the device logs.
        filters: what it is jailed by [its policy].
        watch: of (catalogue name, instance name): takes its listener, see `Proxy.await_ready`.

    Raises:
        DeviceDied: it did not live as it should; the text names the system call that it was killed for.
        SpawnError: it could not be started.
    """
    instances = machine.instances(RunConfig(kernel="", irqchip="split"), _MEM_BELOW_4G, 0)
    instance = next(i for i in instances if i.entry.name == device)
    with contextlib.ExitStack() as undo:
        jail.adopt_orphans()
        undo.callback(jail.adopt_orphans, False)
        nursery = zygote.start([device], filters)
        undo.callback(os.waitpid, nursery.pid, 0)
        undo.callback(nursery.close)
        for last_words in (_stop, _stray):
            with _process(nursery, instance, say, watch) as life:
                life.explained(last_words)


class _Life:
    """A device process, and the host's end of whatever it holds."""

    def __init__(self, proxy: Proxy, core: Core, signals: list[int], typed: int, shown: int) -> None:
        self.proxy = proxy
        self.core = core
        self._signals = signals
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
        return self.proxy.control.recv()

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
    life.access(ACCESSES // 2)
    life.control()
    time.sleep(_PAUSE_S)
    life.access(ACCESSES // 2)
    life.control()
    life.proxy.ask_to_stop()
    life.await_end(0)


def _stray(life: _Life) -> None:
    with contextlib.suppress(DeviceGone):
        life.core.read(life.proxy.index, Space.BAR5, 0, 1)
    answer = life.proxy.control.recv()
    if not isinstance(answer, wire.Failed):
        raise PeerError(f"{type(answer).__name__} instead of Failed")
    life.await_end(1)


@contextlib.contextmanager
def _process(
    nursery: zygote.Zygote, instance: machine.Instance, say: Say, watch: Watch | None
) -> Iterator[_Life]:
    with contextlib.ExitStack() as undo:
        signals = {name: os.eventfd(0, os.EFD_NONBLOCK) for name in ("panic", "poweroff", "reset")}
        theirs, typed = os.pipe2(os.O_NONBLOCK)
        shown, output = os.pipe2(os.O_NONBLOCK)
        for fd in (*signals.values(), theirs, typed, shown, output):
            undo.callback(os.close, fd)
        memory = GuestMemory.create(layout.ram_regions(_MEM_BELOW_4G))
        undo.callback(memory.close)
        stand_ins = {"input": theirs, "output": output}  # by the kind of a descriptor that an opener opens
        fds = {d.name: (stand_ins[d.kind],) for d in instance.entry.descriptors if d.kind in stand_ins}
        opened = {instance.name: Opened(fds)}
        core = Core(round(_TIMEOUT_S * 1000))
        spawner = Spawner(nursery, core, jail.Mode.FULL, _TIMEOUT_S, signals, memory.fd, opened, say)
        undo.callback(spawner.close)
        proxy = spawner.spawn(instance)
        undo.callback(_end, proxy)
        proxy.await_ready(jail.Mode.FULL, watch and watch(instance.entry.name, instance.name))
        proxy.control.sock.settimeout(_TIMEOUT_S)
        own = spawner.eventfds.get(instance.name, {})
        written = [fd for d in instance.entry.descriptors if d.kind == "signal" for fd in own.get(d.name, ())]
        yield _Life(proxy, core, [*signals.values(), *written], typed, shown)


def _end(proxy: Proxy) -> None:
    proxy.kill()
    if not proxy.reaped:
        os.waitpid(proxy.pid, 0)
    proxy.on_log()
    proxy.close()
