"""The supervisor's side of one device process: its channels, its state, and what it was last heard to say.

The process is hostile: every frame is bounded, decoded and checked against the transition table, and
whatever does not belong ends the device by name.  Register accesses go through the exit loop's own
socket code, so that Python and the vCPUs never interleave on a channel.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable

from devproc import jail, violations, wire, zygote
from devproc.channel import ChannelClosed
from devproc.wire import PeerError, Space
from kvmcore.exitloop import Core, DeviceGone
from kvmcore.mailbox import Mailbox
from supervisor.machine import Instance
from supervisor.reaper import DeviceDied, Refused

PING_EVERY_S = 1.0
CLOSED = "closed its control channel"
_READY_WITHIN_S: float = zygote.READY_WITHIN_S
_LOG_LINE_MAX = 4096
_LINES_PER_S = 200  # a traceback has some dozens
_WARNING = 30  # the logging levels of wire.Log


class Proxy:
    """One device process.

    Attributes:
        pid: as we see it.
        index: its number in the exit loop, which owns the access channel from here on.
        log: the read end of its standard error; `log_open` is false after end of file.
        listener: where the kernel holds calls that its policy forbids.
        reaped: it is gone, and its pid may be somebody else's.

    Args:
        say: takes (name, line) for every line the device logs.
        mailbox: where accesses go; None: over the access channel.
    """

    def __init__(
        self,
        instance: Instance,
        pid: int,
        core: Core,
        access: socket.socket,
        control: socket.socket,
        log: int,
        timeout_s: float,
        say: Callable[[str, str], None],
        mailbox: Mailbox | None = None,
    ) -> None:
        self.instance = instance
        self.name = instance.name
        self.pid = pid
        self.log = log
        self.log_open = True
        self.listener: int | None = None
        self.reaped = False
        self.counters: dict[str, int] = {}
        self.control = zygote.control_channel(control)
        self._access = access
        self._core = core
        self._timeout_s = timeout_s + instance.entry.patience_s
        self._tell = say
        self._said = 0
        self._said_since_s = 0.0
        self._log_rest = b""
        self._token = 0
        self._asked_at_s = 0.0
        self.index = core.add_device(access.fileno(), instance.entry.patience_s * 1000, mailbox)
        os.set_blocking(log, False)

    def await_ready(self, mode: jail.Mode, watch: Callable[[int], None] | None = None) -> None:
        """Until the process is sealed in its jail and serves; `watch` gets the listener in our place.

        Raises:
            DeviceDied: it failed, died, or took longer than 30 s.
        """
        try:
            greeting = zygote.await_ready(
                self.control, self.instance.entry.name, mode, _READY_WITHIN_S, watch
            )
        except TimeoutError:
            raise DeviceDied(self.name, f"not ready after {_READY_WITHIN_S:g} s") from None
        except zygote.Forbidden as e:
            raise self._forbidden(e.violation) from None
        except ChannelClosed:
            self.on_log()
            raise DeviceDied(self.name, "died before it was ready") from None
        except PeerError as e:
            raise DeviceDied(self.name, f"broke the protocol: {e}") from None
        except zygote.SpawnError as e:
            raise DeviceDied(self.name, str(e)) from None
        self.control.sock.setblocking(False)
        if watch is None or greeting.listener is None:
            self.listener = greeting.listener
        else:
            os.close(greeting.listener)
        for level, text in greeting.notes:
            if level >= _WARNING:
                self._say(text)
        self._asked_at_s = time.monotonic()

    # -- the accesses from Python; all others are the exit loop's

    def write(self, space: Space, offset: int, size: int, data: int) -> None:
        """Marked, not posted: what it changes is in force when the guest goes on.  Raises DeviceDied."""
        try:
            self._core.write(self.index, space, offset, size, data, posted=False)
        except DeviceGone as e:
            raise DeviceDied(self.name, str(e)) from None

    def read(self, space: Space, offset: int, size: int) -> int:
        """What a register reads as.  Raises DeviceDied."""
        try:
            return self._core.read(self.index, space, offset, size)
        except DeviceGone as e:
            raise DeviceDied(self.name, str(e)) from None

    def config_write(self, offset: int, size: int, data: int) -> None:
        """`write` to configuration space."""
        self.write(Space.CONFIG, offset, size, data)

    # -- the control channel

    def on_control(self) -> None:
        """Take one message.

        Raises:
            DeviceDied: end of file, nonsense, or the device says that it failed.
        """
        try:
            self._take(self.control.recv())
        except BlockingIOError:
            pass
        except ChannelClosed:
            raise DeviceDied(self.name, CLOSED) from None
        except PeerError as e:
            raise DeviceDied(self.name, f"broke the protocol: {e}") from None

    def _take(self, message: wire.Message) -> None:
        match message:
            case wire.Pong(token):
                if token != self._token:
                    raise PeerError("Pong with another token")
            case wire.Log(level, text) if level >= _WARNING:
                self._say(text)
            case wire.Failed(why):
                raise DeviceDied(self.name, why)
            case wire.Counters(items):
                self.counters = dict(zip(items[::2], items[1::2], strict=False))  # type: ignore[arg-type]

    def _send(self, message: wire.Message) -> None:
        try:
            self.control.send(message)
        except ChannelClosed:
            raise DeviceDied(self.name, CLOSED) from None
        except BlockingIOError:
            raise DeviceDied(self.name, "hangs: it does not empty its control channel") from None

    def check_alive(self, now_s: float) -> None:
        """Ask for a sign of life now and then.

        Raises:
            DeviceDied: the last question has gone unanswered for the deadline.
        """
        if self.control.state == "serving":
            if now_s - self._asked_at_s >= PING_EVERY_S:
                self._token = (self._token + 1) & 0xFFFFFFFF
                self._asked_at_s = now_s
                self._send(wire.Ping(self._token))
        elif (
            now_s - self._asked_at_s >= self._timeout_s
            and not select.select([self.control], [], [], 0)[0]  # or it is we who have not listened
        ):
            raise DeviceDied(self.name, f"hangs: no answer for {self._timeout_s:g} s")

    def ask(self, message: wire.Message) -> wire.Message:
        """What it answers; the caller waits, so this is for when no guest runs on it.

        Raises:
            DeviceDied: nothing sensible, in time.
        """
        until_s = time.monotonic() + self._timeout_s
        while self.control.state != "serving":  # a Pong is due
            self._wait(until_s)
            self.on_control()
        self._send(message)
        while True:
            self._wait(until_s)
            try:
                answer = self.control.recv()
            except ChannelClosed:
                raise DeviceDied(self.name, CLOSED) from None
            except PeerError as e:
                raise DeviceDied(self.name, f"broke the protocol: {e}") from None
            if self.control.state == "serving":
                return answer
            self._take(answer)

    def _wait(self, until_s: float) -> None:
        if not select.select([self.control], [], [], max(0.0, until_s - time.monotonic()))[0]:
            raise DeviceDied(self.name, f"hangs: no answer for {self._timeout_s:g} s")

    # -- its settings and its counters

    def set(self, name: str, value: int) -> None:
        """Change a setting of its catalogue entry, unless it is on its way out.

        Raises:
            DeviceDied: it does not listen any more.
            ValueError: there is no such setting.
        """
        self.instance.entry.check_setting(name, value)
        with contextlib.suppress(wire.WireError):
            self._send(wire.Set(name, value))

    def ask_counters(self) -> None:
        """Have `counters` brought up to date soon, unless it is busy with another question.

        Raises:
            DeviceDied: it does not take questions any more.
        """
        if self.control.state == "serving":
            self._asked_at_s = time.monotonic()
            self._send(wire.Stats())

    # -- its log and its violations

    def _say(self, line: str) -> None:
        """Tell the user, but not without end: a flood would hide the others, and fill what stderr goes to."""
        now_s = time.monotonic()
        if now_s - self._said_since_s >= 1:
            self._tell_unsaid()
            self._said_since_s = now_s
        self._said += 1
        if self._said <= _LINES_PER_S:
            self._tell(self.name, line)

    def _tell_unsaid(self) -> None:
        if self._said > _LINES_PER_S:
            self._tell(self.name, f"({self._said - _LINES_PER_S} more lines are not shown)")
        self._said = 0

    def on_log(self) -> None:
        """Say what it wrote to standard error, line by line; `log_open` is false after end of file."""
        try:
            data = os.read(self.log, _LOG_LINE_MAX)
        except BlockingIOError:
            return
        *lines, self._log_rest = (self._log_rest + data).split(b"\n")
        if len(self._log_rest) >= _LOG_LINE_MAX or not data:
            lines.append(self._log_rest)
            self._log_rest = b""
        for line in lines:
            if line:
                self._say(line.decode("utf-8", "backslashreplace"))
        self.log_open = bool(data)

    def on_violation(self) -> None:
        """A system call that its policy does not allow is being held by the kernel: end the process.

        Raises:
            DeviceDied: naming the call; not raised if the process is dead and nothing is held any more.
        """
        assert self.listener is not None
        try:
            found = violations.read_violation(self.listener)
        except OSError as e:
            raise DeviceDied(self.name, f"what it sent is no seccomp listener: {e.strerror}") from None
        if found is not None:
            raise self._forbidden(found)
        os.close(self.listener)
        self.listener = None

    def _forbidden(self, found: violations.Violation) -> DeviceDied:
        self.kill()
        refused = Refused(self.name, self.instance.entry.name, self.pid, found.nr, found.args)
        call = f"system call {refused.nr} ({refused.name})"
        return DeviceDied(self.name, f"killed for {call}, which its policy forbids", refused)

    # -- its end

    def ask_to_stop(self) -> None:
        """Let it flush what it holds and leave; no answer is waited for."""
        with contextlib.suppress(DeviceDied, wire.WireError):
            self._send(wire.Stop())

    def give_up(self) -> None:
        """No vCPU waits for it any more."""
        self._core.mark_dead(self.index)

    def kill(self) -> None:
        if not self.reaped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Give back our descriptors."""
        self._tell_unsaid()
        self.give_up()
        self._access.close()
        self.control.close()
        for fd in (self.log, self.listener):
            if fd is not None:
                os.close(fd)
        self.listener = None
