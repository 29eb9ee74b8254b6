"""Gives each device its descriptors, asks the zygote for its process, and waits until all serve."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from devproc.zygote import Zygote, ZygoteError
from kvmcore.errors import VmsupError
from kvmcore.exitloop import Core
from supervisor.console import Console
from supervisor.machine import Instance
from supervisor.proxy import Proxy
from supervisor.reaper import DeviceDied

_READY_WITHIN_S = 30.0
# Above systemd's container ranges; 64 devices for each of 2^22 supervisor pids, so no two VMs share one.
_HOST_ID_BASE = 0x70000000


def host_id(number: int) -> int:
    """The uid and gid on the host of a VM's device `number` as root; 0, the caller's own, otherwise."""
    if os.geteuid() != 0:
        return 0
    return _HOST_ID_BASE + (os.getpid() & 0x3FFFFF) * 64 + number


@dataclass
class Spawner:
    """Makes device processes, at the start and later.

    Args:
        events: eventfds by descriptor name ("reset", "poweroff", "panic") that all devices share.
        consoles: what each serial port is connected to, by number.
    """

    zygote: Zygote
    core: Core
    jail: str
    timeout_s: float
    events: dict[str, int]
    consoles: dict[int, Console]
    say: Callable[[str, str], None]
    irqs: dict[str, int] = field(default_factory=dict)  # instance name -> its interrupt's eventfd
    _count: int = 0

    def spawn(self, instance: Instance) -> Proxy:
        """Ask for the process; `wait_ready` must follow.

        Raises:
            VmsupError: the zygote could not make it.
        """
        access, its_access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control, its_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log, its_log = os.pipe()
        fds = [its_log, its_access.fileno(), its_control.fileno()]
        fds += [self._descriptor(instance, d.name) for d in instance.entry.descriptors]
        try:
            pid = self.zygote.spawn(
                instance.entry.name, instance.name, host_id(self._count), self.jail, instance.params, fds
            )
        except ZygoteError as e:
            raise VmsupError(f"{instance.name}: {e}") from None
        finally:
            os.close(its_log)
            its_access.close()
            its_control.close()
        self._count += 1
        return Proxy(instance, pid, self.core, access, control, log, self.timeout_s, self.say)

    def _descriptor(self, instance: Instance, name: str) -> int:
        match name:
            case "irq":
                return self.irqs.setdefault(instance.name, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            case "input" | "output":
                assert instance.serial_num is not None
                console = self.consoles[instance.serial_num]
                return console.input if name == "input" else console.output
            case _:
                return self.events[name]


def wait_ready(proxies: Iterable[Proxy]) -> None:
    """Until every device has said Ready.

    Raises:
        DeviceDied: one failed, died, or took longer than 30 s.
    """
    waiting = {p.control.fileno(): p for p in proxies}
    logs = {p.log: p for p in waiting.values()}
    until_s = time.monotonic() + _READY_WITHIN_S
    poll = select.poll()
    for fd in (*waiting, *logs):
        poll.register(fd, select.POLLIN)
    while waiting:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            slow = next(iter(waiting.values()))
            raise DeviceDied(slow.name, f"not ready after {_READY_WITHIN_S:g} s")
        for fd, _ in poll.poll(left_s * 1000):
            if fd in logs:
                logs[fd].on_log()
                if not logs[fd].log_open:
                    poll.unregister(fd)
            elif fd in waiting:
                proxy = waiting[fd]
                try:
                    proxy.on_control()
                except DeviceDied:
                    proxy.on_log()  # what it wrote before it died
                    raise
                if proxy.ready:
                    poll.unregister(fd)
                    del waiting[fd]
