"""One device process that is fuzzed or rehearsed, in its jail, with the host's end of whatever it holds."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from typing import Final, Self

from devproc import jail, violations, wire, zygote
from devproc.catalog import MEMORY_PARAMS, Entry
from devproc.channel import Channel, ChannelClosed
from devproc.fuzz import page
from devproc.wire import ACCESS_TABLE, Done, PeerError, Read, Sender, Value, Write
from kvmcore.errors import VmsupError
from kvmcore.exitloop import Core, DeviceGone, is_lost
from kvmcore.mailbox import Mailbox
from kvmcore.memory import GuestMemory
from policies.syscalls import NAMES
from supervisor.reaper import cause
from supervisor.spawn import host_id

_HIGH_GPA: Final = 1 << 32
_READY_WITHIN_S: Final = 30.0
_DYING_S: Final = 0.3  # between the end of its descriptors and its own
_ASK: Final = os.WEXITED | os.WNOHANG | os.WNOWAIT
_CPU_CLOCK: Final = 2  # CPUCLOCK_SCHED of a whole process (include/linux/posix-timers.h)


class Died(Exception):
    """The process is gone, or was ended because it cannot go on.

    `kind` is "violation", "died" or "hang"; `why` one line.
    """

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind
        self.why = why


class Subject:
    """A device process.

    Args:
        nursery: a zygote of one of the programs in devproc/fuzz.
        entry: the kind of device.
        params: the values of its parameters.
        number: which host uid it gets as root; unlike those of others that live.
        clocks: what the clocks of a rehearsal show at first, monotonic and wall, in nanoseconds.
        request: what stands in its page when it starts.
        mailbox: whether `read` and `write` go through its mailbox, and not over its access channel.

    Attributes:
        page: what it shares with us.
        signals, kicks: our eventfds, in the order of `inputs.signals`.
        memory: the guest's, if the device has it.
        typed, shown: the pipes of its input and its output, ours to write and to read; -1 without.

    Raises:
        VmsupError: it did not start.
    """

    def __init__(
        self,
        nursery: zygote.Zygote,
        entry: Entry,
        mode: jail.Mode,
        params: tuple[wire.Scalar, ...],
        number: int,
        clocks: tuple[int, int] = (0, 0),
        request: object = None,
        mailbox: bool = False,
    ) -> None:
        self._undo = contextlib.ExitStack()
        self._listener: int | None = None
        self._core: Core | None = None
        self._index = 0
        self.pid = 0
        self.signals: list[int] = []
        self.kicks: list[int] = []
        self.typed = self.shown = -1
        try:
            self._start(nursery, entry, mode, params, number, clocks, request, mailbox)
        except BaseException:
            self.close()
            raise

    def _start(
        self,
        nursery: zygote.Zygote,
        entry: Entry,
        mode: jail.Mode,
        params: tuple[wire.Scalar, ...],
        number: int,
        clocks: tuple[int, int],
        request: object,
        through_mailbox: bool,
    ) -> None:
        undo = self._undo
        access, its_access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control, its_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for sock in (access, its_access, control, its_control):
            undo.callback(sock.close)
        self._log, its_log = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        undo.callback(os.close, self._log)
        mailbox = Mailbox.create()
        theirs = [its_log, *mailbox.fds]
        fds = [its_log, its_access.fileno(), its_control.fileno(), *mailbox.fds]
        given = entry.check_params(params)
        if entry.guest_memory:
            below, above = (int(given[p.name]) for p in MEMORY_PARAMS)
            ranges = ((0, below), (_HIGH_GPA, above))
            self.memory = GuestMemory.create([(gpa, size) for gpa, size in ranges if size])
            undo.callback(self.memory.close)
        for d, numbers in entry.own_slots():
            for _ in numbers:
                fds.append(self._descriptor(d.kind, theirs))
        if through_mailbox:
            self._core = Core(round(_READY_WITHIN_S * 1000))
            self._index = self._core.add_device(access.fileno(), mailbox=mailbox)
        memfd = page.create()
        theirs.append(memfd)
        self.page = page.Page(memfd)
        self.page.set_clocks(*clocks)
        self.page.ask(request)
        undo.callback(self.page.close)
        try:
            self.pid = nursery.spawn(
                entry.name, f"fuzz {entry.name}"[: wire.NAME_MAX], [*fds, memfd],
                host_id=host_id(number), mode=mode, params=params,
            )  # fmt: skip
        except zygote.SpawnError as e:
            raise VmsupError(str(e)) from None
        finally:
            for fd in theirs:
                os.close(fd)
            its_access.close()
            its_control.close()
        self._access = Channel(access, ACCESS_TABLE, "idle", Sender.SUPERVISOR, Sender.DEVICE)
        self.control = zygote.control_channel(control)
        control.settimeout(_READY_WITHIN_S)
        if self._core is None:
            access.settimeout(_READY_WITHIN_S)
        try:
            self._listener = zygote.await_ready(self.control, entry.name, mode).listener
        except (zygote.SpawnError, PeerError, ChannelClosed, TimeoutError) as e:
            raise VmsupError(f"{entry.name}: {e or 'died before it was ready'}") from None

    def _descriptor(self, kind: str, theirs: list[int]) -> int:
        """What the process is handed for one of its entry's descriptors."""
        if kind == "memory":
            return self.memory.fd
        if kind in ("signal", "kick"):
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            (self.signals if kind == "signal" else self.kicks).append(fd)
            self._undo.callback(os.close, fd)
            return fd
        if kind not in ("input", "output"):  # which a bench stands in for
            fd = _stand_in(kind)
            theirs.append(fd)
            return fd
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        ours, its = (writer, reader) if kind == "input" else (reader, writer)
        if kind == "input":
            self.typed = ours
        else:
            self.shown = ours
        self._undo.callback(os.close, ours)
        theirs.append(its)
        return its

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waiting(self) -> list[int]:
        """Descriptors of which one is readable when it has answered, has died, or does what it may not."""
        listener = [] if self._listener is None else [self._listener]
        return [self.control.fileno(), *listener]

    def read(self, space: int, offset: int, size: int) -> int:
        """What a register reads as.

        Raises:
            ChannelClosed, TimeoutError: it is dead or does not answer: `autopsy` says why.
            PeerError: it broke the protocol.
        """
        if self._core is not None:
            with _gone():
                return self._core.read(self._index, space, offset, size)
        self._access.send(Read(space, offset, size))
        answer = self._access.recv()
        assert isinstance(answer, Value)  # by the table
        return answer.data

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        """Write a register; it has taken effect on return.  Raises as `read`."""
        if self._core is not None:
            with _gone():
                self._core.write(self._index, space, offset, size, data, posted=False)
            return
        self._access.send(Write(space, offset, size, data, False))
        assert isinstance(self._access.recv(), Done)

    def cpu_ns(self) -> int:
        """CPU time that the process has used; a busy machine does not make it slower by this clock."""
        try:
            return time.clock_gettime_ns((~self.pid << 3) | _CPU_CLOCK)
        except OSError:  # it is gone
            return 0

    def hang(self, after_s: float) -> Died:
        """End the process, which has run one input for so much of its own time."""
        self._kill()
        return Died("hang", f"an input takes more than {after_s:g} s")

    def autopsy(self) -> Died:
        """Why it does not answer any more; it is dead afterwards."""
        violation = None
        listener = self._listener
        if listener is not None and select.select([listener], [], [], 0.05)[0]:
            violation = violations.read_violation(listener)
        until_s = time.monotonic() + _DYING_S
        while (ended := os.waitid(os.P_PID, self.pid, _ASK)) is None and violation is None:
            if time.monotonic() > until_s:
                break
            time.sleep(0.002)
        self._kill()
        if violation is not None:
            name = NAMES.get(violation.nr, "unknown")
            args = ", ".join(f"{a:#x}" for a in violation.args)
            return Died("violation", f"system call {violation.nr} {name}({args}), which its policy forbids")
        with contextlib.suppress(OSError):
            text = os.read(self._log, 65536).decode(errors="replace").strip()
            if text:
                return Died("died", text.splitlines()[-1])
        return Died("died", "ended" if ended is None else cause(ended))

    def _kill(self) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def close(self) -> None:
        """End the process and give back what is ours; again is harmless."""
        self._kill()
        if self._listener is not None:
            os.close(self._listener)
            self._listener = None
        self._undo.close()


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except DeviceGone as e:
        if is_lost(e.cause):
            raise ChannelClosed from None
        raise PeerError(e.cause) from None


def _stand_in(kind: str) -> int:
    """A descriptor for a port that the process does not use."""
    if kind == "directory":
        return os.open(os.path.dirname(__file__), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return os.memfd_create(kind, os.MFD_CLOEXEC)
