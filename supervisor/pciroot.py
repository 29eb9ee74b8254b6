"""PCI bus 0: which function is which device, and both ways to its configuration space (PCI 3.0, 3.2.2.3).

Firmware's part is done here too: before the kernel starts every BAR has an address and is decoded.  Left out:
bridges, hot-plug.
"""

from __future__ import annotations

from collections.abc import Mapping

from devproc.virtio import spec
from kvmcore import layout
from kvmcore.allocator import Resources
from kvmcore.exitloop import Core
from kvmcore.irq import GsiRouter
from kvmcore.kvm import Vm
from kvmcore.memory import GuestMemory
from supervisor import machine
from supervisor.bus import Buses, Claim, PciConfig
from supervisor.msix import Msix
from supervisor.pcishadow import PciBus
from supervisor.proxy import Proxy
from supervisor.virtiofunction import VirtioFunction


class PciRoot:
    """Bus 0, on both of the machine's buses.

    Args:
        ecam_buses: how many buses the ECAM window has room for; 0: there is none.
    """

    def __init__(
        self, core: Core, buses: Buses, vm: Vm, router: GsiRouter, memory: GuestMemory, ecam_buses: int
    ) -> None:
        self._core = core
        self._buses = buses
        self._vm = vm
        self._router = router
        self._memory = memory
        self._resources = Resources(memory.size)
        self._functions: list[VirtioFunction] = []
        self._bus = PciBus(lambda: core.pci_address, self._settle)
        buses.io.insert(Claim(machine.PCI_CONFIG_BASE, 8, "pci", PciConfig(self._bus.port_write)))
        if ecam_buses:
            ecam = PciConfig(self._bus.ecam_write)
            buses.mmio.insert(Claim(layout.ECAM, layout.ecam_size(ecam_buses), "pci", ecam))

    @property
    def functions(self) -> tuple[VirtioFunction, ...]:
        return tuple(self._functions)

    def add(self, proxy: Proxy, slot: int, eventfds: Mapping[str, tuple[int, ...]]) -> None:
        """The device is function 0 of `slot`; `eventfds` are its own, by descriptor name.

        Raises:
            ConfigError: there are no addresses or interrupts left.
            DeviceDied, KvmError
        """
        self._core.set_pci_function(slot << 3, proxy.index)
        virtio = proxy.instance.entry.virtio
        if virtio is None:
            self._bus.add(slot, proxy)
            return
        vectors = eventfds["irq"]
        gsis = self._resources.messages.allocate(proxy.name, len(vectors))
        msix = Msix(self._vm, self._router, vectors, gsis.base)
        function = VirtioFunction(
            proxy, virtio, msix, eventfds["kick"], self._vm, self._buses, self._memory.holds
        )
        function.assign(self._resources.mmio.allocate(proxy.name, spec.BAR_SIZE, spec.BAR_SIZE).base)
        self._functions.append(function)
        self._bus.add(slot, function)

    def _settle(self) -> None:
        # All of them: what one BAR has left may be where another was put before.
        for function in self._functions:
            function.place()
