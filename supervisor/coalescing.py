"""Guest writes that KVM puts aside until the next exit (KVM_CAP_COALESCED_PIO), for as long as that pays.

A guest that goes on makes an exit soon, and the exit loop takes them along.  One that waits for what comes of
them, as an interrupt-driven driver does, makes none: the main thread finds those.  Where that happens again
and again the guest is better off without, and its writes exit like any other from then on.
"""

from __future__ import annotations

import time
from typing import Final

from kvmcore.exitloop import Core
from kvmcore.kvm import Vcpu, Vm

_LOOK_MS: Final = 20  # doubled at each look that finds nothing
_LOOK_MAX_MS: Final = 320
_LATE_MS: Final = 2  # a guest that goes on takes far less; a vCPU that waits for a processor may take more
_LATE_MAX: Final = 3


class Coalescing:
    """The VM's coalesced ports.

    Args:
        vcpu: any.
    """

    def __init__(self, core: Core, vm: Vm, vcpu: Vcpu) -> None:
        self._core = core
        self._vm = vm
        self._vcpu = vcpu
        self._ports: list[int] = []
        self._oldest: int | None = None
        self._seen_ns = 0  # when that was the oldest for the first time
        self._late = 0  # in a row
        self._look_ms = _LOOK_MS

    def add(self, port: int, index: int) -> None:
        """Coalesce writes of a byte to `port`, device `index`'s, if this KVM can; before any vCPU runs."""
        page = self._vm.coalesce_ports(port, 1)
        if page is not None:
            self._core.coalesce(self._vcpu.fd, page, index)
            self._ports.append(port)

    def look(self) -> int | None:
        """Post writes that have waited too long; milliseconds until the next look, None if none is needed.

        Raises:
            DeviceGone: the device is dead, or has just died of this.
        """
        if not self._ports:
            return None
        now_ns = time.monotonic_ns()
        before, self._oldest = self._oldest, self._core.oldest_coalesced()
        if self._oldest is None:
            self._look_ms = min(2 * self._look_ms, _LOOK_MAX_MS)
            return self._look_ms
        self._look_ms = _LOOK_MS
        if self._oldest != before:
            self._seen_ns = now_ns
            if before is not None:
                self._late = 0
        elif now_ns - self._seen_ns >= _LATE_MS * 1_000_000:
            self._late += 1
            if self._late == _LATE_MAX:
                for port in self._ports:
                    self._vm.exit_ports(port, 1)
                self._ports.clear()
            self._oldest = None
            self.drain()
            return _LOOK_MS if self._ports else None
        return _LATE_MS

    def drain(self) -> None:
        """Post whatever waits; raises DeviceGone, as `look`."""
        self._core.drain()
