"""Memory that the guest can spare goes back to the host (virtio 1.2, section 5.5, the traditional balloon).

Left out: VIRTIO_BALLOON_F_MUST_TELL_HOST, because a page that the guest takes back is there when it is
touched; VIRTIO_BALLOON_F_FREE_PAGE_HINT, which serves migration; VIRTIO_BALLOON_F_PAGE_POISON, without which
a driver whose free pages have to keep their bytes does not report them (5.5.3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import Annotated, Any, Final

from devproc import state
from devproc.catalog import BALLOON
from devproc.record import record
from devproc.regs import Register
from devproc.state import U64, Length, Range
from devproc.virtio.chain import Chain
from devproc.virtio.device import TransportState, VirtioDevice, virtio_tables

F_STATS_VQ, F_DEFLATE_ON_OOM, F_PAGE_REPORTING = 1 << 1, 1 << 2, 1 << 5
INFLATE, DEFLATE, STATS, FREE_PAGE, REPORTING = range(5)
# Linux numbers the queues that it uses without gaps, so that without free page hints it reports on queue 3.
NEEDS: Final = {STATS: F_STATS_VQ, FREE_PAGE: F_PAGE_REPORTING, REPORTING: F_PAGE_REPORTING}
PAGE_SIZE: Final = 4096  # 5.5.6: whatever the guest's own is
PAGES_PER_MIB: Final = (1 << 20) // PAGE_SIZE
PFN_SIZE: Final = 4
PFNS_MAX: Final = 4096  # in one buffer; Linux sends 256
STAT: Final = Struct("<HQ")
STATS_MAX: Final = 64  # entries of a buffer that are looked at
STATISTICS: Final = (  # 5.5.6.4, by tag
    "swap_in_bytes",
    "swap_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "cache_bytes",
    "huge_pages_allocated",
    "huge_pages_refused",
)


@record
class VirtioBalloonState:
    transport: TransportState
    target_pages: Annotated[int, Range(0, (1 << 32) - 1)]
    statistics: Annotated[tuple[U64 | None, ...], Length(len(STATISTICS), len(STATISTICS))]


class VirtioBalloon(VirtioDevice):
    """Queues of pages to give back, of pages taken again, of statistics, and of free pages.

    Settings:
        target_mib: how much the balloon should hold.
        refresh: ask the driver for new statistics; the count `updates` grows when they have come.

    Threats:
        1. A page that is not RAM → nothing is given back, counted.
        2. More page numbers in a buffer than any driver sends → DEVICE_NEEDS_RESET.
        3. The same page many times, in any order, or one in use (a ring, the kernel) → it reads as zeros, as
           the guest asked; nothing outside of guest memory is touched.
        4. Free pages reported that are not whole → the whole pages among them are given back.
        5. Buffers without end, each costly → one at a time; accesses get their turn between.
        6. Statistics of odd length, with unknown tags, or more than one buffer of them → what is known is
           taken, the buffer before goes back.
        7. A queue is used whose feature was not accepted → it is not looked at.
    """

    VIRTIO = BALLOON
    TABLES = virtio_tables(
        BALLOON,
        (
            Register("num_pages", 0, "RO", "pages the balloon should hold", "5.5.4", size=4),
            Register(
                "actual", 4, "RW", "pages it holds", "5.5.4", size=4, mask=0xFFFF_FFFF, stored=True
            ),
        ),
    )  # fmt: skip

    def __init__(self, **transport: Any) -> None:
        super().__init__(features=F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_REPORTING, **transport)
        self._target_pages = 0
        self._statistics: dict[int, int] = {}
        self._asking: Chain | None = None  # given back to the driver, it asks for new statistics
        self._counts |= {
            "inflated_pages": 0,
            "deflated_pages": 0,
            "refused_pages": 0,
            "reported_bytes": 0,
            "updates": 0,
        }

    def set(self, name: str, value: int) -> None:
        match name:
            case "target_mib":
                self._target_pages = min(value * PAGES_PER_MIB, self.memory.size // PAGE_SIZE)
                self.config_changed()
            case "refresh":
                self._give_back_statistics()

    def read_num_pages(self) -> int:
        return self._target_pages

    def on_reset(self) -> None:
        self.stored["actual"] = 0
        self._asking = None
        self._statistics.clear()

    def on_queue(self, index: int) -> None:
        if NEEDS.get(index, 0) & ~self.features:
            return
        if index == STATS:
            for chain in self.chains(STATS):
                self._give_back_statistics()
                self._take_statistics(chain)
            return
        for chain in self.chains(index, limit=1):
            if index in (INFLATE, DEFLATE):
                self._take_pages(index, chain)
            else:
                self._take_reported(chain)
            self.push(index, chain, 0)
        self.notify(index)

    # -- pages

    def _take_pages(self, index: int, chain: Chain) -> None:
        if chain.read_size > PFNS_MAX * PFN_SIZE:
            self.fail(
                f"queue {index}: {chain.read_size} bytes of page numbers, at most {PFNS_MAX * PFN_SIZE}"
            )
            return
        data = self.memory.copy_out(chain.readable, chain.read_size // PFN_SIZE * PFN_SIZE)
        for first, count in _runs(memoryview(data).cast("I").tolist()):
            gpa, size = first * PAGE_SIZE, count * PAGE_SIZE
            if not self.memory.holds(gpa, size):
                self._counts["refused_pages"] += count
            elif index == DEFLATE:
                self._counts["deflated_pages"] += count
            else:
                self.memory.discard(gpa, size)
                self._counts["inflated_pages"] += count

    def _take_reported(self, chain: Chain) -> None:
        for gpa, size in chain.writable:
            first = -(-gpa // PAGE_SIZE) * PAGE_SIZE
            whole = (gpa + size) // PAGE_SIZE * PAGE_SIZE - first
            if whole > 0:
                self.memory.discard(first, whole)
                self._counts["reported_bytes"] += whole

    # -- statistics

    def _take_statistics(self, chain: Chain) -> None:
        data = self.memory.copy_out(chain.readable, STATS_MAX * STAT.size)
        whole = memoryview(data)[: len(data) // STAT.size * STAT.size]
        self._statistics = {tag: value for tag, value in STAT.iter_unpack(whole) if tag < len(STATISTICS)}
        self._counts["updates"] += 1
        self._asking = chain

    def _give_back_statistics(self) -> None:
        if self._asking is not None:
            self.push(STATS, self._asking, 0)
            self._asking = None
            self.notify(STATS)

    # -- state

    def save(self) -> bytes:
        queue = self.queues[STATS]
        if queue is not None and self._asking is not None:
            queue.unpop(self._asking)
            self._asking = None
            self.go_on(STATS)
        statistics = tuple(self._statistics.get(tag) for tag in range(len(STATISTICS)))
        return state.pack(VirtioBalloonState(self.save_transport(), self._target_pages, statistics))

    def restore(self, data: bytes) -> None:
        s = state.unpack(VirtioBalloonState, data)
        self.restore_transport(s.transport)
        self._target_pages = s.target_pages
        self._statistics = {tag: value for tag, value in enumerate(s.statistics) if value is not None}
        self._asking = None

    def counters(self) -> dict[str, int]:
        return {
            **super().counters(),
            **self._counts,
            "target_mib": self._target_pages // PAGES_PER_MIB,
            "actual_mib": self.stored["actual"] // PAGES_PER_MIB,
            **{STATISTICS[tag]: value for tag, value in self._statistics.items()},
        }


def _runs(pfns: list[int]) -> Iterator[tuple[int, int]]:
    """The page numbers in order, each once, as (first, count) of those that follow each other."""
    first = count = 0
    for pfn in sorted(set(pfns)):
        if pfn == first + count and count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = pfn, 1
    if count:
        yield first, count
