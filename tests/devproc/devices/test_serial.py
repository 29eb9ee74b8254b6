"""16550A: registers, FIFOs, interrupts, and what Linux's 8250 driver asks while it probes."""

from __future__ import annotations

from typing import Any

import pytest

from devproc.devices.serial import POLLS
from devproc.wire import Space

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
DTR, RTS, OUT1, OUT2, LOOP = 1, 2, 4, 8, 16
CHAR_NS = -(-10 * 16 * 10**9 // 1_843_200)  # 8N1 at 115200 baud, rounded up


@pytest.fixture
def com(bench: Any) -> Any:
    return bench("serial")


@pytest.fixture
def up(com: Any) -> Any:
    """The port as Linux leaves it: 115200 8N1, FIFOs on with a trigger of 8, interrupts gated through."""
    com.outb(LCR, 0x83)
    com.outb(DLL, 1)
    com.outb(DLM, 0)
    com.outb(LCR, 0x03)
    com.outb(FCR, 0x87)
    com.outb(MCR, DTR | RTS | OUT2)
    return com


# -- registers


def test_power_on_values(com: Any) -> None:
    assert [com.inb(i) for i in range(8)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]


def test_dlab_hides_ier(com: Any) -> None:
    com.outb(IER, 0x05)
    com.outb(LCR, 0x80)
    com.outb(DLL, 0x0C)
    com.outb(DLM, 0x34)
    assert (com.inb(DLL), com.inb(DLM)) == (0x0C, 0x34)
    assert not com.sent
    com.outb(LCR, 0x00)
    assert com.inb(IER) == 0x05


def test_dlab_survives_a_restore(com: Any) -> None:
    com.outb(LCR, 0x80)
    com.outb(DLL, 0x0C)
    assert com.fork().inb(DLL) == 0x0C


def test_ier_has_four_bits_and_mcr_five(com: Any) -> None:
    com.outb(IER, 0xFF)
    com.outb(MCR, 0xFF)
    assert (com.inb(IER), com.inb(MCR)) == (0x0F, 0x1F)


def test_scratch_holds_a_byte(com: Any) -> None:
    com.outb(SCR, 0xA5)
    assert com.inb(SCR) == 0xA5


def test_status_registers_are_read_only(com: Any) -> None:
    com.outb(LSR, 0)
    com.outb(MSR, 0)
    assert (com.inb(LSR), com.inb(MSR)) == (0x60, 0xB0)
    assert com.model.counters()["unclaimed_writes"] == 2


def test_a_wide_access_is_byte_accesses_at_successive_ports(com: Any) -> None:
    com.model.write(0, SCR - 1, 2, 0x5A00)
    assert com.model.read(0, LSR, 2) == 0xB060
    assert com.model.read(0, SCR, 2) == 0xFF5A


# -- transmitter


def test_bytes_reach_the_output_in_order(up: Any) -> None:
    for byte in b"hello":
        up.outb(THR, byte)
    assert up.sent == b"hello"
    assert up.inb(LSR) == 0x60


def test_output_without_room_waits_in_the_fifo_with_thre_clear(up: Any) -> None:
    up.drain(1)
    for byte in b"abc":
        up.outb(THR, byte)
    assert up.sent == b"a"
    assert up.inb(LSR) == 0
    up.drain(1)
    assert up.inb(LSR) == 0
    up.drain(5)
    assert up.sent == b"abc"
    assert up.inb(LSR) == 0x60


def test_sixteen_bytes_written_at_thre_all_arrive_however_little_room_there_was(up: Any) -> None:
    up.room = 0
    assert up.inb(LSR) & 0x20
    for byte in b"0123456789abcdef":
        up.outb(THR, byte)
    up.drain(100)
    assert up.sent == b"0123456789abcdef"


def test_output_that_fills_up_loses_what_does_not_fit(up: Any) -> None:
    """Threat 1."""
    up.room = 0
    for i in range(100):
        up.outb(THR, i)
    assert up.model.counters()["tx_lost"] == 84
    up.drain(1000)
    assert up.sent == bytes(range(16))


def test_a_run_is_lost_and_counted_as_each_byte_of_it(up: Any) -> None:
    """Threat 1."""
    up.room = 3
    up.model.writes(Space.PORT, THR, bytes(range(64)))
    up.model.writes(Space.PORT, THR, b"more")
    assert up.model.counters()["tx_lost"] == 64 - 3 - 16 + 4
    up.drain(1000)
    assert up.sent == bytes(range(19))
    assert up.model.counters()["tx_bytes"] == 19


def test_a_looped_run_interrupts_as_each_byte_of_it(up: Any) -> None:
    up.outb(MCR, RTS | OUT2 | LOOP)
    up.outb(IER, 0x05)
    up.model.writes(Space.PORT, THR, bytes(range(17)))
    assert up.inb(LSR) & 0x02
    assert [up.inb(RBR) for _ in range(16)] == [*range(16)]


def test_without_fifos_one_byte_waits(com: Any) -> None:
    com.room = 0
    com.outb(THR, 1)
    com.outb(THR, 2)
    com.drain(10)
    assert com.sent == b"\x01"


def test_resetting_the_transmit_fifo_empties_it(up: Any) -> None:
    up.room = 0
    up.outb(THR, 1)
    up.outb(FCR, 0x85)
    assert up.inb(LSR) == 0x60
    up.drain(10)
    assert up.sent == b""


# -- receiver


def test_input_is_received_in_order(up: Any) -> None:
    up.type(b"hi")
    assert up.inb(LSR) & 1
    assert bytes([up.inb(RBR), up.inb(RBR)]) == b"hi"
    assert not up.inb(LSR) & 1


def test_a_guest_that_never_reads_leaves_the_rest_on_the_host(up: Any) -> None:
    """Threat 2."""
    up.type(bytes(range(100)))
    assert len(up.typed) == 84
    assert not up.model.wants_input()
    received = []
    for _ in range(100):
        received.append(up.inb(RBR))
        up.pump()
    assert received == list(range(100))
    assert not up.inb(LSR) & 0x02


def test_without_fifos_one_byte_is_taken(com: Any) -> None:
    com.outb(MCR, RTS)
    com.type(b"ab")
    assert com.typed == b"b"
    assert com.inb(RBR) == ord("a")
    com.pump()
    assert com.inb(RBR) == ord("b")


def test_no_input_is_taken_without_rts(com: Any) -> None:
    com.outb(FCR, 0x01)
    com.outb(MCR, DTR | OUT2)
    com.inb(LSR)
    com.type(b"early")
    assert com.typed == b"early"
    com.outb(MCR, DTR | RTS | OUT2)
    com.pump()
    assert com.inb(RBR) == ord("e")


def test_input_typed_before_the_driver_starts_survives_its_fifo_resets(com: Any) -> None:
    com.type(b"ls\n")
    for fcr in (0x01, 0x07, 0x00, 0x01, 0x07):
        com.outb(FCR, fcr)
        com.pump()
        com.inb(RBR)
    com.outb(MCR, DTR | RTS)
    com.pump()
    assert bytes(com.inb(RBR) for _ in range(3)) == b"ls\n"


def test_a_guest_that_polls_and_never_writes_mcr_gets_its_input(com: Any) -> None:
    com.type(b"x")
    for _ in range(POLLS):
        assert not com.inb(LSR) & 1
    com.pump()
    assert com.inb(LSR) & 1
    assert com.inb(RBR) == ord("x")


def test_a_guest_that_only_prints_early_takes_no_input_that_its_driver_would_reset(com: Any) -> None:
    com.type(b"x")
    for byte in b"an early console's line of many bytes":
        com.outb(THR, byte)
        com.inb(LSR)
        com.pump()
    assert not com.inb(LSR) & 1


def test_resetting_the_receive_fifo_empties_it(up: Any) -> None:
    up.type(b"abc")
    up.outb(FCR, 0x83)
    assert not up.inb(LSR) & 1


@pytest.mark.parametrize("fcr", [0x00, 0xC6])
def test_turning_the_fifos_off_clears_everything(up: Any, fcr: int) -> None:
    up.type(b"abc")
    up.outb(FCR, fcr)
    assert not up.inb(LSR) & 1
    assert up.inb(IIR) == 0x01


# -- interrupts


def test_without_out2_the_line_stays_down_but_iir_tells(up: Any) -> None:
    up.outb(MCR, RTS)
    up.outb(IER, 0x02)
    assert not up.edges
    assert up.inb(IIR) == 0xC2


def test_raising_out2_with_a_cause_pending_is_an_edge(up: Any) -> None:
    up.outb(MCR, RTS)
    up.outb(IER, 0x02)
    up.outb(MCR, RTS | OUT2)
    assert up.edges["irq"] == 1


def test_enabling_thre_interrupts_at_once_and_each_time(up: Any) -> None:
    for edges in (1, 2):
        up.outb(IER, 0x02)
        assert up.edges["irq"] == edges
        assert up.inb(IIR) == 0xC2
        assert up.inb(IIR) == 0xC1
        up.outb(IER, 0x00)


def test_writing_thr_clears_thre_and_a_new_edge_follows(up: Any) -> None:
    up.outb(IER, 0x02)
    assert up.edges["irq"] == 1
    up.outb(THR, 1)  # without reading IIR, as a driver with one source may
    up.pump()
    assert up.edges["irq"] == 2
    assert up.inb(IIR) == 0xC2


def test_a_burst_into_thr_is_one_interrupt(up: Any) -> None:
    up.outb(IER, 0x02)
    up.inb(IIR)
    for i in range(16):
        up.outb(THR, i)
    up.pump()
    assert up.edges["irq"] == 2


def test_a_guest_that_polls_iir_sees_thre_without_a_pause(up: Any) -> None:
    up.outb(IER, 0x02)
    up.inb(IIR)
    up.outb(THR, 1)
    assert up.inb(IIR) == 0xC2


def test_a_driver_empties_its_buffer_inside_one_interrupt(up: Any) -> None:
    up.outb(IER, 0x02)
    text = bytes(range(200))
    left = text
    while not up.inb(IIR) & 1 and left:
        for byte in left[:16]:
            up.outb(THR, byte)
        left = left[16:]
    assert up.sent == text


def test_thre_interrupts_when_the_host_has_drained(up: Any) -> None:
    up.outb(IER, 0x02)
    up.inb(IIR)
    up.room = 0
    up.outb(THR, 1)
    up.pump()
    assert up.inb(IIR) == 0xC1
    assert up.edges["irq"] == 1
    up.drain(10)
    assert up.edges["irq"] == 2
    assert up.inb(IIR) == 0xC2


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_received_data_interrupts_at_the_trigger_level(up: Any, fcr: int, trigger: int) -> None:
    up.outb(FCR, fcr)
    up.outb(IER, 0x01)
    up.type(bytes(trigger - 1))
    assert up.inb(IIR) == 0xC1
    up.type(bytes(1))
    assert up.edges["irq"] == 1
    assert up.inb(IIR) == 0xC4
    up.inb(RBR)
    assert up.inb(IIR) == 0xC1


def test_below_the_trigger_a_time_out_interrupts_after_four_characters(up: Any) -> None:
    up.outb(IER, 0x01)
    up.type(b"ab")
    up.advance(4 * CHAR_NS - 1000)
    assert up.inb(IIR) == 0xC1
    up.advance(2000)
    assert up.inb(IIR) == 0xCC
    assert up.edges["irq"] == 1
    assert up.inb(RBR) == ord("a")
    assert up.inb(IIR) == 0xC1
    up.advance(4 * CHAR_NS)
    assert up.inb(IIR) == 0xCC
    up.inb(RBR)
    assert up.model.deadline_ns is None


def test_a_new_character_restarts_the_time_out(up: Any) -> None:
    up.outb(IER, 0x01)
    up.type(b"a")
    up.advance(3 * CHAR_NS)
    up.type(b"b")
    up.advance(3 * CHAR_NS)
    assert up.inb(IIR) == 0xC1
    up.advance(CHAR_NS)
    assert up.inb(IIR) == 0xCC


def test_reading_everything_cancels_the_time_out(up: Any) -> None:
    up.type(b"a")
    assert up.model.deadline_ns is not None
    up.inb(RBR)
    assert up.model.deadline_ns is None


def test_resetting_the_receive_fifo_forgets_a_time_out(up: Any) -> None:
    up.outb(IER, 0x01)
    up.type(b"a")
    up.advance(5 * CHAR_NS)
    assert up.inb(IIR) == 0xCC
    up.outb(FCR, 0x83)
    assert up.model.deadline_ns is None
    up.type(b"b")
    assert up.inb(IIR) == 0xC1


def test_resetting_a_full_transmit_fifo_interrupts(up: Any) -> None:
    up.outb(IER, 0x02)
    up.inb(IIR)
    up.room = 0
    up.outb(THR, 1)
    up.pump()
    assert up.edges["irq"] == 1
    up.outb(FCR, 0x85)
    assert up.edges["irq"] == 2
    assert up.inb(IIR) == 0xC2


@pytest.mark.parametrize("source", [LSR, MSR])
def test_a_status_change_interrupts_again_after_its_register_was_read(up: Any, source: int) -> None:
    def change() -> None:
        up.outb(MCR, LOOP | OUT1)
        for i in range(17):
            up.outb(THR, i)
        up.outb(FCR, 0x03)
        up.outb(MCR, RTS | OUT2)

    up.inb(MSR)
    up.outb(IER, 0x04 if source == LSR else 0x08)
    for edges in (1, 2):
        change()
        assert up.edges["irq"] == edges
        up.inb(source)
        assert up.inb(IIR) == 0xC1


def test_what_happens_is_counted(up: Any) -> None:
    up.outb(IER, 0x02)
    up.type(b"abc")
    up.drain(1)
    for i in range(3):
        up.outb(THR, i)
    up.drain(5)
    up.outb(MCR, LOOP)
    for i in range(15):
        up.outb(THR, i)
    counters = up.model.counters()
    del counters["unclaimed_reads"], counters["unclaimed_writes"]
    assert counters == {"rx_bytes": 18, "tx_bytes": 3, "tx_lost": 0, "overruns": 2, "interrupts": 2}
    assert up.edges["irq"] == 2


def test_priority_is_line_status_data_thre_modem(up: Any) -> None:
    up.outb(FCR, 0x01)
    up.outb(MCR, RTS | OUT2 | LOOP)
    for i in range(17):
        up.outb(THR, i)  # the 17th overruns
    up.outb(MCR, RTS | OUT2)  # leaving the loop changes DSR and DCD
    up.outb(IER, 0x0F)
    assert up.inb(IIR) == 0xC6
    assert up.inb(LSR) & 0x02
    assert up.inb(IIR) == 0xC4
    up.outb(FCR, 0x03)
    assert up.inb(IIR) == 0xC2
    assert up.inb(IIR) == 0xC0
    assert up.inb(MSR) & 0x0F
    assert up.inb(IIR) == 0xC1


def test_serving_one_cause_raises_an_edge_for_the_next(up: Any) -> None:
    up.outb(FCR, 0x01)
    up.outb(IER, 0x03)
    up.type(b"x")
    assert up.edges["irq"] == 1  # THRE; the line is up already when the byte comes
    assert up.inb(IIR) == 0xC4
    up.inb(RBR)
    assert up.edges["irq"] == 2
    assert up.inb(IIR) == 0xC2


def test_no_edge_repeats_while_a_cause_is_not_served(up: Any) -> None:
    """Threat 4."""
    up.outb(IER, 0x0F)
    edges = up.edges["irq"]
    for _ in range(50):
        up.inb(LSR)
        up.inb(MSR)
        up.advance(10**6)
    assert up.edges["irq"] == edges


# -- loopback


def test_loopback_mirrors_mcr_into_msr(com: Any) -> None:
    for mcr, msr in ((RTS, 0x10), (DTR, 0x20), (OUT1, 0x40), (OUT2, 0x80), (0, 0)):
        com.outb(MCR, LOOP | mcr)
        assert com.inb(MSR) & 0xF0 == msr


def test_loopback_deltas_are_cleared_by_reading_msr(com: Any) -> None:
    com.outb(MCR, LOOP | RTS | DTR | OUT1 | OUT2)
    com.inb(MSR)
    com.outb(MCR, LOOP)
    assert com.inb(MSR) == 0x0F
    assert com.inb(MSR) == 0x00
    com.outb(MCR, LOOP | OUT1)
    assert com.inb(MSR) == 0x40  # TERI is for the trailing edge only


def test_loopback_receives_what_is_sent_and_nothing_else(up: Any) -> None:
    up.outb(MCR, LOOP | RTS)
    up.type(b"host")
    up.outb(THR, 0x55)
    assert up.inb(RBR) == 0x55
    assert not up.inb(LSR) & 1
    assert not up.sent
    assert up.typed == b"host"


def test_loopback_overrun_keeps_the_fifo_and_sets_oe_once(up: Any) -> None:
    """Threat 3."""
    up.outb(MCR, LOOP)
    for i in range(256):
        up.outb(THR, i)
    assert up.inb(LSR) == 0x63
    assert up.inb(LSR) == 0x61
    assert [up.inb(RBR) for _ in range(16)] == list(range(16))
    assert not up.inb(LSR) & 1


def test_loopback_overrun_without_fifos_overwrites_rbr(com: Any) -> None:
    com.outb(MCR, LOOP)
    com.outb(THR, 1)
    com.outb(THR, 2)
    assert com.inb(LSR) & 0x02
    assert com.inb(RBR) == 2


@pytest.mark.parametrize("divisor", [0, 1])
def test_the_fastest_time_out_is_bounded(up: Any, divisor: int) -> None:
    """Threat 5."""
    up.outb(LCR, 0x80)
    up.outb(DLL, divisor)
    up.outb(LCR, 0x00)
    up.type(b"abc")
    assert up.model.deadline_ns - up.now_ns >= 240_000
    up.advance(10**6)
    assert up.model.deadline_ns is None


# -- Linux, drivers/tty/serial/8250/8250_port.c


def test_linux_autoconfig_finds_a_16550a(com: Any) -> None:
    # autoconfig(): the IER and loopback probes
    com.outb(IER, 0)
    assert com.inb(IER) & 0x0F == 0
    com.outb(IER, 0x0F)
    assert com.inb(IER) & 0x0F == 0x0F
    com.outb(IER, 0)
    com.outb(MCR, LOOP | 0x0A)
    assert com.inb(MSR) & 0xF0 == 0x90
    com.outb(MCR, 0)
    com.outb(LCR, 0xBF)
    com.outb(FCR, 0)
    com.outb(LCR, 0)
    com.outb(FCR, 0x01)
    assert com.inb(IIR) >> 6 == 3  # working FIFOs
    # autoconfig_16550a(): no EFR in either place, no National bank 2, no 64-byte mode, no UUE
    com.outb(LCR, 0x80)
    assert com.inb(IIR) != 0
    com.outb(LCR, 0xBF)
    assert com.inb(IIR) != 0
    com.outb(LCR, 0)
    mcr = com.inb(MCR)
    com.outb(LCR, 0xE0)
    exists = (com.inb(IIR) ^ mcr) & LOOP
    com.outb(LCR, 0)
    com.outb(MCR, mcr ^ LOOP)
    com.outb(LCR, 0xE0)
    follows = (com.inb(IIR) ^ mcr) & LOOP
    com.outb(LCR, 0)
    com.outb(MCR, mcr)
    assert exists or not follows
    com.outb(FCR, 0x21)
    assert com.inb(IIR) >> 5 == 6
    com.outb(LCR, 0x80)
    com.outb(FCR, 0x21)
    assert com.inb(IIR) >> 5 == 6
    com.outb(LCR, 0)
    com.outb(IER, 0x40)
    assert not com.inb(IER) & 0x40


def test_linux_size_fifo_counts_sixteen(com: Any) -> None:
    com.outb(FCR, 0x07)
    com.outb(MCR, LOOP)
    com.outb(LCR, 0x80)
    com.outb(DLL, 1)
    com.outb(LCR, 0x03)
    for i in range(256):
        com.outb(THR, i)
    count = 0
    while com.inb(LSR) & 1:
        com.inb(RBR)
        count += 1
    assert count == 16


def test_linux_startup_finds_no_thre_or_txen_bug(up: Any) -> None:
    up.outb(IER, 0x02)
    assert not up.inb(IIR) & 1
    up.outb(IER, 0x00)
    up.outb(IER, 0x02)
    assert not up.inb(IIR) & 1  # UART_BUG_THRE otherwise
    up.outb(IER, 0x00)
    up.outb(IER, 0x02)
    assert up.inb(LSR) & 0x40
    assert not up.inb(IIR) & 1  # UART_BUG_TXEN otherwise
