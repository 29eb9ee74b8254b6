"""The proxy against scripted hostile devices, on real sockets."""

import gc
import os
import select
import signal
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devproc import wire
from devproc.catalog import CATALOG
from devproc.jail import Mode
from devproc.record import replace
from kvmcore.exitloop import Core
from supervisor.machine import Instance
from supervisor.proxy import PING_EVERY_S, Proxy
from supervisor.reaper import DeviceDied

TIMEOUT_S = 0.2


class Peer:
    """The device's ends of all its channels, and the supervisor's proxy of it."""

    def __init__(self, pid=0):
        self.said = []
        access, self.access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        control, self.control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        log, self.log = os.pipe()
        self.core = Core(round(TIMEOUT_S * 1000))
        self.proxy = Proxy(
            Instance("bridge", CATALOG["pci-host"], pci_slot=0),
            pid,
            self.core,
            access,
            control,
            log,
            TIMEOUT_S,
            lambda name, line: self.said.append((name, line)),
        )
        if pid == 0:
            self.proxy.reaped = True  # there is no process that could be killed

    def send(self, *messages):
        for message in messages:
            self.control.send(wire.encode(message))

    def greet(self, device="pci-host", mode=Mode.NONE):
        self.send(wire.Hello(wire.VERSION, device), wire.Ready(bytes(wire.DIGEST_SIZE)))
        self.proxy.await_ready(mode)

    def close(self):
        self.proxy.close()
        self.access.close()
        self.control.close()
        os.close(self.log)


@pytest.fixture
def peer():
    peer = Peer()
    yield peer
    peer.close()


def dies(peer, why):
    """The next control message ends the device, for a cause that matches `why`."""
    with pytest.raises(DeviceDied, match=f"^bridge: .*{why}") as e:
        peer.proxy.on_control()
    assert "\n" not in str(e.value)


# -- until it is ready


def test_a_device_that_greets_properly_is_ready(peer):
    peer.greet()
    assert peer.proxy.control.state == "serving"


def test_a_full_jail_without_its_filter_is_not_accepted(peer):
    with pytest.raises(DeviceDied, match="broke the protocol"):
        peer.greet(mode=Mode.FULL)


def test_the_listener_of_a_full_jail_is_kept(peer):
    read, write = os.pipe()
    peer.send(wire.Hello(wire.VERSION, "pci-host"))
    socket.send_fds(peer.control, [wire.encode(wire.Listener())], [read])
    peer.send(wire.Ready(bytes(wire.DIGEST_SIZE)))
    peer.proxy.await_ready(Mode.FULL)
    assert os.path.sameopenfile(peer.proxy.listener, read)
    assert not os.get_inheritable(peer.proxy.listener)
    os.close(read)
    os.close(write)


def test_another_device_than_asked_for_is_refused(peer):
    with pytest.raises(DeviceDied, match="rtc"):
        peer.greet("rtc")


def test_a_device_that_fails_at_the_start_says_why(peer):
    peer.send(wire.Hello(wire.VERSION, "pci-host"), wire.Failed("jail: root: Operation not permitted"))
    with pytest.raises(DeviceDied, match=r"^bridge: jail: root: Operation not permitted$"):
        peer.proxy.await_ready(Mode.NONE)


def test_a_device_that_dies_at_the_start_still_has_its_log_said(peer):
    os.write(peer.log, b"Traceback: it was like this\n")
    peer.control.close()
    with pytest.raises(DeviceDied, match="died before it was ready"):
        peer.proxy.await_ready(Mode.NONE)
    assert peer.said == [("bridge", "Traceback: it was like this")]


@pytest.mark.parametrize("frame", [b"\xc0", b"\x93\x01\x02\x03", b"x" * 70_000, b"[]"])
def test_nonsense_instead_of_a_greeting_is_refused(peer, frame):
    peer.control.send(frame)
    with pytest.raises(DeviceDied, match="broke the protocol"):
        peer.proxy.await_ready(Mode.NONE)


def test_descriptors_that_were_not_asked_for_are_not_kept(peer):
    gc.collect()  # what other tests left to it
    held = len(os.listdir("/proc/self/fd"))
    null = os.open(os.devnull, os.O_RDONLY)
    peer.send(wire.Hello(wire.VERSION, "pci-host"))
    socket.send_fds(peer.control, [wire.encode(wire.Ready(bytes(wire.DIGEST_SIZE)))], [null])
    peer.proxy.await_ready(Mode.BEST_EFFORT)
    peer.control.send(b"")
    socket.send_fds(peer.control, [wire.encode(wire.Log(30, "take this"))], [null] * 10)
    with pytest.raises(DeviceDied):
        peer.proxy.on_control()
    os.close(null)
    assert len(os.listdir("/proc/self/fd")) == held


def test_a_device_that_talks_for_ever_instead_of_getting_ready_is_given_up(peer):
    peer.control.setblocking(False)
    peer.send(wire.Hello(wire.VERSION, "pci-host"), *[wire.Log(10, "nearly")] * 100)
    with pytest.raises(DeviceDied, match="broke the protocol: unexpected Log"):
        peer.proxy.await_ready(Mode.NONE)


