"""Gives each device its descriptors and asks the zygote for its process, at the start and later."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from devproc import jail
from devproc.zygote import SpawnError, Zygote
from kvmcore.errors import VmsupError
from kvmcore.exitloop import Core
from supervisor.console import Console
from supervisor.machine import Instance
from supervisor.proxy import Proxy

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
    mode: jail.Mode
    timeout_s: float
    events: dict[str, int]
    consoles: dict[int, Console]
    say: Callable[[str, str], None]
    irqs: dict[str, int] = field(default_factory=dict)  # instance name -> its interrupt's eventfd
    _count: int = 0

    def spawn(self, instance: Instance) -> Proxy:
        """Ask for the process; `Proxy.await_ready` must follow, so that many get ready at once.

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
                instance.entry.name,
                instance.name,
                fds,
                host_id=host_id(self._count),
                mode=self.mode,
                params=instance.params,
            )
        except SpawnError as e:
            access.close()
            control.close()
            os.close(log)
            raise VmsupError(str(e)) from None
        finally:
            os.close(its_log)
            its_access.close()
            its_control.close()
        self._count += 1
        return Proxy(instance, pid, self.core, access, control, log, self.timeout_s, self.say)

    def close(self) -> None:
        """Give back the interrupts' eventfds."""
        for fd in self.irqs.values():
            os.close(fd)

    def _descriptor(self, instance: Instance, name: str) -> int:
        match name:
            case "irq":
                if instance.name not in self.irqs:
                    self.irqs[instance.name] = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
                return self.irqs[instance.name]
            case "input" | "output":
                assert instance.serial_num is not None
                console = self.consoles[instance.serial_num]
                return console.input if name == "input" else console.output
            case _:
                return self.events[name]
