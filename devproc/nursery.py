"""The zygote's own process: it forks every device process from what they share (ARCHITECTURE.md).

Spec: user_namespaces(7) for the id maps, unix(7) for SCM_RIGHTS, CLONE_PARENT in clone(2).

It is single-threaded, holds its socket and the standard descriptors, and has in memory the device models, but
nothing of a guest.  A request is a `wire.Spawn` with the device's descriptors.  The zygote makes the process
by one clone(2), in its namespaces from the first and a child of the supervisor, and maps its ids, which the
process waits for.  Left out: exec of a fresh interpreter per device, which would give each its own address
space layout.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, Protocol

from devproc import child, jail, syscalls
from devproc.catalog import CATALOG, FD_CONTROL, FD_LOG, Entry, shared_directory
from devproc.channel import FDS_MAX, Channel, ChannelClosed
from devproc.wire import SPAWN_TABLE, TEXT_MAX, Failed, Sender, Spawn, Spawned, encode
from devproc.zygote import Filters, SpawnError
from policies.compile import compile_notify
from policies.parse import load

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
_ERRNO: Final = struct.Struct("=i")  # what the zygote tells a device: whether its ids are mapped


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
    gc.disable()  # what is imported stays, so looking for what does not is a waste
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
    gc.enable()
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
        model = program.load(entry)
        if mode is not jail.Mode.NONE and entry.name not in cache:
            cache[entry.name] = filters(entry)
    except Exception as e:  # a policy is text a user may edit: whatever is wrong with it is the answer
        raise SpawnError(f"{type(e).__name__}: {e}") from e
    expected = entry.held - FD_LOG + program.EXTRA_FDS
    if len(fds) != expected:
        raise SpawnError(f"{len(fds)} descriptors, expected {expected}")

    mapped, told = os.pipe()

    def await_ids() -> None:
        os.close(told)
        word = os.read(mapped, _ERRNO.size)
        err = _ERRNO.unpack(word)[0] if word else errno.ESRCH  # the zygote is gone
        if err:
            raise OSError(err, f"mapping the ids: {os.strerror(err)}")

    ctx = jail.Context(entry, mode, fds, cache.get(entry.name), await_ids, params)
    try:
        pid = jail.fork(ctx)
        if pid == 0:
            program.main(ctx, model, request.name)
        ids = _ids(entry, request.host_id, fds)
        os.write(told, _ERRNO.pack(_map_ids(pid, *ids) if ctx.namespaced else 0))
    except BaseException as e:
        if ctx.pid == 0:
            _give_up(fds[FD_CONTROL - FD_LOG], e)
        if isinstance(e, jail.JailError):
            raise SpawnError(str(e)) from e
        raise
    finally:
        os.close(mapped)
        os.close(told)
    return pid


def _give_up(control: int, why: BaseException) -> NoReturn:
    """In a device process that cannot even begin."""
    try:
        socket.socket(fileno=control).send(encode(Failed(str(why)[:TEXT_MAX])))
    finally:
        os._exit(1)


def _ids(entry: Entry, host_id: int, fds: Sequence[int]) -> tuple[int, int]:
    """The uid and gid on the host to run as: what root shares is worked on with the rights of its owner."""
    shared = shared_directory(entry)
    if shared is not None and os.geteuid() == 0:
        owner = os.fstat(fds[shared - FD_LOG])
        return owner.st_uid, owner.st_gid
    return (host_id, host_id) if host_id else (os.geteuid(), os.getegid())


def _map_ids(pid: int, uid: int, gid: int) -> int:
    """Map the ids of a process, which it cannot do itself to any but the zygote's; 0 or an error number."""
    try:
        for name, text in (
            ("setgroups", "deny"),  # or a group that is there to take rights away could be dropped
            ("uid_map", f"{jail.INSIDE_ID} {uid} 1"),
            ("gid_map", f"{jail.INSIDE_ID} {gid} 1"),
        ):
            with open(f"/proc/{pid}/{name}", "w") as f:
                f.write(text)
    except OSError as e:
        return e.errno or 0
    return 0
