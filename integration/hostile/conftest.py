"""The guests are those of integration/machine."""

from integration.machine.conftest import elf

__all__ = ["elf"]
