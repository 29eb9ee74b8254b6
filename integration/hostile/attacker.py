"""`vmsup` in which one device process attacks its supervisor: `attacker.py ATTACK`, then vmsup's own words.

The attacker is forked by the zygote as every device process is, holds that device's descriptors and walks
into the same jail, up to the moment of its attack.  Once sealed it has the system calls of the device's
policy and no others, so what takes more (descriptors in a frame, a closed channel) is tried twice: without a
jail, and in the jail, where the system call is what it dies of.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import mmap
import os
import select
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgpack

from devproc import child, syscalls, wire
from devproc.catalog import CATALOG, FD_ACCESS, FD_CONTROL, FD_LOG, FD_MAILBOX
from devproc.channel import Channel
from policies.compile import SETUP_MARK
from supervisor import cli, proxy

READY_WITHIN_S: Final = 3.0  # instead of 30
TIMEOUT_S: Final = "2"
FLOOD: Final = 20_000  # messages, of TEXT each
TEXT: Final = "x" * 900
DONE: Final = "that was all"
FLOOD_OF_INTERRUPTS: Final = "a flood of interrupts"
SERVING, ACCESSED = "serving", "accessed"

# kvmcore/_mailbox.h, in words
DONE_WORD, DEVICE_CPU, VALUE, WORDS = 16, 18, 20, 1024
SYS_FUTEX, FUTEX_WAKE = 202, 1

_libc: Final = ctypes.CDLL(None)
_libc.mmap.restype = ctypes.c_void_p

Act = Callable[[socket.socket, socket.socket], object]


@dataclass(frozen=True)
class Attack:
    """One row.

    Attributes:
        when: in place of which message of its start, or once it serves, or in an access that waits for it.
        act: what it does with its (access, control) channels; afterwards it is silent for ever.
        line: what the VM ends with, after "vmsup: "; None: it goes on, and the device serves again, saying
            `DONE` at each access.
        transport: by which the access comes.
    """

    when: type[wire.Message] | str
    act: Act
    line: str | None
    victim: str = "rtc"
    guest: str = "idle"
    options: tuple[str, ...] = ()
    transport: str = "socket"


def _ready(fd: int, events: int, timeout_s: int) -> bool:
    """By ppoll(2), the way to wait that its policy has."""
    polled = ctypes.create_string_buffer(struct.pack("=ihh", fd, events, 0))
    return _libc.ppoll(polled, ctypes.c_ulong(1), struct.pack("=qq", timeout_s, 0), None) > 0


def silent(access: socket.socket, control: socket.socket) -> None:
    while True:
        _ready(-1, 0, 1000)


def busy(access: socket.socket, control: socket.socket) -> None:
    while True:
        pass


def on_control(*frames: bytes | wire.Message) -> Act:
    def act(access: socket.socket, control: socket.socket) -> None:
        for frame in frames:
            control.send(wire.encode(frame) if isinstance(frame, wire.Message) else frame)

    return act


def on_access(*frames: bytes | wire.Message) -> Act:
    return lambda access, control: on_control(*frames)(control, access)


def in_turn(*acts: Act) -> Act:
    def act(access: socket.socket, control: socket.socket) -> None:
        for one in acts:
            one(access, control)

    return act


def say(text: str) -> Act:
    return lambda access, control: os.write(FD_LOG, text.encode() + b"\n")


def flood(act: Act) -> Act:
    return repeat(FLOOD, act)


def repeat(times: int, act: Act) -> Act:
    def acts(access: socket.socket, control: socket.socket) -> None:
        for _ in range(times):
            act(access, control)

    return acts


def until_full(frame: bytes) -> Act:
    """As many on the access channel as the kernel holds for a supervisor that does not read."""

    def act(access: socket.socket, control: socket.socket) -> None:
        while _ready(access.fileno(), select.POLLOUT, 0):
            access.send(frame)

    return act


def answer_ping(change: Callable[[int], wire.Message]) -> Act:
    def act(access: socket.socket, control: socket.socket) -> None:
        ping = wire.decode(control.recv(wire.CONTROL_FRAME_MAX + 1))
        assert isinstance(ping, wire.Ping)
        control.send(wire.encode(change(ping.token)))

    return act


def with_descriptors(count: int, frame: bytes | wire.Message, *, access_channel: bool = False) -> Act:
    def act(access: socket.socket, control: socket.socket) -> None:
        fds = array.array("i", [0] * count)  # /dev/null
        data = wire.encode(frame) if isinstance(frame, wire.Message) else frame
        sock = access if access_channel else control
        sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])

    return act


def interrupt_all(access: socket.socket, control: socket.socket) -> None:
    """Every interrupt of the virtio-rng device once."""
    slots = CATALOG["virtio-rng"].slots()
    for fd in (*range(slots["FD_IRQ_FIRST"], slots["FD_IRQ_LAST"] + 1), slots["FD_INTX"]):
        os.eventfd_write(fd, 1)


def call(what: Callable[[], object]) -> Act:
    def act(access: socket.socket, control: socket.socket) -> None:
        with contextlib.suppress(OSError):
            what()

    return act


def close(channel: str) -> Act:
    return lambda access, control: (access if channel == "access" else control).close()


class Page:
    """The mailbox, as its device can write it."""

    words: ctypes.Array[ctypes.c_uint32]

    @classmethod
    def map(cls) -> None:
        """While that is allowed still, and without another descriptor, as Python's mmap would take."""
        at = _libc.mmap(None, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, FD_MAILBOX, 0)
        cls.words = (ctypes.c_uint32 * WORDS).from_address(at)

    @classmethod
    def wake(cls) -> None:
        _libc.syscall(SYS_FUTEX, ctypes.byref(cls.words, 4 * DONE_WORD), FUTEX_WAKE, 1, None, None, 0)


