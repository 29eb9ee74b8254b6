"""Layers that cannot be seen in /proc, each alone in a process: what it refuses, nothing else does."""

from __future__ import annotations

import errno
import mmap
import os
import socket
from collections.abc import Callable

import pytest

from devproc.catalog import CATALOG
from devproc.jail import Context, Mode, NotOffered, plan

STEPS = {s.name: s for s in plan(Mode.FULL)}
NOT_OFFERED, NOT_REFUSED = 253, 254


def errno_after(steps: tuple[str, ...], attempt: Callable[[], object]) -> int:
    """The errno `attempt` gets in a process that has taken `steps`."""
    pid = os.fork()
    if pid == 0:
        result = 255
        try:
            ctx = Context(CATALOG["rtc"], Mode.FULL, [], None, lambda: None)
            for name in steps:
                STEPS[name].apply(ctx)
            attempt()
            result = NOT_REFUSED
        except NotOffered:
            result = NOT_OFFERED
        except OSError as e:
            result = e.errno or 255
        finally:
            os._exit(result)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == NOT_OFFERED:
        pytest.skip(f"{steps[-1]} is not offered by this kernel")
    return code


def open_root() -> None:
    os.open("/", os.O_RDONLY)


def executable() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


def many_descriptors() -> None:
    for _ in range(512):
        os.dup(2)


def much_memory() -> None:
    mmap.mmap(-1, 128 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def big_file() -> None:
    os.write(FILE, b"x")


FILE = os.memfd_create("file")


@pytest.mark.parametrize(
    ("steps", "attempt", "expected"),
    [
        (("no-gain", "landlock"), open_root, errno.EACCES),
        (("memory",), executable, errno.EACCES),
        (("limits",), many_descriptors, errno.EMFILE),
        (("limits",), much_memory, errno.ENOMEM),
        (("limits",), big_file, errno.EFBIG),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, tuple) else getattr(v, "__name__", errno.errorcode.get(v, "")),
)
def test_a_layer_alone_refuses(steps: tuple[str, ...], attempt: Callable[[], object], expected: int) -> None:
    assert errno_after((), attempt) == NOT_REFUSED, "vacuous: it does not succeed without the layer either"
    assert errno_after(steps, attempt) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to hold a capability at first")
def test_without_capabilities_a_privileged_call_is_refused() -> None:
    def bind() -> None:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)

    assert errno_after((), bind) == NOT_REFUSED
    assert errno_after(("capabilities",), bind) == errno.EPERM
