from collections.abc import Sequence

import pytest

from kvmcore.errors import KvmError
from kvmcore.irq import GsiRouter, IrqchipRoute, MsiMessage, MsiRoute

A = MsiMessage(0xFEE00000, 0x4031)
B = MsiMessage(0xFEE01000, 0x4032)


class Vm:
    """Takes tables as KVM does, refusing GSIs from 4096 on."""

    def __init__(self) -> None:
        self.tables: list[list[IrqchipRoute | MsiRoute]] = []

    def set_gsi_routing(self, routes: Sequence[IrqchipRoute | MsiRoute]) -> None:
        if any(r.gsi >= 4096 for r in routes):
            raise KvmError("KVM_SET_GSI_ROUTING", 22)
        self.tables.append(list(routes))

    def messages(self) -> list[MsiRoute]:
        return [r for r in self.tables[-1] if isinstance(r, MsiRoute)]


def test_the_kernel_s_chip_has_each_gsi_on_its_own_pin() -> None:
    vm = Vm()
    GsiRouter(vm.set_gsi_routing, split=False)
    (table,) = vm.tables
    assert [r for r in table if r.gsi == 0] == [IrqchipRoute(0, 0, 0), IrqchipRoute(0, 2, 0)]
    assert [r for r in table if r.gsi == 12] == [IrqchipRoute(12, 1, 4), IrqchipRoute(12, 2, 12)]
    assert [r for r in table if r.gsi == 23] == [IrqchipRoute(23, 2, 23)]
    assert len(table) == 16 + 24


def test_a_split_chip_starts_without_routes() -> None:
    vm = Vm()
    GsiRouter(vm.set_gsi_routing, split=True)
    assert vm.tables == [[]]


def test_messages_come_and_go_beside_the_pins() -> None:
    vm = Vm()
    router = GsiRouter(vm.set_gsi_routing, split=False)
    router.update({25: B, 24: A})
    assert vm.messages() == [MsiRoute(24, A), MsiRoute(25, B)]
    router.update({24: None})
    assert vm.messages() == [MsiRoute(25, B)]
    assert len(vm.tables[-1]) == 40 + 1


def test_an_update_that_changes_nothing_does_not_bother_kvm() -> None:
    vm = Vm()
    router = GsiRouter(vm.set_gsi_routing, split=True)
    router.update({4: A})
    router.update({4: A, 5: None})
    assert len(vm.tables) == 2


def test_a_pin_of_the_kernel_s_chip_cannot_become_a_message() -> None:
    vm = Vm()
    router = GsiRouter(vm.set_gsi_routing, split=False)
    with pytest.raises(ValueError, match="pins"):
        router.update({23: A})
    assert len(vm.tables) == 1


def test_a_refused_table_is_not_remembered() -> None:
    vm = Vm()
    router = GsiRouter(vm.set_gsi_routing, split=True)
    with pytest.raises(KvmError):
        router.update({4096: A})
    router.update({4: B})
    assert vm.messages() == [MsiRoute(4, B)]
