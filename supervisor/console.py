"""Opens what each serial port or console is connected to: one descriptor for its input, one for its output.

The device process gets the two and nothing else: no path, no terminal ioctl (its policy has none).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import socket
import stat
import tty
from collections.abc import Sequence

from devproc.catalog import CONSOLE_PORTS
from devproc.record import record
from kvmcore.errors import ConfigError
from supervisor import terminal
from supervisor.config import SerialConfig
from supervisor.host import Host, Opened
from supervisor.janitor import Janitor
from supervisor.relay import PtyRelay, Relay, SocketRelay


@record
class Console:
    """Descriptors for one port (owned by the caller), and the keyboard that feeds it if it is interactive."""

    input: int
    output: int
    keyboard: terminal.Keyboard | None = None
    relay: Relay | None = None
    note: str | None = None  # where to connect, for the user

    def close(self) -> None:
        os.close(self.input)
        os.close(self.output)
        if self.keyboard is not None:
            os.close(self.keyboard.sink)
        if self.relay is not None:
            self.relay.close()


def _null() -> int:
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


def _own_description(fd: int) -> int:
    """`fd` again for writing, never blocking, without making the shell's own copy non-blocking.

    O_NONBLOCK belongs to the open file description, which other processes share; a pipe or terminal
    can be opened anew through /proc.  A file never blocks and must keep its offset; a socket cannot be
    reopened and is written only when ready.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
        with contextlib.suppress(OSError):
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            return os.open(f"/proc/self/fd/{fd}", flags)
    return os.dup(fd)


def _access(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE


def _stdio(where: str, janitor: Janitor) -> Console:
    if _access(1) == os.O_RDONLY:
        raise ConfigError(f"{where}: type=stdio: standard output is closed")
    output = _own_description(1)
    if _access(0) != os.O_WRONLY and not os.isatty(0):
        return Console(os.dup(0), output)
    if not terminal.is_ours(0):
        return Console(_null(), output)
    theirs, ours = os.pipe()
    terminal.set_raw(0, janitor)
    return Console(theirs, output, terminal.Keyboard(0, ours))


def _pair() -> tuple[int, socket.socket]:
    theirs, ours = socket.socketpair()
    return theirs.detach(), ours


def _socket(path: str, janitor: Janitor) -> Console:
    """A unix stream socket: connected to if somebody listens at `path`, else made and listened on."""
    if os.path.lexists(path):
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.connect(path)
        theirs, ours = _pair()
        return Console(theirs, os.dup(theirs), relay=SocketRelay(ours, None, peer))
    listener = janitor.listen(path)
    theirs, ours = _pair()
    return Console(theirs, os.dup(theirs), relay=SocketRelay(ours, listener))


def _pty(where: str, link: str | None, janitor: Janitor) -> Console:
    """A pseudo-terminal; with `link`, a symbolic link of that name to it."""
    master, slave = pty.openpty()
    tty.setraw(slave)
    name = os.ttyname(slave)
    os.close(slave)
    if link is not None:
        try:
            os.symlink(name, link)
        except OSError:
            os.close(master)
            raise
        janitor.unlink(link)
    theirs, ours = _pair()
    return Console(theirs, os.dup(theirs), relay=PtyRelay(ours, master), note=f"{where} is {name}")


def open_serial(port: SerialConfig, host: Host) -> Opened:
    """The opener of a serial device.

    Raises:
        ConfigError: as `open_console`.
    """
    found = _open_for(port, host)
    return Opened({"input": (found.input,), "output": (found.output,)})


def open_virtio_consoles(ports: Sequence[SerialConfig], host: Host) -> Opened:
    """The opener of the virtio console; what it has no ports for is connected to nothing.

    Raises:
        ConfigError: as `open_console`.
    """
    found = [_open_for(port, host) for port in ports]
    for n, console in enumerate(found):
        if console.keyboard is not None:
            host.window = n
    unused = SerialConfig(0)
    found += [_open_for(unused, host) for _ in range(CONSOLE_PORTS - len(ports))]
    return Opened({"input": tuple(c.input for c in found), "output": tuple(c.output for c in found)})


def _open_for(port: SerialConfig, host: Host) -> Console:
    """`open_console`, with the host told what goes with it."""
    found = open_console(port, host.janitor)
    host.undo.callback(found.close)
    if found.relay is not None:
        host.watched.append(found.relay)
    if found.keyboard is not None:
        host.keyboard = found.keyboard
    if found.note is not None:
        host.tell(found.note)
    return found


def open_console(port: SerialConfig, janitor: Janitor) -> Console:
    """What `port` is connected to.

    Raises:
        ConfigError: a path cannot be opened; the text names the port and the path.
    """
    where = f"--serial {port.which}"
    try:
        match port.type:
            case "stdio":
                return _stdio(where, janitor)
            case "pty":
                return _pty(where, port.path, janitor)
            case "socket":
                assert port.path is not None
                return _socket(port.path, janitor)
            case _:
                flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                source = _null() if port.input is None else os.open(port.input, flags)
                if port.type == "sink":
                    return Console(source, _null())
                assert port.path is not None
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC
                return Console(source, os.open(port.path, flags, 0o600))
    except OSError as e:
        raise ConfigError(
            f"{where}: {e.filename2 or e.filename or port.path or port.type}: {e.strerror or e}"
        ) from None
