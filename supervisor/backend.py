"""`vmsup device block|net|rng --socket PATH`: a device of ours for another program's VMM (vhost-user).

This process listens, and parses what front ends say (supervisor/frontend.py); the device is a process in its
own jail (supervisor/worker.py).  One front end at a time; when it has left the next one may come.  Left out:
connecting to a front end that listens, and more than one pair of queues of a card.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from devproc import jail, wire, zygote
from devproc.vhost.connection import Closed
from devproc.vhost.message import MessageError
from kvmcore.errors import ConfigError, VmsupError
from supervisor import machine
from supervisor.config import DEVICE_TIMEOUT_S, TABLES, BlockConfig, NetConfig, RunConfig
from supervisor.ending import Ending
from supervisor.frontend import FrontEnd
from supervisor.host import Host, Opened
from supervisor.janitor import Janitor
from supervisor.keyvalue import parse
from supervisor.launch import Say, end_devices, end_zygote
from supervisor.reaper import DeviceDied
from supervisor.runloop import RunLoop, Signals
from supervisor.worker import NotAccepted, Worker

_CONTROL_QUEUE: Final = sum(1 << bit for bit in (2, 17, 18, 19, 20, 21, 22, 23))
"""Features of a card (virtio 1.2, 5.1.3) that need its control queue, which the front end keeps to itself."""


@dataclass(frozen=True)
class BackendConfig:
    """What `vmsup device` was asked for: exactly one device, and where front ends find it."""

    socket: str
    block: tuple[BlockConfig, ...] = ()
    net: tuple[NetConfig, ...] = ()
    rng: bool = False
    jail: str = "full"
    device_timeout: float = DEVICE_TIMEOUT_S

    def function(self) -> machine.Function:
        """The one device."""
        (function,) = machine.virtio_functions(RunConfig("", block=self.block, net=self.net, rng=self.rng))
        return function

    @property
    def rings(self) -> int:
        """How many rings a front end may set up."""
        return self.block[0].queues if self.block else 2 if self.net else 1


def build(kind: str, options: Mapping[str, Any]) -> BackendConfig:
    """The configuration from the command line's options.

    Raises:
        ConfigError: anything that cannot be used.
    """
    lists: dict[str, Any] = {}
    if kind in TABLES:
        keys, made_of = TABLES[kind]
        lists[kind] = tuple(
            made_of.from_values(f"--{kind}", parse(f"--{kind}", keys, text)) for text in options[kind]
        )
        if len(lists[kind]) > 1:
            raise ConfigError(f"--{kind} given twice: a back end is one device")
    config = BackendConfig(options["socket"], **lists, rng=kind == "rng", jail=options["jail"])
    if any(net.queues > 1 for net in config.net):
        raise ConfigError("--net queues=: a back end has one pair of queues")
    return config


def serve(config: BackendConfig, say: Say) -> Ending:
    """Offer the device of `config` until we are told to stop, or it dies; `say` takes what there is to say.

    Raises:
        VmsupError: it could not be started; everything is undone.
    """
    with ExitStack() as undo:
        function = config.function()
        mode = jail.Mode(config.jail)
        if mode is jail.Mode.NONE:
            say("WARNING: --no-jail: the device's process runs with all your rights, and so may a guest")
        with _step("start the janitor"):
            janitor = Janitor.start(mode)
            undo.callback(janitor.finish)
        with _step("fork the zygote"):
            jail.adopt_orphans()
            undo.callback(jail.adopt_orphans, False)
            nursery = zygote.start([function.kind], mode=mode)
            undo.callback(end_zygote, nursery)
        with _step("open what the device works on"):
            host = Host(undo, janitor, partial(say, level="info", event="console"))
            assert function.opens is not None or not function.params
            opened = function.opens(host) if function.opens is not None else Opened({})
        with _step("start the device"):
            worker = Worker(
                nursery, function, opened, mode, config.device_timeout, undo,
                lambda name, line: say(f"{name}: {line}", event="log", device=name),
            )  # fmt: skip
            undo.callback(end_devices, worker.proxies)
            offered = worker.features()
        with _step("listen"):
            listener = undo.enter_context(_listen(config.socket, janitor))
        with _step("prepare to serve"):
            signals = Signals()
            undo.callback(signals.close)
            back_end = _BackEnd(listener, worker, config, offered, say)
            loop = RunLoop(
                signals, worker.proxies, (), None, lambda: None, [*host.watched, back_end], 0, nursery.pid
            )
            back_end.lost = partial(loop.device_gone, 0)
        with _step("drop privileges"):
            janitor.seal(say)
            jail.drop_privileges()
        return loop.run((), lambda: None)


class _BackEnd:
    """Accepts one front end after the other; a `host.Watched`.

    Attributes:
        lost: takes how the device's process was found to be gone; the run loop finds out why.
    """

    def __init__(
        self, listener: socket.socket, worker: Worker, config: BackendConfig, offered: int, say: Say
    ) -> None:
        self.lost: Callable[[str], None] = lambda how: None
        self._listener = listener
        self._worker = worker
        self._rings = config.rings
        # The front end has a card's control queue, and the pairs of queues are then one.
        self._queues = 1 if config.net else config.rings
        self._offered = offered & ~_CONTROL_QUEUE if config.net else offered
        self._has_config = bool(config.block)
        self._say = say
        self._front_end: FrontEnd | None = None

    def wants(self) -> dict[int, int]:
        if self._front_end is None:
            return {self._listener.fileno(): select.POLLIN}
        return self._front_end.wants()

    def ready(self, fd: int, got: int) -> None:
        if fd not in self.wants():  # what was ready before it has changed that
            return
        if self._front_end is None:
            accepted, _ = self._listener.accept()
            self._front_end = FrontEnd(
                accepted, self._worker, self._offered, self._rings, self._queues, self._has_config
            )
            return
        try:
            self._front_end.ready(fd)
        except DeviceDied as e:
            if not self._worker.proxies or self._worker.proxies[0].reaped:
                raise
            self.lost(e.cause)
        except (Closed, MessageError, NotAccepted) as e:
            if not isinstance(e, Closed):
                self._say(f"the front end is disconnected: {e}")
            self._disconnect()

    def _disconnect(self) -> None:
        front_end, self._front_end = self._front_end, None
        try:
            self._worker.stop()
        finally:
            if front_end is not None:
                front_end.close()


def _listen(path: str, janitor: Janitor) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(1)
        janitor.unlink(path)
    except OSError as e:
        listener.close()
        raise ConfigError(f"--socket {path}: {e.strerror or e}") from None
    finally:
        os.umask(before)
    return listener


@contextmanager
def _step(name: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise  # it names the user's own file or option
    except (VmsupError, jail.JailError, wire.WireError, zygote.SpawnError) as e:
        raise VmsupError(f"cannot {name}: {e}") from e
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        raise VmsupError(f"cannot {name}: {where}{e.strerror or e}") from e
