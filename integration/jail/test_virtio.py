"""A virtio device in its full jail serves real rings in the memory that it shares with its guest."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from devproc.catalog import VSOCK_LINES
from devproc.devices import virtio_blk as blk
from devproc.devices import virtio_console as console
from devproc.devices.virtio_blk import Type
from devproc.virtio import spec
from integration.ordinary import let_in

V1 = spec.F_VERSION_1
MEMORY = 16 << 20, 0
IMAGE_SIZE = 1 << 20
EVERY_RING = spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED


def host_id(supervisor: Any) -> int:
    return 2_000_002 if supervisor.who == "root" else 0


def header(kind: Type, sector: int = 0) -> bytes:
    return blk.HEADER.pack(kind, 0, sector)


def qemu_img(*args: str | Path) -> None:
    done = subprocess.run(["qemu-img", *map(str, args)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{args}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("features", [V1, V1 | EVERY_RING], ids=["split", "packed"])
def test_a_jailed_rng_fills_buffers_by_kick_and_interrupt(supervisor: Any, features: int) -> None:
    supervisor("spawn", "virtio-rng", "rng", host_id=host_id(supervisor))
    answers = supervisor("converse", "rng", features, [(64,)] * 300)
    assert len(answers) == len(set(answers)) == 300
    assert {len(a) for a in answers} == {64}
    assert supervisor("ask_ping", "rng") == 7
    assert supervisor("stop", "rng") == (os.CLD_EXITED, 0)


@pytest.mark.parametrize("features", [V1, V1 | EVERY_RING], ids=["split", "packed"])
def test_a_jailed_disk_does_everything_its_policy_is_for(supervisor: Any, features: int) -> None:
    packed = int(bool(features & spec.F_RING_PACKED))
    params = (*MEMORY, 0, 1, 512, 1, 0, 0, b"jailed", 0, 0, packed, IMAGE_SIZE)
    supervisor("spawn", "virtio-blk", "blk", params=params, host_id=host_id(supervisor))
    data = os.urandom(8192)
    zeroes = blk.RANGE.pack(8, 1, 0)
    unmapped = blk.RANGE.pack(0, 8, blk.UNMAP)
    discarded = blk.RANGE.pack(1024, 1024, 0)
    answers = supervisor(
        "converse",
        "blk",
        features | blk.F_FLUSH | blk.F_DISCARD | blk.F_WRITE_ZEROES,
        [
            (header(Type.OUT), data, 1),
            (header(Type.FLUSH), 1),
            (header(Type.IN, 4), 512, 1),
            (header(Type.WRITE_ZEROES), zeroes, 1),
            (header(Type.WRITE_ZEROES), unmapped, 1),
            (header(Type.DISCARD), discarded, 1),
            (header(Type.GET_ID), 20, 1),
            (header(Type.OUT, IMAGE_SIZE // 512), data, 1),
        ],
    )
    id = b"jailed".ljust(20, b"\0")
    assert answers == [b"\0", b"\0", data[2048:2560] + b"\0", b"\0", b"\0", b"\0", id + b"\0", b"\1"]
    expected = bytes(9 * 512) + data[9 * 512 :]
    assert supervisor("image", "blk") == expected + bytes(IMAGE_SIZE - len(expected))
    assert supervisor("stop", "blk") == (os.CLD_EXITED, 0)


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img (Debian: qemu-utils) is not installed")
def test_a_jailed_qcow2_image_is_as_qemu_wants_it_after_stop(supervisor: Any, tmp_path: Path) -> None:
    base, path = tmp_path / "base.raw", tmp_path / "image.qcow2"
    before = os.urandom(IMAGE_SIZE)
    base.write_bytes(before)
    qemu_img("create", "-f", "qcow2", "-b", base, "-F", "raw", path)
    for file in base, path:
        file.chmod(0o666)
    let_in(tmp_path)  # the ordinary user's stand-in opens them itself
    params = (*MEMORY, 0, 1, 512, 1, 0, 0, b"", 1, 0, 0, 1 << 30)
    images = {"disk": str(path), "backing": str(base)}
    supervisor("spawn", "virtio-blk", "blk", params=params, images=images, host_id=host_id(supervisor))
    data = os.urandom(8192)
    answers = supervisor(
        "converse",
        "blk",
        V1 | blk.F_FLUSH | blk.F_DISCARD | blk.F_WRITE_ZEROES,
        [
            (header(Type.IN, 100), 512, 1),
            (header(Type.OUT, 100), data, 1),
            (header(Type.WRITE_ZEROES), blk.RANGE.pack(0, 64, blk.UNMAP), 1),
            (header(Type.FLUSH), 1),
            (header(Type.DISCARD), blk.RANGE.pack(1024, 1024, 0), 1),
            (header(Type.IN, 1024), 512, 1),
        ],
    )
    assert answers == [before[51200:51712] + b"\0", b"\0", b"\0", b"\0", b"\0", bytes(513)]
    assert supervisor("stop", "blk") == (os.CLD_EXITED, 0)
    qemu_img("check", "-f", "qcow2", path)
    after = tmp_path / "after.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, after)
    expected = bytearray(before)
    expected[51200 : 51200 + 8192] = data
    expected[: 64 * 512] = bytes(64 * 512)
    expected[1024 * 512 :] = bytes(1024 * 512)
    assert after.read_bytes() == expected
    assert base.read_bytes() == before


def test_the_image_of_a_jailed_disk_does_not_grow_beyond_its_limit(supervisor: Any) -> None:
    params = (*MEMORY, 0, 1, 512, 1, 0, 0, b"", 0, 0, 0, IMAGE_SIZE)
    pid = supervisor("spawn", "virtio-blk", "blk", params=params, host_id=host_id(supervisor))["pid"]
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    assert f"Max file size {IMAGE_SIZE} {IMAGE_SIZE} bytes" in {" ".join(line.split()) for line in limits}
    assert supervisor("stop", "blk") == (os.CLD_EXITED, 0)


@pytest.mark.parametrize("features", [V1, V1 | EVERY_RING], ids=["split", "packed"])
def test_a_jailed_balloon_gives_pages_back_to_the_host(supervisor: Any, features: int) -> None:
    supervisor("spawn", "virtio-balloon", "balloon", host_id=host_id(supervisor))
    page, first, count = 4096, (8 << 20) // 4096, 256
    supervisor("fill", first * page, b"in use" * count * page)
    before = supervisor("guest_blocks")
    arrays = [
        struct.pack("<2I", first, first + 1),
        struct.pack(f"<{count - 2}I", *range(first + 2, first + count)),
    ]
    assert supervisor("converse", "balloon", features, [(a,) for a in arrays]) == [b"", b""]
    given = (before - supervisor("guest_blocks")) * 512 // page
    assert count - 50 < given <= count, "less what the rings took meanwhile"
    supervisor("set", "balloon", "target_mib", 4)
    counters = supervisor("counters", "balloon")
    assert counters["inflated_pages"] == 256 and counters["target_mib"] == 4
    assert supervisor("stop", "balloon") == (os.CLD_EXITED, 0)


@pytest.mark.parametrize("features", [V1, V1 | EVERY_RING], ids=["split", "packed"])
def test_a_jailed_console_has_all_its_ports(supervisor: Any, features: int) -> None:
    names = b"\0agent"
    supervisor("spawn", "virtio-console", "con", params=(*MEMORY, names), host_id=host_id(supervisor))
    features |= console.F_SIZE | console.F_MULTIPORT
    messages = [(0, console.DEVICE_READY), (1, console.PORT_READY), (1, console.PORT_OPEN)]
    said = [(console.CONTROL.pack(id, event, 1),) for id, event in messages]
    assert supervisor("converse", "con", features, said, console.CONTROL_TX) == [b""] * 3
    assert supervisor("converse", "con", features, [(b"printed",)], 1) == [b""]
    assert supervisor("shown", "con", 0) == b"printed"
    assert supervisor("converse", "con", features, [(b"said",)], 5) == [b""]
    assert supervisor("shown", "con", 1) == b"said"
    supervisor("type", "con", 0, b"typed")
    assert supervisor("converse", "con", features & ~console.F_MULTIPORT, [(64,)]) == [b"typed"]
    supervisor("set", "con", "size", 80 | 24 << 16)
    assert supervisor("ask_ping", "con") == 7
    assert supervisor("stop", "con") == (os.CLD_EXITED, 0)


@pytest.mark.parametrize("features", [V1, V1 | EVERY_RING], ids=["split", "packed"])
def test_a_jailed_vsock_takes_connections_and_lets_them_go(supervisor: Any, features: int) -> None:
    supervisor("spawn", "virtio-vsock", "vsock", params=(*MEMORY, 3), host_id=host_id(supervisor))
    for _ in range(VSOCK_LINES // 2 + 1):  # no place is lost
        assert supervisor("talk", "vsock", features) == [
            b"to the guest", b"called", bytes([80, 0, 0, 0]), b"to the host", b"OK 1073741824\n"
        ]  # fmt: skip
    assert supervisor("stop", "vsock") == (os.CLD_EXITED, 0)


def test_a_jailed_vsock_can_hold_no_more_connections_than_it_has_places(supervisor: Any) -> None:
    supervisor("spawn", "virtio-vsock", "crowd", params=(*MEMORY, 3), host_id=host_id(supervisor))
    for _ in range(2):
        assert supervisor("crowd", "crowd", VSOCK_LINES + 10) == VSOCK_LINES
    assert supervisor("stop", "crowd") == (os.CLD_EXITED, 0)
