import signal

from kvmcore import errors
from supervisor import ending


def test_power_off_and_the_users_stop_are_success():
    assert ending.POWEROFF.code == ending.STOPPED.code == 0
    assert ending.POWEROFF.line is None


def test_a_triple_fault_is_a_reset_that_says_so():
    assert ending.TRIPLE_FAULT.code == ending.RESET.code == 32
    assert ending.TRIPLE_FAULT.line != ending.RESET.line


def test_every_other_end_has_its_code_and_a_line():
    assert (ending.PANIC.code, errors.EXIT_USAGE) == (34, 35)
    crashed = ending.crash("serial1: killed by SIGKILL")
    assert (crashed.code, crashed.line) == (33, "serial1: killed by SIGKILL")


def test_a_signal_ends_with_the_shells_code():
    how = ending.by_signal(signal.SIGTERM, "SIGTERM")
    assert how.code == 143
    assert "SIGTERM" in how.line
