"""The interface of _ring.c; what `Ring` does is said in virtio/chain.py, at `Queue`, but for many at once."""

from collections.abc import Sequence

from devproc.virtio.chain import Chain, ChainError, Span

class Ring:
    def __new__(
        cls,
        regions: tuple[tuple[int, memoryview], ...],
        areas: Sequence[tuple[int, int]],
        size: int,
        indirect: bool,
        event_idx: bool,
        position: int,
        classes: tuple[type[Chain], type[Span], type[ChainError]],
    ) -> Ring: ...
    @property
    def size(self) -> int: ...
    def pop(self) -> Chain | None: ...
    def unpop(self, chain: Chain) -> None: ...
    def push(self, chain: Chain, written: int) -> None: ...
    def push_together(self, used: Sequence[tuple[Chain, int]]) -> None: ...
    def wants_interrupt(self) -> bool: ...
    def transfer(self, fd: int, size: int, writable: bool, left: int, least: int) -> tuple[int, int, int]:
        """Serve plain reads and writes of a disk of `size` bytes: (what is left, reads, writes).

        As many as there are before the first other chain, until `left` bytes were moved; each counts as
        `least` bytes at least.
        """

    def send(self, fd: int, features: int, most: int) -> int:
        """Send the frames of a network card to the tap `fd`, `most` of them: how many.

        Until one is not plain, or the tap does not take it; that one stays in the ring.
        """

    def receive(
        self,
        fd: int,
        head: bytearray,
        tail: bytearray,
        mac: bytes,
        promisc: bool,
        allmulti: bool,
        offloads: int,
        size_max: int,
        most: int,
    ) -> tuple[int, bool, bool, int, int, tuple[Chain, ...]]:
        """Receive `most` frames of the tap `fd` for a driver that merges buffers, as long as they are plain.

        A frame without segments is plain up to `size_max` bytes.  `offloads` are features of what the host
        may leave to the driver.  Returns how many were received; whether the driver must give more buffers
        before the next one; whether the next has to wait for something else that is not plain; and, of a
        frame that was read and is not plain itself, otherwise 0: its size with header, `head` being the
        beginning; how many bytes the chains have after that, `tail` being the rest; and the chains, now out.
        """

    @property
    def position(self) -> int: ...
