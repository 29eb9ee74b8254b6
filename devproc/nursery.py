"""The zygote's own process: it forks every device process from what they share (ARCHITECTURE.md).

Spec: user_namespaces(7) for the id maps, unix(7) for SCM_RIGHTS, PR_SET_CHILD_SUBREAPER in prctl(2).

It is single-threaded, holds its socket and the standard descriptors, and has in memory the device models, but
nothing of a guest.  A request is a `wire.Spawn` with the device's descriptors.  The zygote forks a launcher,
which leaves the namespaces and forks the device; when the launcher is gone the device is a child of the
supervisor, and only then is it told to go on.  Left out: exec of a fresh interpreter per device, which would
give each its own address space layout.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, Protocol

from devproc import child, jail, syscalls
from devproc.catalog import CATALOG, FD_LOG, Entry, Params, shared_directory
from devproc.channel import FDS_MAX, Channel, ChannelClosed
from devproc.wire import SPAWN_TABLE, Failed, Sender, Spawn, Spawned
from devproc.zygote import Filters, SpawnError
from policies.compile import compile_notify
from policies.parse import load

_LAUNCH_S: Final = 10.0  # a launcher needs 3 ms; one that takes this long is stuck
_SOCKET: Final = 3  # where the zygote keeps the one descriptor it has
_FD_MAX: Final = 0xFFFF_FFFF
# SIGTERM too: a service manager sends it to every process at once, and the supervisor decides who ends when.
# SIGXFSZ, as SIGPIPE: the call fails, and that is enough.
_IGNORED: Final = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGPIPE,
    signal.SIGXFSZ,
)
# What a launcher and the zygote say to each other; a pid and an error text follow their word.
_MAP, _MAPPED, _PID, _ERROR, _GO = b"map", b"mapped", b"pid ", b"error ", b"go"


def compiled(entry: Entry) -> Filters:
    """The two programs of policies/NAME.policy.

    Raises:
        policies.errors.PolicyError: the policy is missing or wrong.
    """
    return compile_notify(load(entry.name, entry.slots()), jail.SETUP_CALLS)


class Program(Protocol):
    """What a device process runs: `devproc.child`, or what fuzzing has in its place."""

    EXTRA_FDS: int
    """Descriptors it is handed after those of the entry, to use and close before the jail."""

    def load(self, entry: Entry) -> type[Any]:
        """The model; raises what its import raises."""

    def main(self, ctx: jail.Context, model: type[Any], name: str) -> NoReturn:
        """The process, from the moment it is the supervisor's child."""


def main(
    fd: int,
    parent: int,
    kinds: Sequence[str],
    filters: Callable[[Entry], Filters],
    program: Program,
    mode: jail.Mode | None,
) -> NoReturn:
    """The zygote, from its fork on; `fd` is its channel, `parent` the supervisor's pid."""
    gc.freeze()  # as below: what is here is the supervisor's
    os.setsid()  # out of reach of the terminal's Ctrl-C and Ctrl-Z
    jail.die_with_parent()
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN if number in _IGNORED else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    jail.title("zygote")
    null = os.open(os.devnull, os.O_RDWR)
    for std in (0, 1):
        os.dup2(null, std)
    if fd != _SOCKET:
        os.dup2(fd, _SOCKET, inheritable=False)
    syscalls.close_range(_SOCKET + 1, _FD_MAX)
    cache = _prepare(kinds, filters, program)
    child.warm_up()
    gc.collect()
    # Objects that exist now are moved out of the collector's sight: it would write to their pages, and every
    # page written to is one a device process no longer shares (a third of the memory per device without it).
    gc.freeze()
    if mode is jail.Mode.FULL:
        jail.confine_zygote(any(shared_directory(CATALOG[kind]) is not None for kind in kinds))
    sock = socket.socket(fileno=_SOCKET)
    _serve(
        Channel(sock, SPAWN_TABLE, "idle", Sender.ZYGOTE, Sender.SUPERVISOR), filters, cache, program, mode
    )


def _prepare(
    kinds: Sequence[str], filters: Callable[[Entry], Filters], program: Program
) -> dict[str, Filters]:
    """Import the models of `kinds` and compile their filters, while the supervisor opens /dev/kvm.

    What fails here fails again, with its reason, when such a device is asked for.
    """
    cache = {}
    for kind in kinds:
        with contextlib.suppress(Exception):
            program.load(CATALOG[kind])
            cache[kind] = filters(CATALOG[kind])
    return cache


