"""What a device process waits for: requests in its mailbox (kvmcore/_mailbox.h), and descriptors.

Left out: the frames of devproc/wire.py, whose fields stand in the page as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from devproc._mailbox import End
from devproc.ports import Clock, Device, Watched
from devproc.wire import PeerError


class Mailbox:
    """For one thread.

    Args:
        page: the memfd; mapped, and not needed afterwards.
        bell: the eventfd that wakes us; non-blocking.
        sizes: of the register spaces that there are.
        channels: descriptors that are always waited for.
        watched: waited for as long as they want it.
        device: who answers.
        clock: for its deadline.

    Raises:
        OSError: the page cannot be mapped.
    """

    def __init__(
        self,
        page: int,
        bell: int,
        sizes: Mapping[int, int],
        channels: Sequence[int],
        watched: Sequence[Watched],
        device: Device,
        clock: Clock,
    ) -> None:
        # What a class has left as it is in the base need not be asked for after each access.
        asked = tuple((w.fd, w, _has(w, "wants_read"), _has(w, "wants_write")) for w in watched)
        # A recorder has none, and what it hands on to is not to be asked: it is to see each write.
        writes = device.writes if hasattr(type(device), "writes") else None
        shadows = tuple(device.shadows.items())
        self._end = End(page, bell, dict(sizes), tuple(channels), asked, device, clock, writes, shadows)
        self._channels = {fd: n for n, fd in enumerate(channels)}

    def serve(self) -> bool:
        """Have the device answer requests, until a descriptor is ready or its deadline may have passed.

        Returns whether a request came then, too, which it has answered.  The page has the shadows only until
        this returns: what the device does next no request asks for.

        Raises:
            PeerError: one is for no register.
            OverflowError: the model's value does not fit.
        """
        busy = self._end.serve()
        if busy is None:
            raise PeerError("a request for no register")
        return busy

    def wait(self, timeout_ns: int | None) -> bool:
        """Until there is a request, the timeout is over, or, which is true, a descriptor is ready."""
        return self._end.wait(timeout_ns)

    def is_readable(self, channel: int) -> bool:
        """Whether there was something to read there."""
        return self._end.is_readable(self._channels[channel])

    def ready(self) -> list[tuple[Watched, bool, bool]]:
        """The watched that were ready, each with whether it is to be read, and written."""
        return self._end.ready()


def _has(watched: Watched, name: str) -> bool:
    return getattr(type(watched), name) is not getattr(Watched, name)
