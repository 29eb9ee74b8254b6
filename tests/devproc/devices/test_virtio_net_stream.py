"""The network card on a stream: what `virtio_net` does, less what the stream has no header for."""

from __future__ import annotations

from typing import Any

from devproc.devices import virtio_net as net
from devproc.devices.virtio_net import HEADER
from devproc.virtio import spec

V1 = spec.F_VERSION_1
FRAME = b"\x02net\0\1" + b"\x02host\0" + b"\x08\0" + b"hello"


def test_a_stream_offers_no_offloads_and_one_pair_of_queues(bench: Any) -> None:
    driver = bench("virtio-net-stream", mtu=65520).driver()
    offered = driver.offered()
    assert not offered & (net.GUEST_OFFLOADS | net.F_CTRL_GUEST_OFFLOADS | net.F_CSUM | net.F_MQ)
    assert (
        offered & (net.F_MRG_RXBUF | net.F_CTRL_VQ | net.F_MTU) == net.F_MRG_RXBUF | net.F_CTRL_VQ | net.F_MTU
    )
    assert driver.get(spec.NUM_QUEUES, 2) == 3


def test_frames_go_both_ways(bench: Any) -> None:
    card = bench("virtio-net-stream")
    driver = card.driver()
    driver.start(V1 | net.F_MRG_RXBUF)
    card.pump()
    (cable,) = card.ports["link"]
    driver.queues[0].request(1526)
    driver.notify(0)
    cable.incoming.append(bytes(HEADER.size) + FRAME)
    cable.on_frame()
    assert driver.queues[0].used()[0].data[HEADER.size :] == FRAME
    driver.queues[1].request(bytes(HEADER.size) + FRAME)
    driver.notify(1)
    assert cable.sent == [bytes(HEADER.size) + FRAME]


def test_a_header_that_asks_for_a_checksum_is_never_sent(bench: Any) -> None:
    """Threat 1."""
    card = bench("virtio-net-stream")
    driver = card.driver()
    driver.start(V1)
    driver.queues[1].request(HEADER.pack(1, 0, 0, 0, 14, 0, 0) + FRAME)
    driver.notify(1)
    assert card.ports["link"][0].sent == []
    assert len(driver.queues[1].used()) == 1
