"""What the drivers of virtio devices put into their queues: where mutation begins (virtio 1.2, section 5)."""

from __future__ import annotations

from itertools import product
from struct import pack
from typing import Final, NamedTuple


class Shape(NamedTuple):
    """A chain: what is read, `sizes` of two elements to read and two to write; for `queue`, or for each."""

    data: bytes
    sizes: tuple[int, int, int, int]
    queue: int | None = None


SHAPES: Final = (Shape(b"", (0, 0, 64, 0)), Shape(b"some bytes", (10, 0, 0, 0)), Shape(b"", (0, 0, 1, 2000)))
_HEADER: Final = bytes(12)  # virtio_net_hdr, 5.1.6
_ETHERNET: Final = b"\xff" * 6 + b"\x02net\0\1" + b"\x08\x06" + bytes(46)

SHAPES_OF: Final[dict[str, tuple[Shape, ...]]] = {
    # 5.2.6: type, reserved, sector; data (zeros, where nothing is said); status
    "virtio-blk": (
        *(Shape(pack("<IIQ", 0, 0, at), (16, 0, 512, 1)) for at in (0, 127, 128, 1 << 55)),
        Shape(pack("<IIQ", 0, 0, 3), (16, 0, 1025, 0)),
        *(Shape(pack("<IIQ", 1, 0, at), (16, 512, 1, 0)) for at in (0, 127, 128)),
        Shape(pack("<IIQ", 4, 0, 0), (16, 0, 1, 0)),
        Shape(pack("<IIQ", 8, 0, 0), (16, 0, 20, 1)),
        *(
            Shape(pack("<IIQ", kind, 0, 0) + pack("<QII", at, count, flags), (16, 16, 1, 0))
            for kind, at, count, flags in product((11, 13), (0, 120), (1, 8, 9), (0, 1, 2))
        ),
        Shape(pack("<IIQ", 99, 0, 0), (16, 0, 1, 0)),
    ),
    # 5.1.6, and the commands of 5.1.6.5
    "virtio-net": tuple(
        [Shape(b"", (0, 0, 1526, 0), queue) for queue in (0, 2)]
        + [Shape(_HEADER + _ETHERNET, (12, 60, 0, 0), queue) for queue in (1, 3)]
        + [
            Shape(pack("<BB", group, command) + more, (2, len(more), 1, 0), queue)
            for queue in (2, 8)
            for group, command, more in (
                (0, 0, b"\1"), (1, 0, pack("<II", 0, 0)), (1, 1, _ETHERNET[6:12]), (2, 0, b"\5\0"),
                (3, 0, b"\0\0\0\0"), (4, 0, b"\1\0"), (4, 0, b"\xff\xff"), (5, 0, bytes(8)),
            )
        ]
    ),
    # 5.3.6.2: port, event, value
    "virtio-console": tuple(
        Shape(pack("<IHH", port, event, value), (8, 0, 0, 0), 3)
        for port, event, value in product((0, 1, 3, 4), (0, 3, 6), (0, 1))
    ),
    # 5.5.6: page numbers; statistics as tag, value
    "virtio-balloon": (
        *(Shape(pack("<II", *pages), (8, 0, 0, 0)) for pages in product((1, 64), (2, 1 << 31))),
        *(Shape(pack("<HQ", tag, 1 << 20), (10, 0, 0, 0), 2) for tag in (0, 4, 99)),
        Shape(pack("<I", 1), (4, 0, 0, 0)),
    ),
}  # fmt: skip
SHAPES_OF["virtio-net-stream"] = SHAPES_OF["virtio-net"]