def _serve(
    channel: Channel,
    filters: Callable[[Entry], Filters],
    cache: dict[str, Filters],
    program: Program,
    mode: jail.Mode | None,
) -> NoReturn:
    while True:
        try:
            request, fds = channel.recv_fds(FDS_MAX)
        except ChannelClosed:
            os._exit(0)
        assert isinstance(request, Spawn)  # by the table
        try:
            if mode is not None and request.jail != mode.value:
                raise SpawnError(f"asked for jail mode {request.jail}, this zygote is for {mode.value}")
            channel.send(Spawned(_spawn(request, fds, filters, cache, program)))
        except (SpawnError, OSError) as e:
            channel.send(Failed(str(e)[:1000]))
        finally:
            for fd in fds:
                os.close(fd)


def _spawn(
    request: Spawn,
    fds: list[int],
    filters: Callable[[Entry], Filters],
    cache: dict[str, Filters],
    program: Program,
) -> int:
    try:
        entry = CATALOG[request.device]
        mode = jail.Mode(request.jail)
        params = entry.check_params(request.params)
        if mode is not jail.Mode.NONE and entry.name not in cache:
            cache[entry.name] = filters(entry)
    except Exception as e:  # a policy is text a user may edit: whatever is wrong with it is the answer
        raise SpawnError(f"{type(e).__name__}: {e}") from e
    expected = entry.held - FD_LOG + program.EXTRA_FDS
    if len(fds) != expected:
        raise SpawnError(f"{len(fds)} descriptors, expected {expected}")

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    launcher = os.fork()
    if launcher == 0:
        ours.close()
        os.close(_SOCKET)
        _launch(theirs, entry, mode, request.name, params, fds, cache.get(entry.name), program)
    theirs.close()
    with ours:
        ours.settimeout(_LAUNCH_S)
        try:
            pid = _watch_launcher(ours, launcher, _ids(entry, request.host_id, fds))
        except TimeoutError:
            os.kill(launcher, signal.SIGKILL)
            raise SpawnError(f"the launcher said nothing for {_LAUNCH_S:g} s") from None
        finally:
            # Only now is the device certain to be the supervisor's child.  An EOF from the launcher would not
            # say so: a process that exits closes its descriptors before it gives its children away.
            os.waitpid(launcher, 0)
        ours.send(_GO)
    return pid


def _ids(entry: Entry, host_id: int, fds: Sequence[int]) -> tuple[int, int]:
    """The uid and gid on the host to run as: what root shares is worked on with the rights of its owner."""
    shared = shared_directory(entry)
    if shared is not None and os.geteuid() == 0:
        owner = os.fstat(fds[shared - FD_LOG])
        return owner.st_uid, owner.st_gid
    return (host_id, host_id) if host_id else (os.geteuid(), os.getegid())


def _watch_launcher(link: socket.socket, launcher: int, ids: tuple[int, int]) -> int:
    """The device's pid, once the launcher has it."""
    while True:
        answer = link.recv(1100)
        if answer == _MAP:
            try:
                _map_ids(launcher, *ids)
            except OSError as e:
                link.send(struct.pack("=i", e.errno or 0))
            else:
                link.send(_MAPPED)
        elif answer.startswith(_PID):
            return int(answer.removeprefix(_PID))
        else:
            why = answer.removeprefix(_ERROR).decode(errors="replace")
            raise SpawnError(why or "the launcher died")


def _map_ids(pid: int, uid: int, gid: int) -> None:
    for name, text in (
        ("setgroups", "deny"),  # or a group that is there to take rights away could be dropped
        ("uid_map", f"{jail.INSIDE_ID} {uid} 1"),
        ("gid_map", f"{jail.INSIDE_ID} {gid} 1"),
    ):
        with open(f"/proc/{pid}/{name}", "w") as f:
            f.write(text)


def _launch(
    link: socket.socket,
    entry: Entry,
    mode: jail.Mode,
    name: str,
    params: Params,
    fds: list[int],
    filters: Filters | None,
    program: Program,
) -> NoReturn:
    """The launcher, and as its child the device."""

    def map_ids() -> None:
        link.send(_MAP)
        answer = link.recv(16)
        if answer != _MAPPED:
            err = struct.unpack("=i", answer)[0]
            raise OSError(err, f"mapping the ids: {os.strerror(err)}")

    try:
        model = program.load(entry)  # with the caller's ids, which can read it; the device's own may not
        ctx = jail.Context(entry, mode, fds, filters, map_ids, params)
        jail.enter(jail.plan(mode, "launcher", entry.without), ctx)
        pid = os.fork()
        if pid == 0:
            go = link.recv(len(_GO)) == _GO
            link.close()
            if go:
                program.main(ctx, model, name)
            os._exit(0)
        link.send(_PID + str(pid).encode())
    except BaseException as e:
        link.send(_ERROR + f"{e if isinstance(e, jail.JailError) else repr(e)}"[:1000].encode())
    finally:
        os._exit(0)
