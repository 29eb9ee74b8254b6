"""The guests are those of integration/machine."""

from integration.machine.conftest import elf, machine

__all__ = ["elf", "machine"]
