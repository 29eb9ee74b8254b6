"""The control socket of a running VM: one JSON request line, one JSON answer line, over a unix stream socket.

Requests are `{"do": "ps"}`, `{"do": "stop"}`, `{"do": "balloon"}`, perhaps with "target_mib", `{"do":
"link"}` with "card" and "plugged", and `{"do": "resize"}` with "disk" and perhaps "size"; an answer has
"error" or the result's own keys.  The socket's mode, 0600, decides who may connect.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from kvmcore.errors import ConfigError
from supervisor.janitor import Janitor

_REQUEST_MAX = 4096
_ANSWER_MAX = 1 << 20
_CLIENTS_MAX = 8
_TIMEOUT_S = 5.0
_GUEST_TIMEOUT_S = 1.0  # how long a guest may take to say how its memory is used
_ASK_EVERY_S = 0.05

Verb = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Answers a request, of which only "do" has been looked at."""


class ControlServer:
    """The VM's end.

    Args:
        path: where to make the socket; must not exist.
        verbs: what can be asked for.

    Raises:
        ConfigError: the socket cannot be made there.
    """

    def __init__(self, path: str, verbs: Mapping[str, Verb], janitor: Janitor) -> None:
        self._verbs = verbs
        self._clients: dict[int, tuple[socket.socket, bytearray]] = {}
        try:
            self._listener = janitor.listen(path, _CLIENTS_MAX)
        except OSError as e:
            raise ConfigError(f"--socket {path}: {e.strerror or e}") from None
        self._listener.setblocking(False)

    def wants(self) -> dict[int, int]:
        """Descriptor -> poll events, for the run loop."""
        wanted = dict.fromkeys(self._clients, select.POLLIN)
        if len(self._clients) < _CLIENTS_MAX:
            wanted[self._listener.fileno()] = select.POLLIN
        return wanted

    def ready(self, fd: int, got: int) -> None:
        """Accept, or take more of a request; a whole one is answered and its client closed."""
        if fd == self._listener.fileno():
            with contextlib.suppress(OSError):
                client, _ = self._listener.accept()
                client.setblocking(False)
                self._clients[client.fileno()] = client, bytearray()
            return
        client, request = self._clients[fd]
        try:
            data = client.recv(_REQUEST_MAX)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        request += data
        if data and b"\n" not in request and len(request) <= _REQUEST_MAX:
            return
        del self._clients[fd]
        with client:
            if b"\n" in request:
                with contextlib.suppress(OSError):
                    client.sendall(json.dumps(self._answer(bytes(request))).encode() + b"\n")

    def _answer(self, request: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(request.split(b"\n")[0])
            do = self._verbs[asked["do"]]
        except (ValueError, LookupError, TypeError, RecursionError):
            return {"error": f"expected {{'do': one of {', '.join(self._verbs)}}}"}
        return do(asked)

    def close(self) -> None:
        self._listener.close()
        for client, _ in self._clients.values():
            client.close()


def ask(path: str, verb: str, **arguments: Any) -> dict[str, Any]:
    """What the VM at socket `path` answers to `verb`.

    Raises:
        ConfigError: nobody answers there, or not as a VM does.
    """
    where = f"socket {path}"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
            s.settimeout(_TIMEOUT_S)
            s.connect(path)
            s.sendall(json.dumps({"do": verb, **arguments}).encode() + b"\n")
            answer = bytearray()
            while (data := s.recv(65536)) and len(answer) < _ANSWER_MAX:
                answer += data
        result = json.loads(answer)
    except TimeoutError:
        raise ConfigError(f"{where}: no answer for {_TIMEOUT_S:g} s") from None
    except OSError as e:
        raise ConfigError(f"{where}: {e.strerror or e}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: what answers there is not a vmsup") from None
    if not isinstance(result, dict) or "error" in result:
        raise ConfigError(f"{where}: {result.get('error') if isinstance(result, dict) else 'not an answer'}")
    return result


def balloon_counters(path: str) -> dict[str, int]:
    """What the balloon of the VM at socket `path` counts, with the guest's statistics if it gives any.

    Raises:
        ConfigError: as `ask`.
    """

    def ask_again() -> dict[str, int]:
        time.sleep(_ASK_EVERY_S)
        counters: dict[str, int] = ask(path, "balloon")["counters"]
        return counters

    # Each answer is what was known when the one before was asked for: the first is of another time.
    ask(path, "balloon")
    counters = ask_again()
    updates = counters.get("updates", 0)
    until_s = time.monotonic() + _GUEST_TIMEOUT_S
    while counters.get("updates", 0) == updates and time.monotonic() < until_s:
        counters = ask_again()
    return counters


def resize(path: str, disk: str, size: int) -> None:
    """Give a disk of the VM at socket `path` room for `size` bytes, and wait until it has.

    Raises:
        ConfigError: as `ask`; or the disk has not got it, of which the VM's own words say more.
    """
    ask(path, "resize", disk=disk, size=size)
    until_s = time.monotonic() + _TIMEOUT_S
    while (capacity := ask(path, "resize", disk=disk)["counters"].get("capacity")) != size // 512:
        if time.monotonic() >= until_s:
            raise ConfigError(f"{disk} has {(capacity or 0) * 512} bytes still, see what vmsup run says")
        time.sleep(_ASK_EVERY_S)
