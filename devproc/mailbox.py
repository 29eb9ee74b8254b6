"""What a device process waits for: requests in its mailbox (kvmcore/_mailbox.h), and descriptors.

Left out: the frames of devproc/wire.py, whose fields stand in the page as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from select import POLLERR, POLLHUP, POLLIN, POLLNVAL, POLLOUT
from typing import Final

from devproc._mailbox import End
from devproc.ports import Device, Watched
from devproc.wire import PeerError

_FAILED: Final = POLLHUP | POLLERR | POLLNVAL  # found out by trying, whether to read or to write


class Mailbox:
    """For one thread.

    Args:
        page: the memfd; mapped, and not needed afterwards.
        bell: the eventfd that wakes us; non-blocking.
        sizes: of the register spaces that there are.
        channels: descriptors that are always waited for.
        watched: waited for as long as they want it.
        shadows: the device's, as `ports.Device` has them.

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
        shadows: Mapping[int, Callable[[], int | None]],
    ) -> None:
        slots = len(channels) + len(watched)
        self._end = End(page, bell, dict(sizes), slots, tuple(shadows.items()))
        self._channels = {fd: slot for slot, fd in enumerate(channels)}
        for fd, slot in self._channels.items():
            self._end.watch(slot, fd, POLLIN)
        self._watched = list(enumerate(watched, len(channels)))
        self._wants = [0] * (len(channels) + len(watched))

    def serve(self, device: Device, most: int) -> int:
        """Have `device` answer up to `most` requests; returns how many there were.

        Shadows are made right after the last one.

        Raises:
            PeerError: one is for no register.
            OverflowError: the model's value does not fit.
        """
        served = self._end.serve(device.read, device.write, most)
        if served is None:
            raise PeerError("a request for no register")
        return served

    def hide(self) -> None:
        """Take the shadows back, before the device does what no request asks for; `wait` has them again."""
        self._end.hide()

    def wait(self, timeout_ns: int | None) -> bool:
        """Until there is a request, the timeout is over, or, which is true, a descriptor is ready."""
        wants = self._wants
        for slot, w in self._watched:
            events = (POLLIN if w.wants_read else 0) | (POLLOUT if w.wants_write else 0)
            if events != wants[slot]:
                wants[slot] = events
                self._end.watch(slot, w.fd, events)
        return self._end.wait(timeout_ns)

    def is_readable(self, channel: int) -> bool:
        """Whether the last `wait` found something to read there."""
        return bool(self._end.ready(self._channels[channel]))

    def ready(self) -> Iterator[tuple[Watched, bool, bool]]:
        """The watched that the last `wait` found ready, each with whether it is to be read, and written."""
        for slot, w in self._watched:
            if found := self._end.ready(slot):
                wanted = self._wants[slot] if found & _FAILED else self._wants[slot] & found
                yield w, bool(wanted & POLLIN), bool(wanted & POLLOUT)