def answer(done: int, value: int) -> Act:
    """Says that it is done with so many more requests than it was."""

    def act(access: socket.socket, control: socket.socket) -> None:
        Page.words[VALUE] = value
        Page.words[DONE_WORD] += done
        Page.wake()

    return act


def scribble(access: socket.socket, control: socket.socket) -> None:
    """Over all of the page, for ever."""
    garbage = [bytes([n]) * mmap.PAGESIZE for n in (0xA5, 0x5A, 0xFF, 0x99)]
    while True:
        for page in garbage:
            ctypes.memmove(Page.words, page, mmap.PAGESIZE)


def wake_for_nothing(access: socket.socket, control: socket.socket) -> None:
    """For ever, who waits for an answer, and have him think that it comes from another CPU."""
    while True:
        Page.words[DEVICE_CPU] += 1
        Page.wake()


_exit: Act = lambda access, control: os._exit(7)  # noqa: E731
_crash: Act = lambda access, control: ctypes.string_at(0)  # noqa: E731
_NESTED = b"\x91" * 2000
_NO_REPLY = "rtc: its reply is not one"
_BROKE = "rtc: broke the protocol: "
_NOT_STARTED = "cannot spawn the devices: rtc: "
_LATE = f"{_NOT_STARTED}not ready after {READY_WITHIN_S:g} s"
_TOO_LONG = f"{_BROKE}frame of 65537 bytes, expected 1 to 65536"
_HANGS = f"rtc: hangs: no answer for {TIMEOUT_S} s"
_SLOW = "rtc: it did not answer in time"
_HELLO = wire.Hello(wire.VERSION, "rtc")
_READY = wire.Ready(bytes(wire.DIGEST_SIZE))


def _forbidden(number: int, name: str) -> str:
    return f"rtc: killed for system call {number} ({name}), which its policy forbids"


def _reply(*frames: bytes | wire.Message, line: str = _NO_REPLY) -> Attack:
    return Attack(ACCESSED, on_access(*frames), line, guest="clock")


