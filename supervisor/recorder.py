"""Lets a device process do what its policy forbids, and writes down every call: `vmsup policy learn`.

Spec: seccomp_unotify(2).  The process sits in its whole jail but for its policy: a filter of its own hands
each call to a thread here, which writes it to a file and then lets the kernel go on with it.  This is the one
place that answers "continue".  The kernel reads memory again after that, so nothing here is a defence.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import threading
from collections.abc import Callable
from typing import Final, Self

from devproc import jail, zygote
from devproc.catalog import CATALOG, Entry
from devproc.violations import read_violation
from kvmcore.errors import ConfigError
from policies.compile import compile_notify
from policies.learn import Call, answer, record
from policies.parse import load
from policies.policy import Policy
from policies.syscalls import SYSCALLS
from supervisor.begin import LEARN

_NOTIF_SEND: Final = 0xC018_2101  # _IOWR('!', 1, struct seccomp_notif_resp)
_RESPONSE: Final = struct.Struct("=QqiI")  # id, val, error, flags
_CONTINUE: Final = 1  # SECCOMP_USER_NOTIF_FLAG_CONTINUE

Say = Callable[[str], None]


def filters(device: str) -> Callable[[Entry], zygote.Filters]:
    """For `zygote.fork`: every call of the kind `device` waits for us, all others have their policy."""

    def of(entry: Entry) -> zygote.Filters:
        if entry.name != device:
            from devproc import nursery  # noqa: PLC0415  (in the zygote, which has it)

            return nursery.compiled(entry)
        return compile_notify(Policy(entry.name, ()), ("sendmsg",))

    return of


class Recorder:
    """Watches every process of one kind of device.

    Args:
        device: the catalogue name.
        path: the file that records are appended to, made if it is not there.
        say: takes one line for the user.

    Raises:
        ConfigError: no such device, or the file cannot be written.
        PolicyError: the device's policy cannot be loaded.
    """

    def __init__(self, device: str, path: str, say: Say) -> None:
        if device not in CATALOG:
            raise ConfigError(f"device {device!r} is unknown, expected one of {', '.join(CATALOG)}")
        self.device = device
        self.filters: Final = filters(device)
        self._policy = load(device, CATALOG[device].slots())
        self._say = say
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise ConfigError(f"records of {device}: {path}: {e.strerror}") from None
        self._threads: list[threading.Thread] = []

    @classmethod
    def asked_for(cls, value: str, say: Say) -> Self:
        """The recorder that the environment variable `LEARN` asks for by `value`.

        Raises:
            ConfigError: it is not DEVICE:FILE; likewise what the constructor raises.
        """
        device, colon, path = value.partition(":")
        if not colon or not path:
            raise ConfigError(f"{LEARN}: expected DEVICE:FILE, not {value!r}")
        return cls(device, path, say)

    def watch(self, device: str, name: str) -> Callable[[int], None] | None:
        """For `await_ready` of the instance `name`: what takes its listener; None if it is not watched."""
        if device != self.device:
            return None

        def start(listener: int) -> None:
            ours = os.dup(listener)
            thread = threading.Thread(target=self._record, args=(name, ours), name=f"record {name}")
            self._threads.append(thread)
            thread.start()

        return start

    def close(self) -> None:
        """Wait for the ends of the processes that were watched, which must be near, and close the file."""
        for thread in self._threads:
            thread.join()
        os.close(self._file)

    def _record(self, name: str, listener: int) -> None:
        try:
            jail.drop_privileges()  # as the supervisor will, for threads that it starts later than this one
            self._answer_all(name, listener)
        except OSError as e:
            self._say(f"{name}: cannot record its system calls: {e.strerror or e}")
        finally:
            os.close(listener)  # if anybody still waits there, the call fails with ENOSYS

    def _answer_all(self, name: str, listener: int) -> None:
        sealed = False
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        while any(events & select.POLLIN for _, events in poll.poll()):
            violation = read_violation(listener)
            if violation is None:  # a signal has taken it back
                continue
            call = Call(violation.nr, violation.args)
            error = 0
            if sealed:
                os.write(self._file, record(name, call).encode())
                error = answer(self._policy, call)
            elif call.nr == SYSCALLS["seccomp"]:  # the last call of the jail itself
                sealed = True
            _respond(listener, violation.cookie, error)


def _respond(listener: int, cookie: int, error: int) -> None:
    """Let the call go on, or fail with `error`."""
    try:
        fcntl.ioctl(listener, _NOTIF_SEND, _RESPONSE.pack(cookie, 0, -error, 0 if error else _CONTINUE))
    except OSError as e:
        if e.errno != errno.ENOENT:  # it is dead, or a signal has taken the call back
            raise
