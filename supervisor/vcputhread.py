"""One host thread per vCPU: it is in the exit loop until something comes up that only Python answers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Protocol

from kvmcore.errors import VmsupError
from kvmcore.exitloop import CoreVcpu, Exit, ExitKind
from supervisor import ending
from supervisor.bus import Buses
from supervisor.ending import Ending
from supervisor.reaper import DeviceDied

KICK = signal.SIGRTMIN
_KICK_EVERY_S = 0.02

_SYSTEM_EVENTS = {1: ending.POWEROFF, 2: ending.RESET, 3: ending.PANIC}  # KVM_SYSTEM_EVENT_*


class InterruptChip(Protocol):
    """The supervisor's half of a split irqchip, called on vCPU threads."""

    def end_of_interrupt(self, vector: int) -> None: ...
    def inject(self) -> None: ...


class VcpuThread:
    """vCPU `number`.

    Args:
        cpus: the host CPUs it may run on; None: any.
        chip: for the exits that only a split irqchip has.
        seal: confines the calling thread.
        ended: takes the VM's ending, from this thread.
        device_gone: takes (device number, how) when an access lost its device.
    """

    def __init__(
        self,
        number: int,
        vcpu: CoreVcpu,
        buses: Buses,
        cpus: frozenset[int] | None,
        chip: InterruptChip | None,
        seal: Callable[[], None],
        ended: Callable[[Ending], None],
        device_gone: Callable[[int, str], None],
    ) -> None:
        self._number = number
        self._vcpu = vcpu
        self._buses = buses
        self._cpus = cpus
        self._chip = chip
        self._seal = seal
        self._ended = ended
        self._device_gone = device_gone
        self._stopping = False
        self._settled = threading.Event()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"vcpu{number}", daemon=True)

    def start(self) -> None:
        """Start the thread and wait until it is confined, or has failed: `ended` has then been told."""
        self._thread.start()
        self._settled.wait()

    def release(self) -> None:
        """Let the guest run."""
        self._released.set()

    def stop(self) -> None:
        """Have the thread end soon, released or not; follow with `kick_until_over`."""
        self._stopping = True
        self._vcpu.stop()
        self.release()

    def interrupt(self) -> None:
        """Have it leave the guest and let the interrupt chip inject."""
        self._vcpu.stop()
        if self._thread.ident is not None and self._thread.ident != threading.get_ident():
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(self._thread.ident, KICK)

    def kick_until_over(self, until_s: float) -> bool:
        """Wait for the thread's end, interrupting KVM_RUN; False if it is still there at `until_s`."""
        while self._thread.is_alive():
            if time.monotonic() > until_s:
                return False
            assert self._thread.ident is not None
            signal.pthread_kill(self._thread.ident, KICK)
            self._thread.join(_KICK_EVERY_S)
        return True

    def _main(self) -> None:
        try:
            with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w", encoding="ascii") as f:
                f.write(self._thread.name)
            if self._cpus is not None:
                os.sched_setaffinity(0, self._cpus)
            self._seal()
            self._settled.set()
            self._released.wait()
            while True:
                how = self._answer(self._vcpu.run())
                if how is not None:
                    self._ended(how)
                    return
        except DeviceDied as e:
            self._ended(ending.device_died(e))
        except VmsupError as e:
            self._ended(ending.crash(f"vcpu{self._number}: {e}"))
        except _Over:
            pass
        except Exception as e:
            self._ended(ending.crash(f"vcpu{self._number}: internal error: {type(e).__name__}: {e}"))
        finally:
            self._settled.set()

    def _answer(self, exit_: Exit) -> Ending | None:
        """Do what the exit asks for; the VM's ending if it was the last one."""
        match exit_.kind:
            case ExitKind.IO:
                self._access(exit_)
            case ExitKind.IOAPIC_EOI:
                assert self._chip is not None
                self._chip.end_of_interrupt(exit_.vector)
            case ExitKind.IRQ_WINDOW_OPEN:
                assert self._chip is not None
                self._chip.inject()
            case ExitKind.STOPPED:
                if self._stopping:
                    raise _Over
                if self._chip is not None:
                    self._chip.inject()
            case ExitKind.DEVICE_DEAD:
                self._device_gone(exit_.index, exit_.cause)
                raise _Over
            case ExitKind.SHUTDOWN:
                return ending.TRIPLE_FAULT
            case ExitKind.SYSTEM_EVENT:
                return _SYSTEM_EVENTS.get(exit_.event) or ending.crash(f"unknown system event {exit_.event}")
            case _:
                return ending.crash(f"vcpu{self._number}: {exit_.describe()}")
        return None

    def _access(self, exit_: Exit) -> None:
        bus = self._buses.mmio if exit_.is_mmio else self._buses.io
        handler, offset = bus.handler(exit_.addr)
        if exit_.is_write:
            handler.write(offset, exit_.size, exit_.data)
        else:
            self._vcpu.complete(handler.read(offset, exit_.size))


class _Over(Exception):
    """This thread has nothing more to do; who ends the VM knows why."""
