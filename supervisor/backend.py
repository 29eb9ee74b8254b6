"""`vmsup device block|net|rng --socket PATH`: a device of ours for another program's VMM (vhost-user).

Front ends are heard by a sealed process (supervisor/frontend.py), the device is a process in its own jail,
and this one starts the latter as the former asks (supervisor/worker.py, supervisor/errand.py).  One front end
at a time; when it has left the next one may come.  Left out: connecting to a front end that listens, a
configuration that changes, and more than one pair of queues of a card.
"""

from __future__ import annotations

import select
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, Final

from devproc import jail, zygote
from kvmcore.errors import ConfigError
from supervisor import errand, frontend, machine
from supervisor.begin import step
from supervisor.companion import Companion
from supervisor.config import RunConfig
from supervisor.config import build as build_run
from supervisor.ending import Ending
from supervisor.frontend import FrontEnd
from supervisor.host import Host, Opened
from supervisor.janitor import Janitor
from supervisor.launch import Say, end_devices
from supervisor.reaper import DeviceDied
from supervisor.runloop import RunLoop, Signals
from supervisor.worker import Worker

_CONTROL_QUEUE: Final = sum(1 << bit for bit in (2, 17, 18, 19, 20, 21, 22, 23))
"""Features of a card (virtio 1.2, 5.1.3) that need its control queue, which the front end keeps to itself."""


def build(kind: str, options: Mapping[str, Any]) -> RunConfig:
    """The configuration of a machine that has the one device, from the command line's `options`.

    Raises:
        ConfigError: anything that cannot be used.
    """
    taken = ("socket", "jail", "device_timeout", kind)
    wanted = {key: options[key] for key in taken if key in options}
    config = build_run({**wanted, "kernel": "", "rng": kind == "rng"})
    if len(config.block) + len(config.net) > 1:
        raise ConfigError(f"--{kind} given twice: a back end is one device")
    if any(net.queues > 1 for net in config.net):
        raise ConfigError("--net queues=: a back end has one pair of queues")
    return config


def rings(config: RunConfig) -> int:
    """How many rings a front end may set up."""
    return config.block[0].queues if config.block else 2 if config.net else 1


def serve(config: RunConfig, say: Say) -> Ending:
    """Offer the device of `config` until we are told to stop, or it dies; `say` takes what there is to say.

    Raises:
        VmsupError: it could not be started; everything is undone.
    """
    with ExitStack() as undo:
        (function,) = machine.virtio_functions(config)
        assert config.socket is not None
        mode = jail.Mode(config.jail)
        if mode is jail.Mode.NONE:
            say("WARNING: --no-jail: the device's process runs with all your rights, and so may a guest")
        with step("start the janitor"):
            janitor = Janitor.start(mode)
            undo.callback(janitor.finish)
        with step("fork the zygote"):
            nursery = zygote.start([function.kind], mode=mode)
            undo.callback(nursery.end)
        with step("open what the device works on"):
            host = Host(undo, janitor, partial(say, level="info", event="console"))
            assert function.opens is not None or not function.params
            opened = function.opens(host) if function.opens is not None else Opened({})
        with step("start the device"):
            worker = Worker(
                nursery, function, opened, mode, config.device_timeout, undo,
                lambda name, line: say(f"{name}: {line}", event="log", device=name),
            )  # fmt: skip
            undo.callback(end_devices, worker.proxies)
            offered = worker.features()
        try:
            listener = undo.enter_context(janitor.listen(config.socket))
        except OSError as e:
            raise ConfigError(f"--socket {config.socket}: {e.strerror or e}") from None
        with step("start the process for front ends"):
            # The front end has a card's control queue, and the pairs of queues are then one.
            queues = 1 if config.net else rings(config)
            visible = offered & ~_CONTROL_QUEUE if config.net else offered
            front = Companion.fork(
                "frontend",
                mode,
                lambda sock: frontend.serve(
                    sock,
                    listener,
                    lambda accepted, asker: FrontEnd(
                        accepted, asker, visible, rings(config), queues, has_config=bool(config.block)
                    ),
                    mode,
                ),
                keep=(listener.fileno(),),
            )
            undo.callback(front.finish)
            listener.close()
        with step("prepare to serve"):
            signals = Signals()
            undo.callback(signals.close)
            errands = _Errands(front, worker, say)
            loop = RunLoop(
                signals, worker.proxies, (), None, lambda: None, [*host.watched, errands], 0, nursery.pid
            )
            errands.lost = partial(loop.device_gone, 0)
        with step("drop privileges"):
            janitor.seal(say)
            front.seal(say)
            jail.drop_privileges()
        return loop.run((), lambda: None)


class _Errands:
    """Does what the process for front ends asks; a `host.Watched`.

    Attributes:
        lost: takes how the device's process was found to be gone; the run loop finds out why.
    """

    def __init__(self, front: Companion, worker: Worker, say: Say) -> None:
        self.lost: Callable[[str], None] = lambda how: None
        self._front = front
        self._worker = worker
        self._say = say

    def wants(self) -> dict[int, int]:
        return {self._front.sock.fileno(): select.POLLIN}

    def ready(self, fd: int, got: int) -> None:
        try:
            errand.answer(self._front.sock, self._worker, self._say)
        except (EOFError, ConnectionError):
            raise DeviceDied(self._front.name, "has ended") from None
        except ValueError as e:
            raise DeviceDied(self._front.name, f"broke the protocol: {e}") from None
        except DeviceDied as e:
            if not self._worker.proxies or self._worker.proxies[0].reaped:
                raise
            self.lost(e.cause)
