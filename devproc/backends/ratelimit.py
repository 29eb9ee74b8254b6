"""A token bucket: how much of something a device may do in a second, and when it may go on.

It is a schedule and no counter (ITU-T I.371, the generic cell rate algorithm in its virtual scheduling
form): whole nanoseconds, no drift, nothing to refill.
"""

from __future__ import annotations

from typing import Final

_NS: Final = 10**9
_BURST_NS: Final = _NS // 10  # what an idle device may do at once: a tenth of a second's worth


class Bucket:
    """At most `rate` units a second, 0 for no limit.

    One that is not empty lets a single take of any size through and is then in debt: who takes need not
    know the size beforehand, and a take that is larger than the bucket does not wait for ever.
    """

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._paid_ns = 0  # when what was taken is paid for

    @property
    def ready_ns(self) -> int:
        """The monotonic time from which something may be taken."""
        return self._paid_ns - _BURST_NS

    def take(self, now_ns: int, units: int) -> None:
        """Charge `units` to the bucket."""
        if self._rate:
            self._paid_ns = max(self._paid_ns, now_ns) + -(-units * _NS // self._rate)


class RateLimit:
    """Two buckets for an operation and its bytes, `bps` bytes and `iops` operations a second.

    Attributes:
        ready_ns: the monotonic time from which the next operation may begin.
    """

    def __init__(self, bps: int, iops: int) -> None:
        self._bytes = Bucket(bps)
        self._operations = Bucket(iops)
        self._any = bool(bps or iops)
        self.ready_ns = -_BURST_NS

    def take(self, now_ns: int, size: int) -> None:
        """Charge one operation of `size` bytes."""
        if self._any:  # most devices have no limit, and this is asked twice for each request
            self._bytes.take(now_ns, size)
            self._operations.take(now_ns, 1)
            self.ready_ns = max(self._bytes.ready_ns, self._operations.ready_ns)
