"""Connects programs on the host with the virtio-vsock process, hands it the connections, and keeps none.

Spec: Firecracker's docs/vsock.md for the paths; unix(7).  The device's process has no file system and can
make no socket, and once the guest runs neither can the supervisor.  So this is a process of its own, forked
before there is a guest: it listens at PATH for host programs that want to reach the guest, and connects the
guest to those that listen at PATH_PORT.  From the device it takes four bytes, a port's number; from host
programs nothing, what they say is the device's to read.  Before the guest runs it is sealed.

Between it and the device, in frames of one SOCK_SEQPACKET pair: the port that is wanted, little-endian; the
answers in the same order, b"D" with a connection or with nothing; and b"A" with one that has come by itself.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable
from typing import Final

from devproc import jail
from kvmcore.errors import ConfigError
from supervisor import companion
from supervisor.companion import Companion
from supervisor.janitor import Janitor

CAPABILITIES: Final = 1 << jail.CAP_DAC_OVERRIDE
"""What root's exchange keeps: a host program's socket may be somebody else's."""

PATH_MAX: Final = 107 - len("_4294967295")
"""Bytes of a PATH, which with a port is to fit into a sockaddr_un."""

_PORT_SIZE: Final = 4
_PAUSE_S: Final = 0.001  # after each connection that the device asks for: so many at most


class Exchange:
    """The supervisor's end; `start` must run while the process has one thread.

    Attributes:
        device: the device's end, for its process to be given a duplicate of.
    """

    def __init__(self, process: Companion, device: socket.socket) -> None:
        self._process = process
        self.pid = process.pid
        self.device = device

    @classmethod
    def start(cls, path: str, janitor: Janitor, mode: jail.Mode = jail.Mode.FULL) -> Exchange:
        """Listen at `path`, which the janitor will remove, and fork.

        Raises:
            ConfigError: nobody can listen there.
        """
        name = os.path.abspath(path)
        if len(os.fsencode(name)) > PATH_MAX:
            raise ConfigError(
                f"--vsock: {path}: with a port it is longer than a socket's path may be,"
                f" expected {PATH_MAX} bytes at most"
            )
        try:
            listener = janitor.listen(name, socket.SOMAXCONN)
        except OSError as e:
            raise ConfigError(f"--vsock: {path}: {e.strerror or e}") from None
        listener.setblocking(False)
        device, its_device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        device.setblocking(False)
        with its_device, listener:
            process = Companion.fork(
                "exchange",
                mode,
                lambda control: _serve(control, its_device, listener, name, mode),
                keep=(its_device.fileno(), listener.fileno()),
            )
        return cls(process, device)

    def seal(self, warn: Callable[[str], None]) -> None:
        """Have it give up all rights but those that it needs.

        Raises:
            VmsupError: it could not; in mode "best-effort" that is a warning.
        """
        self._process.seal(warn)

    def finish(self) -> None:
        """Let it end, and wait until it has."""
        self.device.close()
        self._process.finish()


def _serve(
    control: socket.socket, device: socket.socket, listener: socket.socket, path: str, mode: jail.Mode
) -> None:
    if control.recv(1) != companion.SEAL:
        return
    companion.seal("exchange", control, mode, CAPABILITIES)
    while True:
        ready = select.select([control, device, listener], [], [])[0]
        if control in ready:  # the supervisor has ended
            return
        if device in ready:
            wanted = device.recv(_PORT_SIZE + 1)
            if len(wanted) != _PORT_SIZE:
                return
            _hand_over(device, b"D", _dial(f"{path}_{int.from_bytes(wanted, 'little')}"))
            time.sleep(_PAUSE_S)
        if listener in ready:
            with contextlib.suppress(OSError):
                caller, _ = listener.accept()
                caller.setblocking(False)
                _hand_over(device, b"A", caller)


def _dial(path: str) -> socket.socket | None:
    """A connection to who listens at `path`, unless there is nobody or they are too busy."""
    called = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK, 0)
    try:
        called.connect(path)
    except OSError:
        called.close()
        return None
    return called


def _hand_over(device: socket.socket, word: bytes, connection: socket.socket | None) -> None:
    if connection is None:
        device.send(word)
    else:
        with connection:
            socket.send_fds(device, [word], [connection.fileno()])
