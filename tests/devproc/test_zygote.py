"""The zygote and its devices without a jail, as whoever runs the tests; integration/jail has the rest."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from devproc import jail, regs, syscalls, wire, zygote
from devproc.catalog import CATALOG
from devproc.channel import Channel, ChannelClosed
from devproc.devices.pci_host import PciHost
from devproc.jail import Mode
from devproc.wire import PeerError, Sender
from devproc.zygote import SpawnError, Zygote, await_ready, control_channel, start
from kvmcore.mailbox import Mailbox
from policies.compile import SETUP_MARK, compile_notify
from policies.parse import parse

DIGEST = bytes(32)


@pytest.fixture(scope="module")
def nursery() -> Iterator[Zygote]:
    zygote = start(mode=None)
    yield zygote
    zygote.close()
    assert os.waitpid(zygote.pid, 0)[1] == 0


class Ends:
    """The supervisor's ends of one device's channels."""

    def __init__(self) -> None:
        self.log, log = os.pipe()
        self.access, access = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(10)
        self.access.settimeout(10)
        self.control = control_channel(sock)
        self.theirs = [log, access.detach(), control.detach(), *Mailbox.create().fds]

    def close(self) -> None:
        self.access.close()
        self.control.close()
        os.close(self.log)
        for fd in self.theirs:
            os.close(fd)


@pytest.fixture
def ends() -> Iterator[Ends]:
    ends = Ends()
    yield ends
    ends.close()


def spawn(nursery: Zygote, ends: Ends, device: str = "pci-host", params: tuple[int, ...] = ()) -> int:
    pid = nursery.spawn(device, "host9", ends.theirs, mode=Mode.NONE, params=params)
    while ends.theirs:
        os.close(ends.theirs.pop())
    return pid


def test_a_device_greets_serves_and_is_our_child(nursery: Zygote, ends: Ends) -> None:
    pid = spawn(nursery, ends)
    greeting = await_ready(ends.control, "pci-host", Mode.NONE)
    assert greeting == zygote.Greeting(regs.digest(PciHost), None, ())
    ends.access.send(wire.encode(wire.Read(wire.Space.CONFIG, 0, 4)))
    assert wire.decode(ends.access.recv(99)) == wire.Value(0x1237_8086)
    ends.control.send(wire.Stop())
    assert os.waitpid(pid, 0) == (pid, 0)


def test_a_device_holds_what_it_was_given_and_nothing_else(nursery: Zygote, ends: Ends) -> None:
    pid = spawn(nursery, ends)
    await_ready(ends.control, "pci-host", Mode.NONE)
    held = {int(fd): os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert sorted(held) == [0, 1, 2, 3, 4, 5, 6]
    assert held[0] == held[1] == "/dev/null"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_zygote_holds_its_socket_and_the_standard_descriptors(nursery: Zygote) -> None:
    assert sorted(map(int, os.listdir(f"/proc/{nursery.pid}/fd"))) == [0, 1, 2, 3]


def test_the_zygote_has_loaded_no_device_and_one_thread(nursery: Zygote) -> None:
    assert len(os.listdir(f"/proc/{nursery.pid}/task")) == 1
    assert os.getsid(nursery.pid) == nursery.pid


def test_the_end_of_a_device_is_seen_on_its_channels(nursery: Zygote, ends: Ends) -> None:
    pid = spawn(nursery, ends)
    await_ready(ends.control, "pci-host", Mode.NONE)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert ends.access.recv(1) == b""
    with pytest.raises(ChannelClosed):
        ends.control.recv()


def test_parameters_out_of_range_are_refused_before_there_is_a_process(nursery: Zygote, ends: Ends) -> None:
    with pytest.raises(SpawnError, match=r"host9: ValueError: rtc: 0 parameters, expected 2"):
        spawn(nursery, ends, "rtc")
    assert CATALOG["rtc"].params


def test_of_many_asked_for_at_once_those_are_made_that_can_be(nursery: Zygote) -> None:
    devices = "pci-host", "rtc", "pvpanic?", "pci-host"
    all_ends = [Ends() for _ in devices]
    for n, (device, ends) in enumerate(zip(devices, all_ends, strict=True)):
        nursery.ask(device, f"host{n}", ends.theirs, mode=Mode.NONE)
        while ends.theirs:
            os.close(ends.theirs.pop())
    first, no_params, unknown, last = nursery.make()
    assert [str(no) for no in (no_params, unknown)] == [
        "host1: ValueError: rtc: 0 parameters, expected 2",
        "host2: KeyError: 'pvpanic?'",
    ]
    for pid, ends in ((first, all_ends[0]), (last, all_ends[3])):
        assert isinstance(pid, int)
        await_ready(ends.control, "pci-host", Mode.NONE)
        assert sorted(map(int, os.listdir(f"/proc/{pid}/fd"))) == [0, 1, 2, 3, 4, 5, 6]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for ends in all_ends:
        ends.close()


def test_a_zygote_for_one_jail_mode_makes_no_device_in_another(ends: Ends) -> None:
    sealed_only = start()
    with pytest.raises(SpawnError, match="host9: asked for jail mode none, this zygote is for full"):
        spawn(sealed_only, ends)
    sealed_only.close()
    os.waitpid(sealed_only.pid, 0)


class Device:
    """The device's end of a control channel, saying what a test wants."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(5)
        self.supervisor = control_channel(ours)
        self.sock = theirs

    def say(self, message: wire.Message, fds: tuple[int, ...] = ()) -> None:
        socket.send_fds(self.sock, [wire.encode(message)], fds)

    def await_ready(self, mode: Mode, within_s: float = 5) -> zygote.Greeting:
        before = set(os.listdir("/proc/self/fd"))
        try:
            return await_ready(self.supervisor, "rtc", mode, within_s)
        except BaseException:
            assert set(os.listdir("/proc/self/fd")) == before, "a descriptor was left"
            raise


