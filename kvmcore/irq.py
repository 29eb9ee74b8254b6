"""The GSI routing table: which interrupt chip pin or MSI message each GSI stands for.

Spec: Linux, Documentation/virt/kvm/api.rst 4.52 KVM_SET_GSI_ROUTING; Intel SDM volume 3, 11.11 (message
address and data).  KVM replaces the whole table at once, so it has one owner, here.  Left out: extended
destination ids (more than 255 vCPUs).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from kvmcore.abi import KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE

IOAPIC_PINS: Final = 24
_PIC_PINS = 16


class MsiMessage(NamedTuple):
    """A message-signalled interrupt: the write a device makes to a local APIC."""

    address: int
    data: int


class IrqchipRoute(NamedTuple):
    """`gsi` drives `pin` of an in-kernel chip."""

    gsi: int
    chip: int
    pin: int


class MsiRoute(NamedTuple):
    """`gsi` sends `message`."""

    gsi: int
    message: MsiMessage


class GsiRouter:
    """All routes of one VM, applied whole on every change.

    With the kernel's interrupt chip GSI n is pin n of the IOAPIC and, below 16, IRQ n of the PICs; the
    timer is IRQ 0 on pin 0, so neither MP table nor MADT needs an override for it.  With a split chip
    GSIs below 24 carry the messages of the supervisor's IOAPIC.

    Args:
        apply: takes the new table (`Vm.set_gsi_routing`).
        split: only the local APICs are in the kernel.
    """

    def __init__(self, apply: Callable[[Sequence[IrqchipRoute | MsiRoute]], None], *, split: bool) -> None:
        self._apply = apply
        self._pins = () if split else kernel_irqchip_routes()
        self._messages: dict[int, MsiMessage] = {}
        self._lock = threading.Lock()  # vCPU threads write MSI-X tables and IOAPICs
        apply(self._pins)

    def update(self, changes: Mapping[int, MsiMessage | None]) -> None:
        """Give each GSI its message, or with None none: writes to its irqfd are then dropped.

        Raises:
            KvmError: a GSI is beyond KVM's limit; the table is then as it was.
            ValueError: a GSI belongs to a pin of the kernel's interrupt chip.
        """
        if self._pins and any(gsi < IOAPIC_PINS for gsi in changes):
            raise ValueError(f"GSIs below {IOAPIC_PINS} are pins of the kernel's interrupt chip")
        with self._lock:
            merged = {**self._messages, **changes}
            messages = {gsi: m for gsi, m in merged.items() if m is not None}
            if messages != self._messages:
                self._apply([*self._pins, *(MsiRoute(gsi, m) for gsi, m in sorted(messages.items()))])
                self._messages = messages


def kernel_irqchip_routes() -> tuple[IrqchipRoute, ...]:
    """Identity: GSI n is IOAPIC pin n, and below 16 also PIC IRQ n."""
    pic = (
        IrqchipRoute(n, KVM_IRQCHIP_PIC_MASTER if n < 8 else KVM_IRQCHIP_PIC_SLAVE, n % 8)
        for n in range(_PIC_PINS)
    )
    return (*pic, *(IrqchipRoute(n, KVM_IRQCHIP_IOAPIC, n) for n in range(IOAPIC_PINS)))