def _control(*frames: bytes | wire.Message, line: str) -> Attack:
    return Attack(SERVING, on_control(*frames), line)


def _mail(act: Act, line: str, victim: str = "rtc", guest: str = "clock") -> Attack:
    """In an access that came through the mailbox."""
    return Attack(ACCESSED, act, line, victim, guest, transport="mailbox")


def _start(when: type[wire.Message], act: Act, line: str) -> Attack:
    return Attack(when, act, _NOT_STARTED + line)


def _harmless(act: Act, *options: str) -> Attack:
    """It begins when the guest has read the clock, and then the device is as good as before."""
    # The next access waits until all of it is done, which may take a slow machine a while.
    options = ("--device-timeout", "60", *options)
    return Attack(ACCESSED, in_turn(on_access(wire.Value(0)), act), None, guest="ask", options=options)


_UNJAILED = ("--no-jail",)
ATTACKS: Final[dict[str, Attack]] = {
    # -- what answers an access
    "a reply of garbage": _reply(b"\xc1\xc1\xc1\xc1\xc1"),
    "a reply cut short": _reply(b"\x92\x03\xcd\x01"),
    "a reply of 200 bytes": _reply(b"\x92\x03" + bytes(198)),
    "a reply of 60,000 bytes": _reply(bytes(60_000)),
    "an empty reply": _reply(b"", line="rtc: it closed its access channel"),
    "a nested reply": _reply(_NESTED[:30]),
    "a reply of two values": _reply(b"\x93\x03\x01\x01"),
    "two replies in a frame": _reply(b"\x92\x03\x01\x92\x03\x01"),
    "a value beyond the size": _reply(wire.Value(0x100)),
    "a value of 64 bits for one byte": _reply(wire.Value(wire.U64_MAX)),
    "a negative value": _reply(b"\x92\x03\xff"),
    "a value that is true": _reply(b"\x92\x03\xc3"),
    "a value that is a float": _reply(msgpack.packb([3, 1.0])),
    "a value that is text": _reply(msgpack.packb([3, "1"])),
    "a value that is an extension": _reply(b"\x92\x03\xd4\x01\x01"),
    "Done for a read": _reply(wire.Done()),
    "a read for a read": _reply(wire.Read(0, 0, 1)),
    "a control message for a read": _reply(wire.Pong(1)),
    "values before they are asked for, then nonsense": Attack(
        SERVING, on_access(wire.Value(1), wire.Value(2), b"\xc1"), _NO_REPLY, guest="clock"
    ),
    "a value for a marked write": Attack(
        SERVING, on_access(wire.Value(0)), "pci-host: its reply is not one", "pci-host", "pci"
    ),
    "no Done for a marked write": Attack(
        ACCESSED, silent, "pci-host: it did not answer in time", "pci-host", "pci"
    ),
    "silence in an access": Attack(ACCESSED, in_turn(say(DONE), silent), _SLOW, guest="clock"),
    "endless work in an access": Attack(ACCESSED, in_turn(say(DONE), busy), _SLOW, guest="clock"),
    "an exit in an access": Attack(ACCESSED, _exit, "rtc: exited with status 7", guest="clock"),
    "an access channel full of frames": Attack(SERVING, until_full(b"\x92\x03\x00"), _HANGS),
    # -- what answers an access through the mailbox
    "silence in the mailbox": _mail(in_turn(say(DONE), silent), _SLOW),
    "endless work in the mailbox": _mail(in_turn(say(DONE), busy), _SLOW),
    "waking for nothing": _mail(in_turn(say(DONE), wake_for_nothing), _SLOW),
    "scribbling": _mail(scribble, _NO_REPLY),
    "an answer before it is asked for": _mail(answer(2, 0), _NO_REPLY),
    "going back in the mailbox": _mail(answer(-100, 0), _NO_REPLY),
    "an old answer": _mail(answer(0, 0), _SLOW),
    "a value beyond the size in the mailbox": _mail(answer(1, 0x100), _NO_REPLY),
    "a frame beside the mailbox": _mail(on_access(wire.Value(0)), _NO_REPLY),
    "an exit in the mailbox": _mail(_exit, "rtc: exited with status 7"),
    "getpid in the mailbox": _mail(call(os.getpid), _forbidden(39, "getpid")),
    "silence at a marked write in the mailbox": _mail(
        silent, "pci-host: it did not answer in time", "pci-host", "pci"
    ),
    # -- the control channel of a device that serves
    "garbage": _control(b"\xc1" * 40, line=_BROKE + "not a frame: FormatError"),
    "a frame cut short": _control(b"\x93\x1a\x14\xd9\xff", line=_BROKE + "not a frame: ValueError"),
    "a frame of 65,537 bytes": _control(bytes(65_537), line=_TOO_LONG),
    "a frame of 150,000 bytes": _control(bytes(150_000), line=_TOO_LONG),
    "an empty frame": _control(b"", line="rtc: closed its control channel"),
    "nested arrays": _control(_NESTED, line=_BROKE + "not a frame: StackError"),
    "many empty arrays": _control(
        b"\xdd\x00\x00\xff\xf0" + b"\x90" * 0xFFF0, line=_BROKE + "not a frame: ValueError"
    ),
    "a tag that nobody has": _control(b"\x91\x63", line=_BROKE + "unknown tag 99"),
    "a field too many": _control(b"\x92\x04\x01", line=_BROKE + "Done with 1 fields, expected 0"),
    "a level that is negative": _control(b"\x93\x1a\xff\xa1x", line=_BROKE + "Log.level out of range"),
    "Hello again": _control(_HELLO, line=_BROKE + "unexpected Hello in state serving"),
    "Ready again": _control(_READY, line=_BROKE + "unexpected Ready in state serving"),
    "another listener": _control(wire.Listener(), line=_BROKE + "unexpected Listener in state serving"),
    "Pong unasked": _control(wire.Pong(0), line=_BROKE + "unexpected Pong in state serving"),
    "a state unasked": _control(wire.State(b"x"), line=_BROKE + "unexpected State in state serving"),
    "Done unasked": _control(wire.Done(), line=_BROKE + "unexpected Done in state serving"),
    "the supervisor's own words": _control(wire.Stop(), line=_BROKE + "unexpected Stop in state serving"),
    "the zygote's words": _control(wire.Spawned((1,)), line=_BROKE + "unexpected Spawned in state serving"),
    "Pong with another token": Attack(
        SERVING, answer_ping(lambda token: wire.Pong(token ^ 1)), _BROKE + "Pong with another token"
    ),
    "Pong twice": Attack(
        SERVING,
        in_turn(answer_ping(wire.Pong), on_control(wire.Pong(1))),
        _BROKE + "unexpected Pong in state serving",
    ),
    "Counters for Ping": Attack(
        SERVING, answer_ping(lambda token: wire.Counters(())), _BROKE + "unexpected Counters in state pinged"
    ),
    "silence": Attack(SERVING, silent, _HANGS),
    "endless work": Attack(SERVING, busy, _HANGS),
    "an exit": Attack(SERVING, _exit, "rtc: exited with status 7"),
    "a failure that lies in many lines": _control(
        wire.Failed("x\nvmsup: serial1: \x1b[2Jlies"), line="rtc: x vmsup: serial1: \\x1b[2Jlies"
    ),
    # -- what the policy forbids
    "getpid": Attack(SERVING, call(os.getpid), _forbidden(39, "getpid")),
    "a socket": Attack(SERVING, call(socket.socketpair), _forbidden(53, "socketpair")),
    "a fork": Attack(SERVING, call(os.fork), _forbidden(56, "clone")),
    "a descriptor in the jail": Attack(SERVING, with_descriptors(1, wire.Pong(1)), _forbidden(46, "sendmsg")),
    "closing a channel in the jail": Attack(SERVING, close("access"), _forbidden(3, "close")),
    # As the jail did it before it was sealed.
    "closing a channel as the jail does": Attack(
        SERVING, call(lambda: syscalls.close(FD_ACCESS, SETUP_MARK)), "rtc: killed by SIGSYS"
    ),
    "a write to the access channel": Attack(
        SERVING, call(lambda: os.write(FD_ACCESS, b"x")), _forbidden(1, "write")
    ),
    "getpid in an access": Attack(ACCESSED, call(os.getpid), _forbidden(39, "getpid"), guest="clock"),
    # -- a start that is not one
    "silence instead of Hello": Attack(wire.Hello, silent, _LATE),
    "silence instead of Listener": Attack(wire.Listener, silent, _LATE),
    "silence instead of Ready": Attack(wire.Ready, silent, _LATE),
    "an exit instead of Hello": _start(wire.Hello, _exit, "died before it was ready"),
    "an exit instead of Listener": _start(wire.Listener, _exit, "died before it was ready"),
    "an exit instead of Ready": _start(wire.Ready, _exit, "died before it was ready"),
    "a crash instead of Listener": _start(wire.Listener, _crash, "died before it was ready"),
    "garbage instead of Hello": _start(
        wire.Hello, on_control(b"\xc1"), "broke the protocol: not a frame: FormatError"
    ),
    "Ready instead of Hello": _start(
        wire.Hello, on_control(_READY), "broke the protocol: unexpected Ready in state start"
    ),
    "the name of another device": _start(
        wire.Hello, on_control(wire.Hello(1, "pit")), "pit version 1 answers, expected rtc version 1"
    ),
    "another version": _start(
        wire.Hello, on_control(wire.Hello(2, "rtc")), "rtc version 2 answers, expected rtc version 1"
    ),
    "Hello twice": _start(
        wire.Listener, on_control(_HELLO), "broke the protocol: unexpected Hello in state greeted"
    ),
    "Ready without a filter": _start(
        wire.Listener, on_control(_READY), "broke the protocol: unexpected Ready before it is sealed"
    ),
    "a listener without a descriptor": _start(
        wire.Listener,
        on_control(wire.Listener()),
        "broke the protocol: unexpected Listener before it is sealed",
    ),
    "twenty listeners": _start(
        wire.Listener, with_descriptors(20, wire.Listener()), "broke the protocol: more than 1 descriptors"
    ),
    "a log line with a descriptor, then garbage": _start(
        wire.Listener,
        in_turn(with_descriptors(1, wire.Log(10, "x")), on_control(b"\xc1")),
        "broke the protocol: not a frame: FormatError",
    ),
    "Pong instead of Ready": _start(
        wire.Ready, on_control(wire.Pong(0)), "broke the protocol: unexpected Pong in state sealed"
    ),
    "/dev/null instead of a listener": Attack(
        wire.Listener,
        in_turn(with_descriptors(1, wire.Listener()), on_control(_READY)),
        "rtc: what it sent is no seccomp listener: Inappropriate ioctl for device",
    ),
    "a log without end instead of Ready": _start(
        wire.Ready,
        repeat(10**9, on_control(wire.Log(10, TEXT))),
        "broke the protocol: unexpected Log before it is sealed",
    ),
    # -- without a jail
    "closing the access channel": Attack(
        ACCESSED, close("access"), "rtc: it closed its access channel", guest="clock", options=_UNJAILED
    ),
    "closing the control channel": Attack(
        SERVING, close("control"), "rtc: closed its control channel", options=_UNJAILED
    ),
    "a crash": Attack(SERVING, _crash, "rtc: killed by SIGSEGV", options=_UNJAILED),
    # -- what harms nobody
    "a flood of unseen messages": _harmless(flood(on_control(wire.Log(10, TEXT)))),
    "a flood of messages": _harmless(flood(on_control(wire.Log(30, TEXT)))),
    "a flood of log lines": _harmless(flood(say(TEXT))),
    "a log line without end": _harmless(flood(lambda access, control: os.write(FD_LOG, TEXT.encode()))),
    FLOOD_OF_INTERRUPTS: Attack(
        ACCESSED, in_turn(on_access(wire.Value(0)), repeat(FLOOD // 4, interrupt_all)), None, "rng", "remote"
    ),
    "descriptors on the control channel": _harmless(
        repeat(100, with_descriptors(50, wire.Log(10, ""))), *_UNJAILED
    ),
    "descriptors on the access channel": _harmless(
        with_descriptors(50, wire.Value(0), access_channel=True), *_UNJAILED
    ),
}  # fmt: skip


def _arm(attack: Attack) -> None:
    """In the process of the victim: have it attack when its moment comes."""

    def strike(access: socket.socket, control: socket.socket) -> None:
        attack.act(access, control)
        silent(access, control)

    def serve(server: child.Server) -> None:
        strike(server._access, server._control.sock)

    def serve_accesses(server: child.Server) -> None:
        message = wire.decode(server._access.recv(wire.ACCESS_FRAME_MAX + 1))
        if isinstance(message, wire.Write) and (message.posted or attack.line is None):
            if not message.posted:  # where its BAR is, which the supervisor says before the guest runs
                server._access.send(wire.DONE_FRAME)
            return
        if attack.line is not None:
            strike(server._access, server._control.sock)
        child.Server._serve_accesses = serve_on  # type: ignore[method-assign]
        attack.act(server._access, server._control.sock)

    def init(server: child.Server, *args: object) -> None:
        Page.map()
        original_init(server, *args)  # type: ignore[arg-type]

    def serve_mailbox(server: child.Server) -> None:
        def struck(*request: int) -> int:
            strike(server._access, server._control.sock)
            return 0

        asked = "write" if attack.victim == "pci-host" else "read"  # what is waited for
        setattr(server.device, asked, struck)
        original_serve(server)

    def serve_on(server: child.Server) -> None:
        original_accesses(server)
        say(DONE)(server._access, server._control.sock)

    def frame(channel: Channel, message: wire.Message) -> bytes:
        if type(message) is attack.when:
            strike(channel.sock, channel.sock)
        return original_frame(channel, message)

    def load(*args: object) -> int:
        control = socket.socket(fileno=FD_CONTROL)
        strike(control, control)
        return 0

    original_accesses, original_frame = child.Server._serve_accesses, Channel.frame
    original_init, original_serve = child.Server.__init__, child.Server.serve
    if attack.transport == "mailbox":
        child.Server.__init__ = init  # type: ignore[method-assign]
        child.Server.serve = serve_mailbox  # type: ignore[method-assign]
    elif attack.when == SERVING:
        child.Server.serve = serve  # type: ignore[method-assign]
    elif attack.when == ACCESSED:
        child.Server._serve_accesses = serve_accesses  # type: ignore[method-assign]
    elif attack.when is wire.Listener:
        syscalls.seccomp_load = load  # while it still has every call
    else:
        Channel.frame = frame  # type: ignore[method-assign]


def main() -> None:
    attack = ATTACKS[sys.argv[1]]
    main_of_devices = child.main

    def main_of_a_device(ctx: object, model: object, name: str) -> None:
        if name == attack.victim:
            _arm(attack)
        main_of_devices(ctx, model, name)  # type: ignore[arg-type]

    child.main = main_of_a_device  # type: ignore[assignment]
    proxy._READY_WITHIN_S = READY_WITHIN_S  # type: ignore[misc]
    cli.main(sys.argv[2:])


if __name__ == "__main__":
    main()