HELLO = wire.Hello(wire.VERSION, "rtc")


def test_ready_with_a_filter_gives_its_listener_and_the_notes() -> None:
    device = Device()
    read, write = os.pipe()
    device.say(HELLO)
    device.say(wire.Log(10, "no MDWE"))
    device.say(wire.Listener(), (write,))
    device.say(wire.Ready(DIGEST))
    greeting = device.await_ready(Mode.FULL)
    assert (greeting.digest, greeting.notes) == (DIGEST, ((10, "no MDWE"),))
    assert greeting.listener is not None
    os.write(greeting.listener, b"x")
    assert os.read(read, 1) == b"x"
    for fd in (read, write, greeting.listener):
        os.close(fd)


@pytest.mark.parametrize(
    ("mode", "said", "error", "why"),
    [
        (Mode.FULL, [HELLO, wire.Ready(DIGEST)], PeerError, "before it is sealed"),
        (Mode.FULL, [HELLO, wire.Listener()], PeerError, "before it is sealed"),
        (Mode.NONE, [HELLO, wire.Listener()], PeerError, "before it is sealed"),
        (Mode.FULL, [wire.Hello(wire.VERSION, "pit")], SpawnError, "expected rtc"),
        (Mode.FULL, [wire.Hello(wire.VERSION + 1, "rtc")], SpawnError, "expected rtc"),
        (Mode.FULL, [wire.Ready(DIGEST)], PeerError, "unexpected Ready in state start"),
        (Mode.FULL, [HELLO, HELLO], PeerError, "unexpected Hello in state greeted"),
        (Mode.FULL, [HELLO, wire.Failed("jail: root: no")], SpawnError, "^jail: root: no$"),
    ],
)
def test_a_device_that_is_not_what_was_asked_for_is_not_ready(
    mode: Mode, said: list[wire.Message], error: type[Exception], why: str
) -> None:
    device = Device()
    for message in said:
        device.say(message)
    with pytest.raises(error, match=why):
        device.await_ready(mode)


@pytest.mark.parametrize("descriptors", [2, 40])
def test_a_listener_with_company_is_refused_and_nothing_is_kept(descriptors: int) -> None:
    device = Device()
    device.say(HELLO)
    device.say(wire.Listener(), (0,) * descriptors)
    with pytest.raises(PeerError):
        device.await_ready(Mode.FULL)


def test_a_listener_is_given_back_when_the_device_fails_after_it() -> None:
    device = Device()
    device.say(HELLO)
    device.say(wire.Listener(), (0,))
    device.say(wire.Failed("late"))
    with pytest.raises(SpawnError, match="late"):
        device.await_ready(Mode.FULL)


def test_a_device_that_dies_first_is_closed_and_a_silent_one_times_out() -> None:
    device = Device()
    device.say(HELLO)
    with pytest.raises(TimeoutError):
        device.await_ready(Mode.FULL, 0.01)
    device.sock.close()
    with pytest.raises(ChannelClosed):
        device.await_ready(Mode.FULL)


def test_talking_does_not_give_a_device_more_time() -> None:
    device = Device()
    device.say(HELLO)
    device.say(wire.Log(10, "nearly"))
    with pytest.raises(TimeoutError):
        device.await_ready(Mode.FULL, 0)


def sealed(device: Device, act: Callable[[], object]) -> int:
    """A process that sends its listener and then acts, before it is ready."""
    first, _ = compile_notify(parse("exit_group: 1\nbrk: 1\nmmap: 1\nmunmap: 1"), jail.SETUP_CALLS)
    pid = os.fork()
    if pid == 0:
        try:
            jail.forbid_gain()
            device.say(HELLO)
            listener = syscalls.seccomp_load(first, syscalls.SECCOMP_FILTER_FLAG_NEW_LISTENER)
            frame = wire.encode(wire.Listener())
            syscalls.send_descriptor(device.sock.fileno(), frame, listener, SETUP_MARK)
            syscalls.close(listener, SETUP_MARK)
            act()
        finally:
            os._exit(0)
    device.sock.close()
    return pid


def test_a_call_that_is_forbidden_before_it_is_ready_is_named() -> None:
    device = Device()
    pid = sealed(device, lambda: os.umask(0o123))
    with pytest.raises(zygote.Forbidden, match=r"system call 95 \(umask\)") as e:
        await_ready(device.supervisor, "rtc", Mode.FULL)
    assert (e.value.violation.pid, e.value.violation.args[0]) == (pid, 0o123)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_device_that_dies_after_its_listener_came_is_dead() -> None:
    device = Device()
    pid = sealed(device, lambda: None)
    os.waitpid(pid, 0)
    with pytest.raises(ChannelClosed):
        device.await_ready(Mode.FULL)


def test_what_is_no_listener_is_found_out() -> None:
    device = Device()
    null = os.open(os.devnull, os.O_RDONLY)
    device.say(HELLO)
    device.say(wire.Listener(), (null,))
    with pytest.raises(PeerError, match="no seccomp listener"):
        device.await_ready(Mode.FULL)
    os.close(null)


def test_a_dead_zygote_is_an_error_with_the_devices_name() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.close()
    dead = Zygote(0, Channel(ours, wire.SPAWN_TABLE, "idle", Sender.SUPERVISOR, Sender.ZYGOTE))
    with pytest.raises(SpawnError, match="rtc9: the zygote is gone"):
        dead.spawn("rtc", "rtc9", [])
    with contextlib.closing(dead):
        pass
