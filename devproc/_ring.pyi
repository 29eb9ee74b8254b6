"""The interface of _ring.c; what `Ring` does is said in virtio/chain.py, at `Queue`, but for `transfer`."""

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

    @property
    def position(self) -> int: ...
