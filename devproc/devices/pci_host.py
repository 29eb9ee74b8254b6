"""The host bridge's configuration space, function 0:0.0 (PCI Local Bus Specification 3.0, section 6.2).

It carries the ids and the command and status bits of an Intel 440FX (82441FX data sheet, order 290549).  It
is what makes a guest believe that configuration mechanism #1 works: Linux looks for a host bridge class or
Intel's vendor id.  Left out: everything that chip configures (DRAM rows, PAM, caching).  The 0xcf8 latch
belongs to the supervisor's bus.
"""

from __future__ import annotations

from typing import Annotated

from devproc import state
from devproc.record import record
from devproc.regs import Model, Register, Table
from devproc.state import U16, Length
from devproc.wire import Space


@record
class PciHostState:
    registers: Annotated[tuple[U16, ...], Length(9, 9)]


class PciHost(Model):
    """The function's registers; it receives no ports.

    Threats:
        1. The guest writes anything anywhere → only the table's writable bits change, and they do nothing.
        2. The guest accesses past 256 bytes, or across the end → reads 0; a PCI function has no more.
    """

    TABLES = (
        Table(
            Space.CONFIG,
            4096,
            (
                Register("VID", 0x00, "RO", "vendor: Intel", "6.2.1", size=2, reset=0x8086, stored=True),
                Register("DID", 0x02, "RO", "device: 82441FX", "6.2.1", size=2, reset=0x1237, stored=True),
                # Memory space and bus master are wired on; parity and SERR# reporting can be switched.
                Register(
                    "PCICMD",
                    0x04,
                    "RW",
                    "command",
                    "6.2.2",
                    size=2,
                    reset=0x0006,
                    mask=0x0140,
                    stored=True,
                ),
                # Fast back-to-back, medium DEVSEL#; the error bits are cleared by writing 1.
                Register(
                    "PCISTS",
                    0x06,
                    "W1C",
                    "status",
                    "6.2.3",
                    size=2,
                    reset=0x0280,
                    mask=0xF100,
                    stored=True,
                ),
                Register("RID", 0x08, "RO", "revision", "6.2.1", reset=0x02, stored=True),
                Register(
                    "CLASSC_SUB",
                    0x0A,
                    "RO",
                    "subclass: host bridge",
                    "6.2.1",
                    reset=0x00,
                    stored=True,
                ),
                Register("CLASSC_BASE", 0x0B, "RO", "base class: bridge", "6.2.1", reset=0x06, stored=True),
                Register("MLT", 0x0D, "RW", "master latency timer", "6.2.4", mask=0xF8, stored=True),
                Register("HEADT", 0x0E, "RO", "header type 0, one function", "6.2.1", stored=True),
            ),
            hole=0x00,
        ),
    )

    def __init__(self) -> None:
        super().__init__()

    def save(self) -> bytes:
        return state.pack(PciHostState(self.stored_values()))

    def restore(self, data: bytes) -> None:
        s = state.unpack(PciHostState, data)
        self.check_stored(s.registers)
        self.restore_stored(s.registers)
