import os
import pickle
import signal

import pytest

from supervisor import reaper
from supervisor.reaper import DeviceDied, Fate


def child(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
        finally:
            os._exit(99)
    return pid


def test_an_exit_is_told_with_its_status():
    pid = child(lambda: os._exit(3))
    assert reaper.collect(0) == Fate(pid, True, "exited with status 3")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_child_is_told_with_its_signal(number):
    pid = child(signal.pause)
    os.kill(pid, number)
    assert reaper.collect(0) == Fate(pid, True, f"killed by {number.name}")


def test_a_signal_without_a_name_is_told_by_number():
    pid = child(signal.pause)
    os.kill(pid, 40)
    assert reaper.collect(0) == Fate(pid, True, "killed by signal 40")


def test_a_stopped_child_is_told_and_is_not_over():
    pid = child(signal.pause)
    os.kill(pid, signal.SIGSTOP)
    try:
        assert reaper.collect(0) == Fate(pid, False, "stopped by SIGSTOP")
    finally:
        os.kill(pid, signal.SIGKILL)
    assert reaper.collect(0) == Fate(pid, True, "killed by SIGKILL")


def test_while_nothing_happens_there_is_no_news():
    pid = child(signal.pause)
    try:
        assert reaper.collect() is None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_without_children_there_is_no_news():
    pid = child(lambda: os._exit(reaper.collect(0) is not None))
    assert os.waitpid(pid, 0) == (pid, 0)


def test_a_dead_device_is_a_crash_with_its_name_and_cause():
    died = DeviceDied("serial1", "killed by SIGKILL")
    assert (died.exit_code, str(died)) == (33, "serial1: killed by SIGKILL")


def test_a_death_can_be_told_to_another_process():
    told = pickle.loads(pickle.dumps(DeviceDied("rtc", "killed by SIGKILL")))
    assert (str(told), told.name, told.cause) == ("rtc: killed by SIGKILL", "rtc", "killed by SIGKILL")
