"""An `escapes.Attacker` in the jail of the rtc, which also has a bug: writing to it raises."""

from __future__ import annotations

from devproc.escapes import Attacker, attacker
from devproc.record import replace

VICTIM = "rtc"
HOSTILE = replace(attacker("hostile", VICTIM), module="hostile", model="Hostile")


class Hostile(Attacker):
    """Ports: see `Attacker`."""

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        raise ZeroDivisionError("as a broken model would")
