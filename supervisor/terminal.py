"""The user's terminal while a VM runs on it: raw mode, the escape, and typed bytes on their way to a port.

Ctrl-A x ends the VM; Ctrl-A Ctrl-A (or Ctrl-A a) sends one Ctrl-A.  Everything else, Ctrl-C included,
goes to the guest.  The mode is put back by the janitor.
"""

from __future__ import annotations

import enum
import os
import termios

from supervisor.janitor import Janitor

ESCAPE = 0x01  # Ctrl-A
_READ_SIZE = 1024


class Typed(enum.Enum):
    """What `Keyboard.pump` came to."""

    MORE = "more"
    END = "end"  # the user typed the escape
    CLOSED = "closed"  # the terminal or the serial port is gone


def is_ours(fd: int) -> bool:
    """Whether `fd` is a terminal and we are its foreground job, so that reading it will not stop us."""
    try:
        return os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False


def set_raw(fd: int, janitor: Janitor) -> None:
    """Every key to us, as it is typed; output processing stays, so that our own lines still end in CR LF."""
    janitor.restore_terminal(fd)
    mode = termios.tcgetattr(fd)
    mode[0] &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
        | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
    )  # fmt: skip
    mode[2] = mode[2] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    mode[3] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSADRAIN, mode)


class Keyboard:
    """Moves typed bytes from terminal `fd` into pipe `sink` (both ends non-blocking in effect).

    Bytes are read from the terminal only when all read before have been delivered, so what the guest
    does not take waits in the pipe and then in the terminal's own queue: nothing typed is dropped here.
    """

    def __init__(self, fd: int, sink: int) -> None:
        self.fd = fd
        self.sink = sink
        self._escaped = False
        self._pending = b""
        os.set_blocking(sink, False)

    @property
    def blocked(self) -> bool:
        """The pipe is full: wait for `sink` to be writable before reading more."""
        return bool(self._pending)

    def pump(self) -> Typed:
        """Deliver what is pending, or read and deliver more; call when `fd` (or `sink`) is ready."""
        if not self._pending:
            try:
                data = os.read(self.fd, _READ_SIZE)
            except OSError:
                data = b""
            if not data:
                return Typed.CLOSED
            passed = bytearray()
            for byte in data:
                if self._escaped:
                    self._escaped = False
                    if byte in b"xX":
                        return Typed.END
                    passed += bytes([ESCAPE]) if byte in (ESCAPE, ord("a")) else bytes([ESCAPE, byte])
                elif byte == ESCAPE:
                    self._escaped = True
                else:
                    passed.append(byte)
            self._pending = bytes(passed)
        try:
            self._pending = self._pending[os.write(self.sink, self._pending) :] if self._pending else b""
        except BlockingIOError:
            return Typed.MORE
        except BrokenPipeError:
            return Typed.CLOSED
        return Typed.MORE
