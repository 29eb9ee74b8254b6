"""The zygote: forked before /dev/kvm is opened, it forks every device process (ARCHITECTURE.md).

Here is the supervisor's side: the handle, and what a new device says until it is ready.  The process itself
is `devproc/nursery.py`, which is imported after the fork.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from devproc import jail
from devproc.catalog import Entry
from devproc.channel import Channel, ChannelClosed
from devproc.record import record
from devproc.violations import Violation, read_violation
from devproc.wire import (
    CONTROL_TABLE,
    SPAWN_TABLE,
    VERSION,
    Failed,
    Go,
    Hello,
    Listener,
    Log,
    PeerError,
    Prepare,
    Ready,
    Scalar,
    Sender,
    Spawn,
    Spawned,
    require_c_extension,
)
from policies.syscalls import NAMES

Filters = tuple[bytes, bytes]

READY_WITHIN_S: Final = 30
PROGRAM: Final = "devproc.child"
_NOTES_MAX: Final = 64  # a jail has a dozen steps; without end they would keep the start from ever failing
_ZYGOTE_S: Final = 30.0


class SpawnError(Exception):
    """A device process could not be started; one line, naming the device and the step."""


class Forbidden(SpawnError):
    """It made a system call that its policy does not allow, and waits in the kernel: kill it."""

    def __init__(self, violation: Violation) -> None:
        name = NAMES.get(violation.nr, "unknown")
        super().__init__(f"made system call {violation.nr} ({name}), which its policy forbids")
        self.violation = violation


class Zygote:
    """The supervisor's handle; `pid` is the zygote's."""

    def __init__(self, pid: int, channel: Channel) -> None:
        self.pid = pid
        self._channel = channel
        self._asked: list[str] = []
        self._made = False  # anything: until then nobody but `end` waits for it

    def prepare(
        self, kinds: Sequence[str], program: str = PROGRAM, mode: jail.Mode | None = jail.Mode.FULL
    ) -> None:
        """Say what will be asked for, before anything is.

        Args:
            kinds: catalogue names to get ready for while the caller goes on.
            program: the module that a device process runs, a `nursery.Program`.
            mode: the one mode that it will be asked for; None: any.  Unless it is "full" the zygote keeps all
                of the caller's rights, because a device may.

        Raises:
            SpawnError: the zygote is gone.
        """
        with self._talking():
            self._channel.send(Prepare(tuple(kinds), program, "" if mode is None else mode.value))

    def ask(
        self,
        device: str,
        name: str,
        fds: Sequence[int],
        *,
        host_id: int = 0,
        mode: jail.Mode = jail.Mode.FULL,
        params: tuple[Scalar, ...] = (),
    ) -> None:
        """Ask for a device process, which `make` makes.

        Args:
            device: the catalogue name.
            name: the instance, "serial1".
            fds: for the slots from FD_LOG on, in order; the caller still owns its copies.
            host_id: the uid and gid on the host; 0 for the caller's own, the only one an ordinary user has.
            mode: how much jail.
            params: the values of the entry's parameters, in its order.

        Raises:
            SpawnError: the zygote is gone.
        """
        self._asked.append(name)
        with self._talking():
            self._channel.send(Spawn(device, name, host_id, mode.value, params), fds)

    def make(self) -> list[int | SpawnError]:
        """Make all that were asked for since the last time, which costs less than one by one.

        Returns for each its pid, a child of the caller's, or why there is none.  They go on by themselves:
        `await_ready` on a control channel says how that went.

        Raises:
            SpawnError: the zygote is gone.
        """
        self._made = True
        with self._talking():
            self._channel.send(Go())
            answer = self._channel.recv()
        assert isinstance(answer, Spawned)  # by the table
        asked, self._asked = self._asked, []
        return [
            SpawnError(f"{name}: {outcome}") if isinstance(outcome, str) else outcome
            for name, outcome in zip(asked, answer.outcomes, strict=True)
        ]

    def spawn(self, device: str, name: str, fds: Sequence[int], **how: Any) -> int:
        """`ask` and `make` for one.

        Raises:
            SpawnError: it did not start, or the zygote is gone.
        """
        self.ask(device, name, fds, **how)
        (outcome,) = self.make()
        if isinstance(outcome, SpawnError):
            raise outcome
        return outcome

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        names = f"{', '.join(self._asked)}: " if self._asked else ""
        try:
            yield
        except ChannelClosed:
            raise SpawnError(f"{names}the zygote is gone") from None
        except TimeoutError:
            raise SpawnError(f"{names}the zygote said nothing for {_ZYGOTE_S:g} s") from None

    def close(self) -> None:
        """Let the zygote end; the devices it forked stay."""
        self._channel.close()

    def end(self) -> None:
        """`close`, and wait until it has gone."""
        if not self._made:  # it may be importing, and would finish that first
            os.kill(self.pid, signal.SIGKILL)
        self.close()
        with contextlib.suppress(ChildProcessError):  # reaped already
            os.waitpid(self.pid, 0)


@record
class Greeting:
    """What a device process said until it was ready.

    Attributes:
        digest: SHA-256 of its register table.
        listener: the seccomp listener, now the caller's (`devproc.violations`); None without a filter.
        notes: (logging level, text): jail layers this kernel lacks, or that failed in mode "best-effort".
    """

    digest: bytes
    listener: int | None
    notes: tuple[tuple[int, str], ...]


def control_channel(sock: socket.socket) -> Channel:
    """The supervisor's end of a device's control channel."""
    return Channel(sock, CONTROL_TABLE, "start", Sender.SUPERVISOR, Sender.DEVICE)


def await_ready(
    control: Channel,
    device: str,
    mode: jail.Mode,
    within_s: float = READY_WITHIN_S,
    watch: Callable[[int], None] | None = None,
) -> Greeting:
    """Follow a device from its first message to `Ready`.

    Args:
        control: its control channel.
        device: its catalogue name.
        mode: the jail it was asked to enter.
        within_s: the longest that all of this may take.
        watch: called with the listener when it has come: only what it starts can then let the device go on.

    Raises:
        Forbidden: its policy lacks a call that it needs; kill it.
        SpawnError: it says why it failed, or is another device than asked for.
        PeerError: it broke the protocol, or is ready without the filter that `mode` demands.
        ChannelClosed: it died.
        TimeoutError: it is not ready after `within_s`.
    """
    until_s = time.monotonic() + within_s
    notes: list[tuple[int, str]] = []
    listener: int | None = None
    try:
        while True:
            _await_word(control, listener if watch is None else None, until_s)
            expecting = control.state == "greeted" and mode is not jail.Mode.NONE
            message, fds = control.recv_fds(1) if expecting else (control.recv(), [])
            if isinstance(message, Listener) and len(fds) == 1:
                listener = fds[0]
                if watch is not None:
                    watch(listener)
                continue
            for fd in fds:
                os.close(fd)
            match message:
                case Hello(version, name) if (version, name) != (VERSION, device):
                    raise SpawnError(f"{name} version {version} answers, expected {device} version {VERSION}")
                case Hello():
                    pass
                case Log(level, text) if len(notes) < _NOTES_MAX:
                    notes.append((level, text))
                case Failed(why):
                    raise SpawnError(why)
                case Ready(digest) if listener is not None or mode is not jail.Mode.FULL:
                    return Greeting(digest, listener, tuple(notes))
                case _:
                    raise PeerError(f"unexpected {type(message).__name__} before it is sealed")
    except BaseException:
        if listener is not None:
            os.close(listener)
        raise


def _await_word(control: Channel, listener: int | None, until_s: float) -> None:
    """Until there is something to receive; what the device was held for raises Forbidden."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    if listener is not None:
        poll.register(listener, select.POLLIN)
    while left_s := max(0.0, until_s - time.monotonic()):
        ready = [fd for fd, _ in poll.poll(left_s * 1000)]
        if control.fileno() in ready:
            return
        if listener in ready:
            try:
                violation = read_violation(listener)
            except OSError as e:
                raise PeerError(f"what it sent is no seccomp listener: {e.strerror}") from None
            if violation is not None:
                raise Forbidden(violation)
            poll.unregister(listener)  # the process is dead, which its channel says too
    raise TimeoutError


def start(
    kinds: Sequence[str] = (),
    filters: Callable[[Entry], Filters] | None = None,
    program: str = PROGRAM,
    mode: jail.Mode | None = jail.Mode.FULL,
) -> Zygote:
    """`fork` and `Zygote.prepare`."""
    zygote = fork(filters)
    zygote.prepare(kinds, program, mode)
    return zygote


def fork(filters: Callable[[Entry], Filters] | None = None) -> Zygote:
    """Fork the zygote.  Call it from the main thread, before there are others and before /dev/kvm is opened.

    Args:
        filters: where the two seccomp programs of a kind come from; called in the zygote, once per kind
            [policies/NAME.policy].

    Raises:
        WireError: msgpack's C extension is missing.
    """
    require_c_extension()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            # Device code and policies are the zygote's alone: the supervisor never has them in memory.
            from devproc import nursery  # noqa: PLC0415

            nursery.main(theirs.detach(), parent, filters or nursery.compiled)
        except ChannelClosed:
            pass  # whoever asked has gone, and nobody hears of what was made
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    theirs.close()
    ours.settimeout(_ZYGOTE_S)
    return Zygote(pid, Channel(ours, SPAWN_TABLE, "start", Sender.SUPERVISOR, Sender.ZYGOTE))
