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
import importlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn, Protocol

from devproc import child, jail, syscalls
from devproc.catalog import CATALOG, FD_LOG, Entry, Params, shared_directory
from devproc.channel import FDS_MAX, Channel, ChannelClosed
from devproc.wire import SPAWN_TABLE, TEXT_MAX, Prepare, Sender, Spawn, Spawned
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
    filters: Callable[[Entry], Filters],
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
    channel = Channel(socket.socket(fileno=_SOCKET), SPAWN_TABLE, "start", Sender.ZYGOTE, Sender.SUPERVISOR)
    try:
        wanted = channel.recv()
    except ChannelClosed:
        os._exit(0)
    assert isinstance(wanted, Prepare)  # by the table
    mode = jail.Mode(wanted.jail) if wanted.jail else None
    program: Any = importlib.import_module(wanted.program)
    cache = _prepare(wanted.kinds, filters, program)
    child.warm_up()
    gc.collect()
    # Objects that exist now are moved out of the collector's sight: it would write to their pages, and every
    # page written to is one a device process no longer shares (a third of the memory per device without it).
    gc.freeze()
    gc.enable()
    if mode is jail.Mode.FULL:
        jail.confine_zygote(any(shared_directory(CATALOG[kind]) is not None for kind in wanted.kinds))
    _serve(channel, filters, cache, program, mode)


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
    asked: list[_Asked] = []
    while True:
        try:
            message, fds = channel.recv_fds(FDS_MAX)
        except ChannelClosed:
            os._exit(0)
        if isinstance(message, Spawn):
            asked.append(_Asked(message, fds, filters, cache, program, mode))
            continue
        # One after the other with nothing in between: see `syscalls.clone`.
        mine = jail.fork([one.ctx for one in asked if one.ctx is not None])
        for one in asked:
            if mine is not None and one.ctx is mine:
                program.main(mine, one.model, one.name)
        channel.send(Spawned(tuple(one.finish() for one in asked)))
        asked.clear()


class _Asked:
    """A process that was asked for.

    Attributes:
        name, model: what it runs.
        ctx: what it starts with; None if there cannot be such a process.
    """

    def __init__(
        self,
        request: Spawn,
        fds: list[int],
        filters: Callable[[Entry], Filters],
        cache: dict[str, Filters],
        program: Program,
        mode: jail.Mode | None,
    ) -> None:
        self.name = request.name
        self.ctx: jail.Context | None = None
        self._host_id = request.host_id
        self._open = fds
        self._failed = ""
        try:
            if mode is not None and request.jail != mode.value:
                raise SpawnError(f"asked for jail mode {request.jail}, this zygote is for {mode.value}")
            entry, params, self.model = _check(request, filters, cache, program)
            expected = entry.held - FD_LOG + program.EXTRA_FDS
            if len(fds) != expected:
                raise SpawnError(f"{len(fds)} descriptors, expected {expected}")
            ids, self._told = os.pipe()
            self._open = [*fds, ids, self._told]
            self.ctx = jail.Context(entry, jail.Mode(request.jail), fds, cache.get(entry.name), ids, params)
        except (SpawnError, OSError) as e:
            self._failed = str(e)

    def finish(self) -> int | str:
        """Give the process its ids, and close what is its own; its pid, or why there is none."""
        try:
            if self.ctx is None:
                return self._failed[:TEXT_MAX]
            if self.ctx.pid is None:
                return str(self.ctx.failed)[:TEXT_MAX]
            error = 0
            if self.ctx.namespaced:
                error = _map_ids(self.ctx.pid, self.ctx.entry, self._host_id, self.ctx.fds)
            os.write(self._told, jail.IDS.pack(error))
            return self.ctx.pid
        finally:
            for fd in self._open:
                os.close(fd)


def _check(
    request: Spawn, filters: Callable[[Entry], Filters], cache: dict[str, Filters], program: Program
) -> tuple[Entry, Params, type[Any]]:
    """What is asked for, and its model; its filters are in `cache` then.

    Raises:
        SpawnError: there is no such device.
    """
    try:
        entry = CATALOG[request.device]
        params = entry.check_params(request.params)
        model = program.load(entry)
        if request.jail != jail.Mode.NONE.value and entry.name not in cache:
            cache[entry.name] = filters(entry)
    except Exception as e:  # a policy is text a user may edit: whatever is wrong with it is the answer
        raise SpawnError(f"{type(e).__name__}: {e}") from e
    return entry, params, model


def _map_ids(pid: int, entry: Entry, host_id: int, fds: Sequence[int]) -> int:
    """Map the ids of a process, which it cannot do itself to any but the zygote's; 0 or an error number."""
    try:
        uid, gid = (host_id, host_id) if host_id else (os.geteuid(), os.getegid())
        shared = shared_directory(entry)
        if shared is not None and os.geteuid() == 0:  # it works on what root shares with its owner's rights
            owner = os.fstat(fds[shared - FD_LOG])
            uid, gid = owner.st_uid, owner.st_gid
        for name, text in (
            ("setgroups", b"deny"),  # or a group that is there to take rights away could be dropped
            ("uid_map", b"%d %d 1" % (jail.INSIDE_ID, uid)),
            ("gid_map", b"%d %d 1" % (jail.INSIDE_ID, gid)),
        ):
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY)
            try:
                os.write(fd, text)
            finally:
                os.close(fd)
    except OSError as e:
        return e.errno or errno.EIO
    return 0
