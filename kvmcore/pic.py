"""The two 8259A interrupt controllers of a PC, for a split interrupt chip.

Spec: Intel 8259A datasheet (231468-003); ELCR: Intel 82371AB (PIIX4) datasheet, 4.2.1.7 to 4.2.1.8.  The
second chip's INTR is the first one's IR2.  Left out: 8080 mode (its three-byte vector), buffered mode,
which only drives a pin.
"""

from __future__ import annotations

from typing import Final

MASTER, SLAVE = 0x20, 0xA0  # each has its second port right after
ELCR: Final = 0x4D0  # one port for each
_CASCADE: Final = 2

_ICW1 = 1 << 4
_ICW1_LTIM, _ICW1_SNGL, _ICW1_IC4 = 1 << 3, 1 << 1, 1 << 0
_ICW4_SFNM, _ICW4_AEOI = 1 << 4, 1 << 1
_OCW3 = 1 << 3
_OCW3_ESMM, _OCW3_SMM, _OCW3_P, _OCW3_RR, _OCW3_RIS = 1 << 6, 1 << 5, 1 << 2, 1 << 1, 1 << 0
_OCW2_R, _OCW2_SL, _OCW2_EOI = 1 << 7, 1 << 6, 1 << 5

_SPURIOUS = 7


class Pic8259:
    """One 8259A, addressed by A0.

    Args:
        elcr_mask: the inputs that ELCR may make level-triggered.
        cascaded: inputs that another 8259A drives (for the special fully nested mode).
    """

    def __init__(self, elcr_mask: int, cascaded: int = 0) -> None:
        self._elcr_mask = elcr_mask
        self._cascaded = cascaded
        self.elcr = 0
        self._lines = 0
        self._vector_base = 0
        self._ltim = False
        self._reset()

    def _reset(self) -> None:
        """What ICW1 does (datasheet, "Initialization Command Words"): edges forgotten, IMR clear."""
        self.irr = 0
        self.isr = 0
        self.imr = 0
        self._lowest = 7  # the input of lowest priority
        self._read_isr = False
        self._poll = False
        self._special_mask = False
        self._auto_eoi = False
        self._rotate_auto_eoi = False
        self._sfnm = False
        self._expected = 0  # the ICW that is awaited at A0 = 1, or 0
        self._single = False
        self._wants_icw4 = False

    def write(self, a0: int, data: int) -> None:
        """A guest write of a byte."""
        if a0:
            self._write_1(data)
        elif data & _ICW1:
            self._reset()
            self._ltim = bool(data & _ICW1_LTIM)
            self._single = bool(data & _ICW1_SNGL)
            self._wants_icw4 = bool(data & _ICW1_IC4)
            self._expected = 2
            self._take_levels()
        elif data & _OCW3:
            self._write_ocw3(data)
        else:
            self._write_ocw2(data)

    def _write_1(self, data: int) -> None:
        match self._expected:
            case 2:
                self._vector_base = data & 0xF8
                self._expected = 4 if self._single else 3
            case 3:
                self._expected = 4
            case 4:
                self._sfnm = bool(data & _ICW4_SFNM)
                self._auto_eoi = bool(data & _ICW4_AEOI)
                self._expected = 0
            case _:
                self.imr = data
                return
        if self._expected == 4 and not self._wants_icw4:
            self._expected = 0

    def _write_ocw2(self, data: int) -> None:
        level = data & 7
        if data & _OCW2_EOI:
            ended = level if data & _OCW2_SL else self._in_service()
            if ended is not None:
                self.isr &= ~(1 << ended)
                if data & _OCW2_R:
                    self._lowest = ended
        elif data & _OCW2_SL:
            if data & _OCW2_R:
                self._lowest = level  # set priority; without R: no operation
        else:
            self._rotate_auto_eoi = bool(data & _OCW2_R)

    def _write_ocw3(self, data: int) -> None:
        if data & _OCW3_ESMM:
            self._special_mask = bool(data & _OCW3_SMM)
        if data & _OCW3_P:
            self._poll = True
        elif data & _OCW3_RR:
            self._read_isr = bool(data & _OCW3_RIS)

    def read(self, a0: int) -> int:
        """A guest read of a byte; after a poll command it acknowledges."""
        if self._poll:
            self._poll = False
            pending = self._pending()
            if pending is None:
                return 0
            self._accept(pending)
            return 0x80 | pending
        if a0:
            return self.imr
        return self.isr if self._read_isr else self.irr

    def write_elcr(self, data: int) -> None:
        """A guest write of this chip's edge/level control register."""
        self.elcr = data & self._elcr_mask
        self._take_levels()

    def set_line(self, line: int, level: bool) -> None:
        """Drive input `line`: a rising edge is latched, a level is followed."""
        bit = 1 << line
        if level and not self._lines & bit:
            self.irr |= bit
        self._lines = self._lines | bit if level else self._lines & ~bit
        if not level:
            # Also an edge must stay high until acknowledged (datasheet, "Edge and Level Triggered Modes").
            self.irr &= ~bit
        self._take_levels()

    def _take_levels(self) -> None:
        levels = 0xFF if self._ltim else self.elcr
        self.irr = self.irr & ~levels | self._lines & levels

    def _by_priority(self) -> list[int]:
        return [(self._lowest + 1 + n) & 7 for n in range(8)]

    def _in_service(self) -> int | None:
        """The input of highest priority in service; in special mask mode masked ones do not count."""
        isr = self.isr & ~self.imr if self._special_mask else self.isr
        return next((n for n in self._by_priority() if isr >> n & 1), None)

    def _pending(self) -> int | None:
        """The input to be served next, if its priority lets it interrupt."""
        requests = self.irr & ~self.imr
        for line in self._by_priority():
            bit = 1 << line
            serving = self.isr & bit and not (self._sfnm and self._cascaded & bit)
            if self._special_mask:
                if requests & bit and not serving:
                    return line
                continue
            if serving:
                return None
            if requests & bit:
                return line
            if self.isr & bit:  # a cascaded input in special fully nested mode
                return None
        return None

    @property
    def intr(self) -> bool:
        """The INTR output."""
        return self._pending() is not None

    def acknowledge(self) -> tuple[int, int]:
        """The processor's INTA cycles: (input, vector); input 7's vector if the request has gone."""
        pending = self._pending()
        if pending is None:
            return _SPURIOUS, self._vector_base | _SPURIOUS
        self._accept(pending)
        return pending, self._vector_base | pending

    def _accept(self, line: int) -> None:
        bit = 1 << line
        self.irr &= ~bit
        self._take_levels()
        if not self._auto_eoi:
            self.isr |= bit
        elif self._rotate_auto_eoi:
            self._lowest = line


