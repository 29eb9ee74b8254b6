"""16550A serial port, as a PC has four of (National Semiconductor PC16550D, June 1995, section 8).

Where the text leaves a choice the reading is Linux's (drivers/tty/serial/8250): it must find a "16550A" and
none of that chip's bugs.  Left out: the wire.  Bytes leave and arrive whole and at once, whatever the baud
rate, so there is no parity or framing error, no break (LCR bit 6 is kept and goes nowhere) and no DMA mode;
only the character time-out follows the divisor.  THRE does not, on purpose: a driver then empties its buffer
inside one interrupt, and what a guest prints just before it powers off is not lost.  MSR's delta bits cannot
be written.
"""

from __future__ import annotations

from typing import Annotated, Final

from devproc import state
from devproc.ports import Clock, Input, Output, Signal
from devproc.record import record
from devproc.regs import BYTES, Model, Register, Table
from devproc.state import U8, Length, Range
from devproc.wire import Space

FIFO_SIZE: Final = 16
CLOCK_HZ: Final = 1_843_200
TRIGGER: Final = (1, 4, 8, 14)  # FCR bits 7:6, 8.5
TIMEOUT_CHARS: Final = 4  # 8.11

IER_ERBFI, IER_ETBEI, IER_ELSI, IER_EDSSI = 0x01, 0x02, 0x04, 0x08
FCR_ENABLE, FCR_RX_RESET, FCR_TX_RESET = 0x01, 0x02, 0x04
LCR_STB, LCR_PEN, LCR_DLAB = 0x04, 0x08, 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 0x01, 0x02, 0x20, 0x40
MSR_TERI, MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x04, 0x10, 0x20, 0x40, 0x80
IIR_NONE, IIR_FIFO = 0x01, 0xC0

# Causes of an interrupt as a set of bits, and what IIR says of the first one present (table 8.6).
RLS, RDA, CTI, THRE, MSI = 1, 2, 4, 8, 16
PRIORITY: Final = ((RLS, 0x06), (RDA, 0x04), (CTI, 0x0C), (THRE, 0x02), (MSI, 0x00))
IIR_OF: Final = [next((iir for bit, iir in PRIORITY if causes & bit), IIR_NONE) for causes in range(32)]

# What the far end makes of RTS.  Until the guest has written MCR it may be one that never will, and polls:
# so many looks at LSR with nothing to send count as RTS.  A guest that only prints, as Linux does before its
# driver resets the FIFO, looks once or twice for each byte.
UNTOUCHED, OFF, ON = 0, 1, 2
POLLS: Final = 16


@record
class SerialState:
    registers: Annotated[tuple[U8, ...], Length(5, 5)]
    ier: Annotated[int, Range(0, 0x0F)]
    fcr: U8
    rx: Annotated[bytes, Length(0, FIFO_SIZE)]
    tx: Annotated[bytes, Length(0, FIFO_SIZE)]
    overrun: bool
    delta: Annotated[int, Range(0, 0x0F)]
    thre: bool
    sent: bool
    cti: bool
    cti_in_ns: Annotated[int, Range(0, 1 << 40)] | None
    line: Annotated[int, Range(0, 31)]
    flow: Annotated[int, Range(UNTOUCHED, ON)]
    looks: Annotated[int, Range(0, POLLS)]

    def __post_init__(self) -> None:
        fifo = self.fcr & FCR_ENABLE
        if self.fcr & ~0xC9 or (self.fcr and not fifo):
            raise ValueError(f"FCR {self.fcr:#x} cannot be held")
        if not fifo and (max(len(self.rx), len(self.tx)) > 1 or self.cti or self.cti_in_ns is not None):
            raise ValueError("FIFO contents with the FIFOs off")