# -- while it serves


@pytest.fixture
def serving(peer):
    peer.greet()
    return peer


def test_warnings_are_said_with_the_devices_name_and_the_rest_is_not(serving):
    serving.send(wire.Log(30, "the disk is full"), wire.Log(10, "debugging"))
    serving.proxy.on_control()
    serving.proxy.on_control()
    assert serving.said == [("bridge", "the disk is full")]


def test_no_message_is_no_trouble(serving):
    serving.proxy.on_control()


def test_end_of_file_is_death(serving):
    serving.control.close()
    dies(serving, "closed its control channel")


def test_an_empty_frame_is_death(serving):
    serving.control.send(b"")
    dies(serving, "closed its control channel")


def test_failed_is_death_in_the_devices_own_words(serving):
    serving.send(wire.Failed("cannot write console output: No space left on device"))
    dies(serving, "cannot write console output: No space left on device")


@pytest.mark.parametrize(
    "message",
    [
        wire.Pong(0),
        wire.State(b""),
        wire.Done(),
        wire.Hello(wire.VERSION, "pci-host"),
        wire.Ready(bytes(wire.DIGEST_SIZE)),
        wire.Value(0),
        wire.Stop(),
        wire.Set("size", 1),
        wire.Spawn("serial", "x", 0, "none", ()),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_message_that_may_not_come_now_is_death(serving, message):
    serving.send(message)
    dies(serving, "broke the protocol")


def test_a_frame_that_is_too_long_is_death(serving):
    serving.control.send(bytes(wire.CONTROL_FRAME_MAX + 100))
    dies(serving, "broke the protocol")


def test_a_bomb_of_nested_arrays_is_death(serving):
    serving.control.send(b"\x91" * 60_000)
    dies(serving, "broke the protocol")


@settings(max_examples=200)
@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_are_a_message_or_death(frame):
    peer = Peer()
    try:
        peer.greet()
        peer.control.send(frame)
        try:
            peer.proxy.on_control()
        except DeviceDied as e:
            assert e.name == "bridge"
        else:
            assert isinstance(wire.decode(frame), wire.Log)  # nothing else may come unasked
    finally:
        peer.close()


# -- signs of life


def test_it_is_asked_and_answers(serving):
    now_s = serving.proxy._asked_at_s
    for n in range(1, 4):
        now_s += PING_EVERY_S
        serving.proxy.check_alive(now_s)
        assert wire.decode(serving.control.recv(100)) == wire.Ping(n)
        serving.send(wire.Pong(n))
        serving.proxy.on_control()
        serving.proxy.check_alive(now_s + TIMEOUT_S)


def test_it_is_not_asked_all_the_time(serving):
    serving.proxy.check_alive(serving.proxy._asked_at_s + PING_EVERY_S / 2)
    assert select.select([serving.control], [], [], 0)[0] == []


def test_a_question_that_goes_unanswered_is_death(serving):
    now_s = serving.proxy._asked_at_s + PING_EVERY_S
    serving.proxy.check_alive(now_s)
    serving.proxy.check_alive(now_s + TIMEOUT_S / 2)
    with pytest.raises(DeviceDied, match=r"^bridge: hangs: no answer for 0\.2 s"):
        serving.proxy.check_alive(now_s + TIMEOUT_S * 1.1)


def test_an_answer_that_we_are_late_to_hear_is_one(serving):
    """The main thread may have waited for whoever reads our standard error."""
    now_s = serving.proxy._asked_at_s + PING_EVERY_S
    serving.proxy.check_alive(now_s)
    serving.send(wire.Pong(1))
    serving.proxy.check_alive(now_s + TIMEOUT_S * 2)
    serving.proxy.on_control()
    serving.proxy.check_alive(now_s + TIMEOUT_S * 3)
    assert wire.decode(serving.control.recv(100)) == wire.Ping(1)


def test_an_answer_to_another_question_is_death(serving):
    serving.proxy.check_alive(serving.proxy._asked_at_s + PING_EVERY_S)
    serving.send(wire.Pong(77))
    dies(serving, "Pong with another token")


def test_a_device_that_is_gone_is_noticed_when_asked(serving):
    serving.control.close()
    with pytest.raises(DeviceDied, match="closed its control channel"):
        serving.proxy.check_alive(serving.proxy._asked_at_s + PING_EVERY_S)


def test_asking_a_dead_device_to_stop_is_no_trouble(serving):
    serving.control.close()
    serving.proxy.ask_to_stop()


def test_stop_is_asked_for(serving):
    serving.proxy.ask_to_stop()
    assert wire.decode(serving.control.recv(100)) == wire.Stop()


# -- its settings and its counters


@pytest.fixture
def balloon(serving):
    """A proxy that takes its device for a balloon."""
    serving.proxy.instance = replace(serving.proxy.instance, entry=CATALOG["virtio-balloon"])
    return serving


def test_a_setting_is_sent_whatever_else_was_asked(balloon):
    balloon.proxy.check_alive(balloon.proxy._asked_at_s + PING_EVERY_S)
    balloon.proxy.set("target_mib", 64)
    assert wire.decode(balloon.control.recv(100)) == wire.Ping(1)
    assert wire.decode(balloon.control.recv(100)) == wire.Set("target_mib", 64)


@pytest.mark.parametrize(("name", "value"), [("target_mib", -1), ("target_mib", 1 << 21), ("size", 1)])
def test_a_setting_that_the_catalogue_does_not_have_is_not_sent(balloon, name, value):
    with pytest.raises(ValueError, match=f"cannot set {name}"):
        balloon.proxy.set(name, value)
    assert select.select([balloon.control], [], [], 0)[0] == []


def test_a_device_that_is_leaving_is_left_alone(balloon):
    balloon.proxy.ask_to_stop()
    balloon.proxy.set("target_mib", 64)
    balloon.proxy.ask_counters()
    assert wire.decode(balloon.control.recv(100)) == wire.Stop()
    assert select.select([balloon.control], [], [], 0)[0] == []


def test_counters_arrive_later_and_are_asked_for_once(balloon):
    balloon.proxy.ask_counters()
    balloon.proxy.ask_counters()
    assert wire.decode(balloon.control.recv(100)) == wire.Stats()
    assert select.select([balloon.control], [], [], 0)[0] == []
    balloon.send(wire.Counters(("updates", 3)))
    balloon.proxy.on_control()
    assert balloon.proxy.counters == {"updates": 3}


# -- accesses from Python


def test_a_configuration_write_waits_until_it_is_in_force(serving):
    serving.access.send(wire.DONE_FRAME)  # said before it is asked, as a hostile device could
    serving.proxy.config_write(4, 2, 3)
    assert wire.decode(serving.access.recv(100)) == wire.Write(wire.Space.CONFIG, 4, 2, 3, False)


@pytest.mark.parametrize(
    "frame",
    [wire.encode(wire.Value(0)), b"\x91", b"\x92\x04\x00", b"\x04", b"x" * 300],
    ids=["Value", "short", "long", "no array", "huge"],
)
def test_a_wrong_answer_is_death(serving, frame):
    serving.access.send(frame)
    with pytest.raises(DeviceDied, match="its reply is not one"):
        serving.proxy.config_write(4, 2, 3)


def test_an_answer_that_does_not_come_is_death(serving):
    with pytest.raises(DeviceDied, match="did not answer in time"):
        serving.proxy.config_write(4, 2, 3)


def test_a_device_that_was_too_late_once_is_hung_up_on(serving):
    for _ in range(2):
        with pytest.raises(DeviceDied):
            serving.proxy.config_write(4, 2, 3)
    assert isinstance(wire.decode(serving.access.recv(100)), wire.Write)
    assert serving.access.recv(100) == b""


def test_a_device_that_closed_its_access_channel_is_dead(serving):
    serving.access.close()
    with pytest.raises(DeviceDied, match=r"^bridge:"):
        serving.proxy.config_write(4, 2, 3)


# -- its log


def test_the_log_is_said_line_by_line(peer):
    os.write(peer.log, b"one\ntw")
    peer.proxy.on_log()
    assert peer.said == [("bridge", "one")]
    os.write(peer.log, b"o\n\n")
    peer.proxy.on_log()
    assert peer.said == [("bridge", "one"), ("bridge", "two")]


def test_a_line_without_end_is_said_in_pieces(peer):
    os.write(peer.log, b"x" * 5 * 4096)
    for _ in range(5):
        peer.proxy.on_log()
    assert "".join(line for _, line in peer.said) == "x" * 5 * 4096


def test_what_is_not_utf_8_is_said_escaped(peer):
    os.write(peer.log, b"\xff\n")
    peer.proxy.on_log()
    assert peer.said == [("bridge", "\\xff")]


def test_the_logs_end_is_noticed_and_its_last_words_said(peer):
    os.write(peer.log, b"last words")
    os.dup2(peer.proxy.log, peer.log)  # the last writer is gone
    peer.proxy.on_log()
    peer.proxy.on_log()
    assert peer.said == [("bridge", "last words")]
    assert not peer.proxy.log_open


# -- its end


def test_killing_it_kills_it():
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    peer = Peer(pid)
    peer.proxy.kill()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    peer.proxy.kill()  # it is gone: no trouble
    peer.close()


def test_a_pid_that_is_no_longer_ours_is_never_killed():
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(0)
    peer = Peer(pid)
    peer.proxy.reaped = True
    peer.proxy.kill()
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    peer.close()


def test_closing_gives_every_descriptor_back():
    gc.collect()
    held = len(os.listdir("/proc/self/fd"))
    peer = Peer()
    peer.greet()
    peer.close()
    del peer
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == held