class DualPic:
    """Master and slave as a PC wires them; its caller serializes.

    Threats:
        1. guest writes any bytes in any order -> every register stays within eight bits, nothing loops.
    """

    def __init__(self) -> None:
        # PIIX4: IRQ 0, 1, 2, 8 and 13 are always edges.
        self._master = Pic8259(elcr_mask=0xF8, cascaded=1 << _CASCADE)
        self._slave = Pic8259(elcr_mask=0xDE)

    def read(self, port: int) -> int:
        """One byte of 0x20, 0x21, 0xA0, 0xA1, 0x4D0 or 0x4D1."""
        if port & ~1 == ELCR:
            return (self._slave if port & 1 else self._master).elcr
        value = self._chip(port).read(port & 1)
        self._cascade()
        return value

    def write(self, port: int, data: int) -> None:
        """One byte to the same ports."""
        if port & ~1 == ELCR:
            (self._slave if port & 1 else self._master).write_elcr(data)
        else:
            self._chip(port).write(port & 1, data)
        self._cascade()

    def _chip(self, port: int) -> Pic8259:
        return self._slave if port & ~1 == SLAVE else self._master

    def set_line(self, irq: int, level: bool) -> None:
        """Drive IRQ 0 to 15; 2 is the slave's."""
        if irq >= 8:
            self._slave.set_line(irq - 8, level)
            self._cascade()
        elif irq != _CASCADE:
            self._master.set_line(irq, level)

    def _cascade(self) -> None:
        self._master.set_line(_CASCADE, self._slave.intr)

    def masked(self, irq: int) -> bool:
        """Whether the guest keeps IRQ 0 to 15 from interrupting, itself or by way of the cascade."""
        if irq >= 8:
            return bool(self._slave.imr >> irq - 8 & 1) or self.masked(_CASCADE)
        return bool(self._master.imr >> irq & 1)

    @property
    def in_service(self) -> int:
        """Bit n: IRQ n has been accepted, and the guest has not ended it."""
        return self._slave.isr << 8 | self._master.isr

    @property
    def intr(self) -> bool:
        """What LINT0 of the first local APIC, set to ExtINT, sees."""
        return self._master.intr

    def acknowledge(self) -> int:
        """The vector for `Vcpu.interrupt`; the request counts as accepted."""
        line, vector = self._master.acknowledge()
        if line == _CASCADE:
            _, vector = self._slave.acknowledge()
            # INTR of the slave falls while it is in service, so that its next request is a new edge.
            self._master.set_line(_CASCADE, False)
            self._cascade()
        return vector
