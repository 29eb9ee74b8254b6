"""Gives each device its descriptors and asks the zygote for its process, at the start and later."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from devproc import jail
from devproc.catalog import Descriptor, Entry
from devproc.wire import SPAWNS_MAX, Scalar
from devproc.zygote import SpawnError, Zygote
from kvmcore.errors import VmsupError
from kvmcore.exitloop import Core
from kvmcore.mailbox import Mailbox
from policies.compile import compile_notify
from policies.parse import load
from supervisor.host import Opened
from supervisor.machine import Instance
from supervisor.proxy import Proxy

# Above systemd's container ranges; 64 devices for each of 2^22 supervisor pids, so no two VMs share one.
_HOST_ID_BASE = 0x70000000
_FDS_AT_ONCE = 96
"""Descriptors on their way to the zygote: one user's processes may all together have as many under way as one
may open (unix(7), ETOOMANYREFS)."""


def host_id(number: int) -> int:
    """The uid and gid on the host of a VM's device `number` as root; 0, the caller's own, otherwise."""
    if os.geteuid() != 0:
        return 0
    return _HOST_ID_BASE + (os.getpid() & 0x3FFFFF) * 64 + number


_NOTHING = Opened({})


class _Asked:
    """A process that the zygote was asked for, and our ends of what it was given."""

    def __init__(
        self, instance: Instance, access: socket.socket, control: socket.socket, log: int, mailbox: Mailbox
    ) -> None:
        self.instance = instance
        self.access = access
        self.control = control
        self.log = log
        self.mailbox = mailbox

    def close(self) -> None:
        """It will not be."""
        self.access.close()
        self.control.close()
        os.close(self.log)
        self.mailbox.close()


class Spawner:
    """Makes device processes, at the start and later.

    Args:
        events: eventfds by descriptor name ("reset", "poweroff", "panic") that all devices share.
        memory: the memfd of the guest's memory.
        opened: by instance name, what its opener has given.
        transport: "mailbox" or "socket": how accesses reach the devices, which serve both.
        extra: by instance name, kind and parameters, a descriptor that the zygote's program wants besides.

    Attributes:
        eventfds: by instance name, then by descriptor name, those that the instance alone has: its
            interrupts and its kicks.  They outlive the process, so that another can take its place.
    """

    def __init__(
        self,
        zygote: Zygote,
        core: Core,
        mode: jail.Mode,
        timeout_s: float,
        events: Mapping[str, int],
        memory: int,
        opened: Mapping[str, Opened],
        say: Callable[[str, str], None],
        transport: str,
        extra: Callable[[str, Entry, tuple[Scalar, ...]], int] | None = None,
    ) -> None:
        self.zygote = zygote
        self.core = core
        self.mode = mode
        self.timeout_s = timeout_s
        self.events = events
        self.memory = memory
        self.opened = opened
        self.say = say
        self.transport = transport
        self.extra = extra
        self.eventfds: dict[str, dict[str, tuple[int, ...]]] = {}
        self._count = 0

    def spawn(self, instance: Instance) -> Proxy:
        """Start the process; `Proxy.await_ready` must follow.

        Raises:
            VmsupError: the zygote could not make it.
            PolicyError: because of its policy.
        """
        (proxy,) = self.spawn_all((instance,))
        return proxy

    def spawn_all(self, instances: Iterable[Instance]) -> Iterator[Proxy]:
        """As `spawn`, for many, which get ready at once; what was made is given before it raises."""
        asked: list[_Asked] = []
        try:
            for instance in instances:
                asked.append(self._ask(instance))
                if len(asked) == SPAWNS_MAX or sum(a.instance.entry.held for a in asked) > _FDS_AT_ONCE:
                    batch, asked = asked, []
                    yield from self._make(batch)
            batch, asked = asked, []
            if batch:
                yield from self._make(batch)
        finally:
            for a in asked:
                a.close()

    def _ask(self, instance: Instance) -> _Asked:
        opened = self.opened.get(instance.name, _NOTHING)
        own = [fd for d in instance.entry.descriptors for fd in self._descriptors(instance.name, d, opened)]
        params = instance.params + opened.params
        extra = [] if self.extra is None else [self.extra(instance.name, instance.entry, params)]
        access, its_access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control, its_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log, its_log = os.pipe()
        mailbox = Mailbox.create()
        asked = _Asked(instance, access, control, log, mailbox)
        try:
            self.zygote.ask(
                instance.entry.name,
                instance.name,
                [its_log, its_access.fileno(), its_control.fileno(), *mailbox.fds, *own, *extra],
                host_id=host_id(self._count),
                mode=self.mode,
                params=params,
            )
        except SpawnError as e:
            asked.close()
            raise VmsupError(str(e)) from None
        finally:
            for fd in (its_log, *extra):
                os.close(fd)
            its_access.close()
            its_control.close()
        self._count += 1
        return asked

    def _make(self, asked: Sequence[_Asked]) -> Iterator[Proxy]:
        try:
            outcomes = self.zygote.make()
        except SpawnError as e:
            for a in asked:
                a.close()
            raise VmsupError(str(e)) from None
        failed: list[tuple[Entry, SpawnError]] = []
        left = [*zip(asked, outcomes, strict=True)]
        try:
            while left:
                a, pid = left.pop(0)
                if isinstance(pid, SpawnError):
                    a.close()
                    failed.append((a.instance.entry, pid))
                    continue
                yield self._proxy(a, pid)
        finally:
            for a, _ in left:
                a.close()
        for entry, why in failed:
            # A policy that cannot be used is for its author to mend: PolicyError says where.
            compile_notify(load(entry.name, entry.slots()), jail.SETUP_CALLS)
            raise VmsupError(str(why))

    def _proxy(self, a: _Asked, pid: int) -> Proxy:
        through = a.mailbox if self.transport == "mailbox" else None
        try:
            return Proxy(
                a.instance, pid, self.core, a.access, a.control, a.log, self.timeout_s, self.say, through
            )
        finally:
            a.mailbox.close()

    def close(self) -> None:
        """Give back the eventfds."""
        for own in self.eventfds.values():
            for fds in own.values():
                for fd in fds:
                    os.close(fd)

    def _descriptors(self, name: str, d: Descriptor, opened: Opened) -> tuple[int, ...]:
        """What the instance `name` is handed as `d`."""
        if d.name in opened.fds:
            return opened.fds[d.name]
        if d.kind == "memory":
            return (self.memory,)
        if d.name in self.events:
            return (self.events[d.name],)
        assert d.kind in ("signal", "kick"), f"{name}: its opener does not open {d.name}"
        own = self.eventfds.setdefault(name, {})
        if d.name not in own:
            flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
            own[d.name] = tuple(os.eventfd(0, flags) for _ in range(d.count or 1))
        return own[d.name]
