"""What a device process tried that its policy does not allow, as the supervisor learns it.

Spec: seccomp_unotify(2).  The call waits in the kernel until the supervisor has killed the process; it is
never answered, least of all with "continue" (except by supervisor/recorder.py, to a device that is being
watched on purpose).  If nobody listens any more, the call fails with ENOSYS.
"""

from __future__ import annotations

import errno
import fcntl
import select
import struct
from typing import Final

from devproc.record import record

_NOTIF_RECV: Final = 0xC050_2100  # _IOWR('!', 0, struct seccomp_notif)
_NOTIF: Final = struct.Struct("=QII iI Q 6Q")  # id, pid, flags; nr, arch; instruction pointer; args


@record
class Violation:
    """One refused system call: who, which (x86-64 number), from where, with what; `cookie` answers it."""

    cookie: int
    pid: int
    nr: int
    ip: int
    args: tuple[int, ...]


def read_violation(listener: int) -> Violation | None:
    """The violation waiting at `listener`, a descriptor that is readable; None when it is gone again.

    A listener that is at its end (the process is dead) is readable for ever and gives None: close it.

    Raises:
        OSError: it is no listener, whatever the device said when it sent it.
    """
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    # Before Linux 6.11 receiving from a listener at its end (POLLHUP alone) waits for ever.
    if not any(events & select.POLLIN for _, events in poll.poll(0)):
        return None
    buffer = bytearray(_NOTIF.size)  # the kernel wants it zeroed
    try:
        fcntl.ioctl(listener, _NOTIF_RECV, buffer)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.EINTR):
            return None
        raise
    cookie, pid, _, nr, _, ip, *args = _NOTIF.unpack(buffer)
    return Violation(cookie, pid, nr, ip, tuple(args))
