"""The supervisor's side of one device process: its channels, its state, and what it was last heard to say.

The process is hostile: every frame is bounded, decoded and checked against the transition table, and
whatever does not belong ends the device by name.  Register accesses go through the exit loop's own
socket code, so that Python and the vCPUs never interleave on a channel.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable

from devproc import violations, wire
from devproc.wire import Conversation, PeerError, Sender, Space
from kvmcore.exitloop import Core, DeviceGone
from policies import syscalls
from supervisor.machine import Instance
from supervisor.reaper import DeviceDied

_LOG_LINE_MAX = 4096
PING_EVERY_S = 1.0


class Proxy:
    """One device process; `pid` as we see it.

    Args:
        core: the exit loop, which owns the access channel from here on.
        access, control: our ends of the two channels.
        log: the read end of its standard error.
        say: takes (name, line) for every line the device logs.
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
    ) -> None:
        self.instance = instance
        self.name = instance.name
        self.pid = pid
        self.access = access
        self.control = control
        self.log = log
        self.listener: int | None = None
        self.log_open = True
        self.reaped = False
        self.counters: dict[str, int] = {}
        self._core = core
        self._timeout_s = timeout_s
        self._say = say
        self._log_rest = b""
        self._talk = Conversation(wire.CONTROL_TABLE, "start", Sender.SUPERVISOR)
        self._token = 0
        self._asked_at_s = time.monotonic()
        self.index = core.add_device(access.fileno())
        control.setblocking(False)
        os.set_blocking(log, False)

    # -- register accesses from Python (configuration space; everything else goes through the exit loop)

    def config_read(self, offset: int, size: int) -> int:
        """Raises DeviceDied."""
        try:
            return self._core.read(self.index, Space.CONFIG, offset, size)
        except DeviceGone as e:
            raise DeviceDied(self.name, str(e)) from None

    def config_write(self, offset: int, size: int, data: int) -> None:
        """Marked, not posted: what it changes is in force when the guest goes on.  Raises DeviceDied."""
        try:
            self._core.write(self.index, Space.CONFIG, offset, size, data, posted=False)
        except DeviceGone as e:
            raise DeviceDied(self.name, str(e)) from None

    # -- the control channel

    @property
    def ready(self) -> bool:
        return self._talk.state not in ("start", "greeted", "sealed")

    def on_control(self) -> None:
        """Take one frame.

        Raises:
            DeviceDied: end of file, nonsense, or the device says that it failed.
        """
        try:
            frame = self._receive()
        except BlockingIOError:
            return
        except OSError as e:
            raise DeviceDied(self.name, f"control channel: {e.strerror}") from None
        if not frame:
            raise DeviceDied(self.name, "closed its control channel")
        try:
            message = wire.decode(frame)
            self._talk.advance(Sender.DEVICE, message)
            self._take(message)
        except PeerError as e:
            raise DeviceDied(self.name, f"broke the protocol: {e}") from None

    def _receive(self) -> bytes:
        if self._talk.state != "greeted" or self.listener is not None:
            # No ancillary room: descriptors in a frame are dropped by the kernel.
            return self.control.recv(wire.CONTROL_FRAME_MAX + 1)
        frame, fds, _, _ = socket.recv_fds(self.control, wire.CONTROL_FRAME_MAX + 1, 1)
        for fd in fds:
            os.set_inheritable(fd, False)
            if self.listener is None and frame == wire.encode(wire.Listener()):
                self.listener = fd
            else:
                os.close(fd)
        return frame

    def _take(self, message: wire.Message) -> None:
        match message:
            case wire.Hello(version=version, device=device):
                if version != wire.VERSION or device != self.instance.entry.name:
                    raise PeerError(f"it says {device!r} version {version}")
            case wire.Listener():
                if self.listener is None:
                    raise PeerError("Listener without a descriptor")
            case wire.Pong(token=token):
                if token != self._token:
                    raise PeerError("Pong with another token")
            case wire.Log(text=text):
                self._say(self.name, text)
            case wire.Failed(why=why):
                raise DeviceDied(self.name, why)
            case wire.Counters(items=items):
                self.counters = dict(zip(items[::2], items[1::2], strict=False))  # type: ignore[arg-type]

    def _send(self, message: wire.Message) -> None:
        self._talk.advance(Sender.SUPERVISOR, message)
        try:
            self.control.send(wire.encode(message))
        except OSError as e:
            raise DeviceDied(self.name, f"control channel: {e.strerror}") from None

    def check_alive(self, now_s: float) -> None:
        """Ask for a sign of life now and then.

        Raises:
            DeviceDied: the last question has gone unanswered for the deadline.
        """
        if self._talk.state == "serving":
            if now_s - self._asked_at_s >= PING_EVERY_S:
                self._token = (self._token + 1) & 0xFFFFFFFF
                self._asked_at_s = now_s
                self._send(wire.Ping(self._token))
        elif now_s - self._asked_at_s >= self._timeout_s:
            raise DeviceDied(self.name, f"hangs: no answer for {self._timeout_s:g} s")

    # -- its log and its violations

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
                self._say(self.name, line.decode("utf-8", "backslashreplace"))
        self.log_open = bool(data)

    def on_violation(self) -> None:
        """A system call that its policy does not allow is being held by the kernel: end the process.

        Raises:
            DeviceDied: always, naming the call (unless the process died first and nothing is held).
        """
        assert self.listener is not None
        found = violations.read(self.listener)
        if found is None:
            return
        self.kill()
        name = syscalls.name(found.nr)
        raise DeviceDied(self.name, f"killed for system call {found.nr} ({name}), which its policy forbids")

    # -- its end

    def ask_to_stop(self) -> None:
        """Let it flush what it holds and leave; no answer is waited for."""
        with contextlib.suppress(DeviceDied, wire.WireError):
            self._send(wire.Stop())

    def kill(self) -> None:
        if not self.reaped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Give back our descriptors."""
        self._core.mark_dead(self.index)
        self.access.close()
        self.control.close()
        for fd in (self.log, self.listener):
            if fd is not None:
                os.close(fd)
        self.listener = None