class Serial(Model):
    """One port.

    Ports:
        irq: raised on each rising edge of INTR, as gated by OUT2 on a PC.  After an interrupt has been served
            while another is pending it is raised once more: the ISA line is edge-triggered, and a driver that
            serves one cause per interrupt would wait for ever.
        input: what the guest receives.  It is read only while the FIFO has room and the guest asserts RTS, so
            nothing typed is lost to a full FIFO or to the FIFO resets of a driver that is starting.
        output: what the guest transmits.  What it does not take waits in the transmit FIFO with THRE clear.
        clock: paces the character time-out.

    Threats:
        1. The guest transmits faster than the host drains → 16 bytes wait, later ones are lost and counted.
        2. The guest never reads → at most 16 bytes are taken from the input, the rest stays on the host.
        3. The guest loops its output back → the overrun sets OE; the FIFO stays at 16 bytes.
        4. The guest wants every interrupt → each edge takes an access, an input byte or a time-out.
        5. The guest sets a divisor of 0 or 1 → a time-out is at least 4 characters of 7 bits at 115200 baud
           away, and comes at most once per byte received or read.
    """

    TABLES = (
        Table(
            Space.PORT,
            8,
            (
                Register("RBR", 0, "RO", "receiver buffer", "8.0", when="DLAB=0"),
                Register("THR", 0, "WO", "transmitter holding", "8.0", when="DLAB=0", run=True),
                Register("IER", 1, "RW", "interrupt enable", "8.7", mask=0x0F, when="DLAB=0"),
                Register("DLL", 0, "RW", "divisor latch, low", "8.3", stored=True, when="DLAB=1"),
                Register("DLM", 1, "RW", "divisor latch, high", "8.3", stored=True, when="DLAB=1"),
                Register("IIR", 2, "RO", "interrupt identification", "8.6", reset=IIR_NONE),
                Register("FCR", 2, "WO", "FIFO control", "8.5", mask=0xCF),
                Register("LCR", 3, "RW", "line control", "8.1", stored=True),
                Register("MCR", 4, "RW", "modem control", "8.8", mask=0x1F, stored=True),
                Register("LSR", 5, "RO", "line status", "8.4", reset=LSR_THRE | LSR_TEMT, shadow=True),
                Register(
                    "MSR", 6, "RO", "modem status", "8.9", reset=MSR_CTS | MSR_DSR | MSR_DCD, shadow=True
                ),
                Register("SCR", 7, "RW", "scratch", "8.10", stored=True),
            ),
        ),
    )

    def __init__(self, *, irq: Signal, input: Input, output: Output, clock: Clock) -> None:
        super().__init__()
        self._irq = irq
        self._input = input
        self._output = output
        self._clock = clock
        self._ier = 0
        self._fcr = 0
        self._rx = bytearray()
        self._tx = bytearray()
        self._overrun = False
        self._lines = MSR_CTS | MSR_DSR | MSR_DCD
        self._delta = 0
        self._thre = False  # the THRE interrupt is pending (LSR's THRE is "_tx is empty")
        self._sent = False  # it becomes so when the guest pauses: a burst of 16 bytes is one interrupt
        self._cti = False
        self._cti_due_ns: int | None = None
        self._line = 0  # the causes that INTR stands for, when OUT2 lets it through
        self._gate = False
        self._flow = UNTOUCHED
        self._looks = 0
        self._counts = {"rx_bytes": 0, "tx_bytes": 0, "tx_lost": 0, "overruns": 0, "interrupts": 0}
        input.listen(self.wants_input, self.on_input)
        output.listen(self.on_output)

    # -- registers

    def read_RBR(self) -> int:
        if not self._rx:
            return 0
        byte = self._rx.pop(0)
        self._cti = False
        self._restart_timeout()
        self._refresh()
        return byte

    def write_THR(self, data: bytes) -> None:
        loop = self.stored["MCR"] & MCR_LOOP
        if loop and len(data) > 1:  # what one does comes before the next
            for byte in data:
                self.write_THR(BYTES[byte])
            return
        self._looks = 0
        self._thre = False
        self._line &= ~THRE  # INTR falls here, so that its next rise is an edge
        if loop:
            self._receive(data)
        else:
            sent = 0 if self._tx else self._output.write(data)
            self._counts["tx_bytes"] += sent
            if sent < len(data):
                kept = data[sent:][: self._depth() - len(self._tx)]
                self._tx += kept
                if lost := len(data) - sent - len(kept):
                    self._counts["tx_lost"] += lost
        self._sent = not self._tx and bool(self._ier & IER_ETBEI)

    def read_IER(self) -> int:
        return self._ier

    def write_IER(self, data: int) -> None:
        # Enabling THRE with the transmitter empty interrupts at once; Linux tests for chips that do not.
        if data & ~self._ier & IER_ETBEI:
            self._thre = not self._tx
        self._ier = data & 0x0F
        self._refresh()

    def read_IIR(self) -> int:
        iir = IIR_OF[self._refresh()]
        if iir == IIR_OF[THRE]:
            self._thre = False
            self._refresh()
        return iir | IIR_FIFO if self._fcr else iir

    def write_FCR(self, data: int) -> None:
        changed = (data ^ self._fcr) & FCR_ENABLE
        if changed or data & FCR_RX_RESET:
            self._rx.clear()
            self._cti = False
            self._cti_due_ns = None
        if (changed or data & FCR_TX_RESET) and self._tx:
            self._tx.clear()
            self._thre = True
        # 8.5: bit 0 must be 1 for the other bits to be programmed; bits 1 and 2 clear themselves.
        self._fcr = data & 0xC9 if data & FCR_ENABLE else 0
        self._refresh()

    def write_LCR(self, data: int) -> None:
        self.select(Space.PORT, "DLAB=1" if data & LCR_DLAB else "DLAB=0")

    def write_MCR(self, data: int) -> None:
        before = self._lines
        self._set_modem(data)
        self._flow = ON if data & (MCR_LOOP | MCR_RTS) == MCR_RTS else OFF
        delta = (before ^ self._lines) >> 4
        if self._lines & MSR_RI:
            delta &= ~MSR_TERI  # only the trailing edge counts
        self._delta |= delta
        self._refresh()

    def read_LSR(self) -> int:
        lsr = self._lsr()
        if self._overrun:
            self._overrun = False
            self._refresh()
            lsr |= LSR_OE
        if self._flow == UNTOUCHED:
            self._looks = min(self._looks + 1, POLLS)
            if self._looks == POLLS:
                self._flow = ON
        return lsr

    def shadow_LSR(self) -> int | None:
        return None if self._overrun or self._flow == UNTOUCHED else self._lsr()

    def read_MSR(self) -> int:
        msr = self._lines | self._delta
        if self._delta:
            self._delta = 0
            self._refresh()
        return msr

    def shadow_MSR(self) -> int | None:
        return None if self._delta else self._lines

    # -- the host's side

    @property
    def deadline_ns(self) -> int | None:
        return 0 if self._sent else self._cti_due_ns

    def on_deadline(self, now_ns: int) -> None:
        if self._cti_due_ns is not None and now_ns >= self._cti_due_ns:
            self._cti_due_ns = None
            self._cti = True
        self._refresh()

    def wants_input(self) -> bool:
        """Whether it takes a byte now."""
        return self._flow == ON and len(self._rx) < self._depth()

    def on_input(self) -> None:
        """There may be input; take what fits."""
        if self.wants_input() and (data := self._input.read(self._depth() - len(self._rx))):
            self._receive(data)

    def on_output(self) -> None:
        """The output has room again."""
        if not self._tx:
            return
        taken = self._output.write(bytes(self._tx))
        del self._tx[:taken]
        self._counts["tx_bytes"] += taken
        self._thre = not self._tx
        self._refresh()

    # -- inside

    def _lsr(self) -> int:
        """But for what a read clears."""
        return (LSR_DR if self._rx else 0) | (0 if self._tx else LSR_THRE | LSR_TEMT)

    def _depth(self) -> int:
        return FIFO_SIZE if self._fcr else 1

    def _receive(self, data: bytes) -> None:
        """Bytes from the input or the loop enter the receiver."""
        self._counts["rx_bytes"] += len(data)
        room = self._depth() - len(self._rx)
        if len(data) > room:
            self._overrun = True
            self._counts["overruns"] += 1
            if not self._fcr:
                self._rx.clear()  # 8.4: RBR is overwritten, a full FIFO is not
                room = 1
        self._rx += data[:room]
        self._restart_timeout()
        self._refresh()

    def _restart_timeout(self) -> None:
        self._cti_due_ns = None
        if self._fcr and self._rx and not self._cti:
            lcr = self.stored["LCR"]
            bits = 7 + (lcr & 3) + bool(lcr & LCR_STB) + bool(lcr & LCR_PEN)
            divisor = max(1, self.stored["DLM"] << 8 | self.stored["DLL"])
            self._cti_due_ns = self._clock() + TIMEOUT_CHARS * bits * divisor * 16 * 10**9 // CLOCK_HZ

    def _set_modem(self, mcr: int) -> None:
        """What follows from MCR: the modem lines as MSR shows them, and the gate on INTR."""
        if mcr & MCR_LOOP:  # 8.8: RTS to CTS, DTR to DSR, OUT1 to RI, OUT2 to DCD; the pins are inactive
            self._lines = (
                (MSR_CTS if mcr & MCR_RTS else 0)
                | (MSR_DSR if mcr & MCR_DTR else 0)
                | (MSR_RI if mcr & MCR_OUT1 else 0)
                | (MSR_DCD if mcr & MCR_OUT2 else 0)
            )
        else:
            self._lines = MSR_CTS | MSR_DSR | MSR_DCD
        self._gate = mcr & (MCR_LOOP | MCR_OUT2) == MCR_OUT2

    def _refresh(self) -> int:
        """The causes now, after raising `irq` where INTR has risen or stays up for the next cause."""
        if self._sent:
            self._sent = False
            self._thre = True
        ier = self._ier
        causes = 0
        if ier & IER_ELSI and self._overrun:
            causes |= RLS
        if ier & IER_ERBFI and self._rx:
            if not self._fcr or len(self._rx) >= TRIGGER[self._fcr >> 6]:
                causes |= RDA
            if self._cti:
                causes |= CTI
        if ier & IER_ETBEI and self._thre:
            causes |= THRE
        if ier & IER_EDSSI and self._delta:
            causes |= MSI
        before = self._line
        self._line = causes if self._gate else 0
        if self._line and (not before or before & ~self._line):
            self._counts["interrupts"] += 1
            self._irq()
        return causes

    # -- state

    def save(self) -> bytes:
        due = self._cti_due_ns
        return state.pack(
            SerialState(
                registers=self.stored_values(),
                ier=self._ier,
                fcr=self._fcr,
                rx=bytes(self._rx),
                tx=bytes(self._tx),
                overrun=self._overrun,
                delta=self._delta,
                thre=self._thre,
                sent=self._sent,
                cti=self._cti,
                cti_in_ns=None if due is None else max(0, due - self._clock()),
                line=self._line,
                flow=self._flow,
                looks=self._looks,
            )
        )

    def restore(self, data: bytes) -> None:
        s = state.unpack(SerialState, data)
        self.check_stored(s.registers)
        self.restore_stored(s.registers)
        self.write_LCR(self.stored["LCR"])
        self._set_modem(self.stored["MCR"])
        self._ier = s.ier
        self._fcr = s.fcr
        self._rx = bytearray(s.rx)
        self._tx = bytearray(s.tx)
        self._overrun = s.overrun
        self._delta = s.delta
        self._thre = s.thre
        self._sent = s.sent
        self._cti = s.cti
        self._cti_due_ns = None if s.cti_in_ns is None else self._clock() + s.cti_in_ns
        self._line = s.line
        self._flow = s.flow
        self._looks = s.looks

    def counters(self) -> dict[str, int]:
        return {**super().counters(), **self._counts}
