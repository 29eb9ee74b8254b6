"""`vmsup device` in its jail, with a front end that is this process."""

from __future__ import annotations

import os
import select
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devproc.devices import virtio_blk as blk
from devproc.devices.virtio_blk import Type
from devproc.vhost import message
from devproc.vhost.message import ConfigSpace, Payload, Request, VringAddr, VringFile, VringState
from devproc.virtio import spec
from integration.vhost.client import MEMORY_SIZE, USER, WAIT_S, BackEnd, Client, Guest, back_end
from kvmcore.memory import GuestMemory, Region

Act = Callable[[Client, Guest], None]

V1 = spec.F_VERSION_1
EVERY_RING = spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED
IMAGE_SIZE = 1 << 20


def header(kind: Type, sector: int = 0) -> bytes:
    return blk.HEADER.pack(kind, 0, sector)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BackEnd]:
    directory = tmp_path_factory.mktemp("vhost")
    (directory / "image").write_bytes(bytes(IMAGE_SIZE))
    words = "block", "--block", f"{directory}/image,id=abroad,queues=2,packed-queue"
    with back_end(directory / "socket", *words) as running:
        yield running


@pytest.fixture
def client(disk: BackEnd) -> Iterator[Client]:
    client = Client(disk.path)
    yield client
    client.close()


@pytest.mark.parametrize("features", [V1, V1 | EVERY_RING], ids=["split", "packed"])
def test_a_front_end_reads_and_writes(disk: BackEnd, client: Client, features: int) -> None:
    guest = Guest()
    assert features & ~client.ask(Request.GET_FEATURES) == 0
    assert client.ask(Request.GET_QUEUE_NUM) == 2
    client.negotiate(features | blk.F_FLUSH)
    client.set_memory(guest)
    for index in (0, 1):
        client.set_up(guest, index, features)
    data = os.urandom(4096)
    assert client.converse(0, (header(Type.OUT, 8), data, 1), (header(Type.FLUSH), 1)) == [b"\0", b"\0"]
    assert client.converse(1, (header(Type.IN, 8), 4096, 1), (header(Type.GET_ID), 20, 1)) == [
        data + b"\0",
        b"abroad".ljust(20, b"\0") + b"\0",
    ]
    assert disk.path.with_name("image").read_bytes()[4096:8192] == data


@pytest.mark.parametrize(
    ("features", "start"), [(V1, 65530), (V1 | EVERY_RING, 7 | 1 << 15)], ids=["split", "packed"]
)
def test_a_ring_goes_on_where_it_was_stopped(client: Client, features: int, start: int) -> None:
    guest = Guest()
    client.negotiate(features)
    client.set_memory(guest)
    client.set_up(guest, 0, features, size=16, position=start)
    get_id = (header(Type.GET_ID), 20, 1)
    for _ in range(5):
        client.converse(0, get_id, get_id)
    base = client.ask(Request.GET_VRING_BASE, VringState(0, 0))
    if features & spec.F_RING_PACKED:
        at = 7 + 10 * 3
        position = at % 16 | (1 - at // 16 % 2) << 15
        assert base.num == position | position << 16
    else:
        assert base.num == (start + 10) & 0xFFFF
    client.ask(Request.SET_VRING_BASE, VringState(0, base.num))
    client.set_eventfds(0)
    assert len(client.converse(0, get_id)) == 1


def test_what_changes_while_a_ring_is_served_is_taken_up(disk: BackEnd, client: Client) -> None:
    guest = Guest()
    get_id = (header(Type.GET_ID), 20, 1)
    client.negotiate(V1)
    client.set_memory(guest)
    client.set_up(guest, 0, V1)
    client.converse(0, get_id)
    first = disk.device()
    client.set_eventfds(0)
    client.converse(0, get_id)
    second = disk.device()
    client.set_memory(guest)
    client.converse(0, get_id)
    assert len({first, second, disk.device()}) == 3
    client.ask(Request.SET_VRING_ENABLE, VringState(0, 1))
    client.ask(Request.SET_FEATURES, V1 | message.F_PROTOCOL_FEATURES)
    third = disk.device()
    client.converse(0, get_id)
    assert disk.device() == third, "nothing has changed"


def test_a_disabled_ring_waits_until_it_is_enabled(client: Client) -> None:
    guest = Guest()
    get_id = (header(Type.GET_ID), 20, 1)
    client.negotiate(V1)
    client.set_memory(guest)
    client.set_up(guest, 0, V1)
    client.set_up(guest, 1, V1)
    client.converse(0, get_id)
    client.ask(Request.SET_VRING_ENABLE, VringState(0, 0))
    client.drivers[0].request(*get_id)
    os.eventfd_write(client.kicks[0], 1)
    client.converse(1, get_id)
    assert client.drivers[0].used() == []
    client.ask(Request.SET_VRING_ENABLE, VringState(0, 1))
    assert select.select([client.calls[0]], [], [], WAIT_S)[0]
    assert len(client.drivers[0].used()) == 1


def test_the_configuration_is_the_disk_s(client: Client) -> None:
    assert client.ask(Request.GET_PROTOCOL_FEATURES) & message.PROTOCOL_F_CONFIG
    client.negotiate(V1)
    config = client.ask(Request.GET_CONFIG, ConfigSpace(0, bytes(60)))
    assert int.from_bytes(config.data[:8], "little") == IMAGE_SIZE // 512
    assert config.data[0x22:0x24] == b"\2\0"
    client.ask(Request.SET_CONFIG, ConfigSpace(0, b"\xff"))
    assert client.ask(Request.GET_CONFIG, ConfigSpace(0, bytes(60))) == config


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def test_its_device_is_sealed(disk: BackEnd, client: Client) -> None:
    guest = Guest()
    client.negotiate(V1)
    client.set_memory(guest)
    client.set_up(guest, 0, V1)
    client.converse(0, (header(Type.GET_ID), 20, 1))
    found = status(disk.device())
    assert (found["Seccomp"], found["Seccomp_filters"], found["NoNewPrivs"]) == ("2", "2", "1")
    assert (found["CapBnd"], found["CapEff"]) == ("0" * 16, "0" * 16)
    assert found["NSpid"].split()[-1] == "1"


def _regions(
    *changes: dict[str, int], fd: int | None = None, request: Request = Request.SET_MEM_TABLE
) -> Act:
    """A table with the regions' fields changed."""

    def act(client: Client, guest: Guest) -> None:
        regions = tuple(r._replace(**c) for r, c in zip(guest.regions, changes, strict=False))
        fds = [guest.memory.fd if fd is None else fd] * len(regions)
        client.connection.send(message.pack(request, regions), fds)

    return act


def _says(request: Request, payload: Payload = None, fds: Callable[[], list[int]] = list) -> Act:
    def act(client: Client, guest: Guest) -> None:
        client.connection.send(message.pack(request, payload), fds())

    return act


def _kicked(**changes: int) -> Act:
    """A ring whose address is changed, and a kick."""

    def act(client: Client, guest: Guest) -> None:
        client.set_memory(guest)
        client.set_up(guest, 0, V1)
        driver = client.drivers[0]
        used, available = map(guest.user_address, (driver.device, driver.driver))
        addr = VringAddr(0, 0, guest.user_address(driver.desc), used, available, 0)
        client.ask(Request.SET_VRING_ADDR, addr._replace(**changes))
        os.eventfd_write(client.kicks[0], 1)

    return act


def _read_only(client: Client, guest: Guest) -> None:
    client.set_memory(guest)
    client.set_up(guest, 0, V1)
    memory = os.open(f"/proc/self/fd/{guest.memory.fd}", os.O_RDONLY)
    client.ask(Request.SET_MEM_TABLE, guest.regions, [memory] * len(guest.regions))
    os.close(memory)
    os.eventfd_write(client.kicks[0], 1)


HALF = MEMORY_SIZE // 2
HOSTILE: dict[str, tuple[Act, str]] = {
    "garbage": (lambda c, g: c.sock.sendall(b"GET / HTTP/1.1\r\n\r\n"), "flags"),
    "an unknown request": (lambda c, g: c.sock.sendall(struct.pack("<III", 99, 1, 0)), "unknown request 99"),
    "features": (_says(Request.SET_FEATURES, 1 << 63), "features 0x8000000000000000 of"),
    "no VERSION_1": (_kicked(), "does not accept features 0x0"),
    "protocol features": (_says(Request.SET_PROTOCOL_FEATURES, 1 << 1), "protocol features 0x2 of"),
    "a ring too many": (_says(Request.SET_VRING_NUM, VringState(2, 16)), "vring 2, there are 2"),
    "no entries": (_says(Request.SET_VRING_NUM, VringState(0, 0)), "vring 0 of 0 entries"),
    "logging": (_says(Request.SET_VRING_ADDR, VringAddr(0, 1, 0, 0, 0, 0)), "flags 0x1: not offered"),
    "half a page": (_regions({"size": 2048}, {}), "expected whole pages"),
    "no region": (_regions({"size": 0}, {}), "0x0 bytes"),
    "beyond the file": (_regions({"mmap_offset": HALF + 4096}, {}), "of a file of 0x400000 bytes"),
    "beyond everything": (_regions({"mmap_offset": 1 << 63}, {}), "of a file of 0x400000 bytes"),
    "beyond the guest": (_regions({"guest_address": (1 << 64) - 4096}, {}), "beyond what there is"),
    "an overlap": (_regions({"guest_address": HALF - 4096}, {}), "overlap at guest address"),
    "user overlap": (_regions({"user_address": USER + (1 << 30) + 4096}, {}), "overlap at user address"),
    "no file": (_regions({}, {}, fd=os.open(os.devnull, os.O_RDWR)), "not a file"),
    "memory to read": (
        _read_only,
        "block1: guest memory: mmap: Permission denied",
    ),
    "polling": (_says(Request.SET_VRING_KICK, VringFile(0, False)), "to be polled"),
    "a kick that is no eventfd": (
        _says(Request.SET_VRING_KICK, VringFile(0, True), lambda: [os.pipe()[0]]),
        "SET_VRING_KICK: not an eventfd",
    ),
    "nine descriptors": (
        lambda c, g: c.connection.send(message.pack(Request.GET_FEATURES), [g.memory.fd] * 9),
        "more than 8 descriptors",
    ),
    "a ring nowhere": (_kicked(descriptor=0), "user address 0x0 is in no memory region"),
    "a ring that is cut off": (_kicked(used=USER + HALF - 8), "does not accept where the rings are"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_front_end_is_disconnected_and_the_next_is_served(
    disk: BackEnd, client: Client, name: str
) -> None:
    act, why = HOSTILE[name]
    client.negotiate(0 if name == "no VERSION_1" else V1)
    act(client, Guest())
    assert client.is_dropped()
    said = disk.line()
    while "needs a reset" in said:  # the device's own words about the same
        said = disk.line()
    assert said.startswith("vmsup: the front end is disconnected: ")
    assert why in said
    following = Client(disk.path)
    assert following.ask(Request.GET_QUEUE_NUM) == 2
    following.close()


def test_front_ends_are_heard_by_a_sealed_process(disk: BackEnd, client: Client) -> None:
    client.ask(Request.GET_QUEUE_NUM)
    found = status(disk.process_named("frontend"))
    assert (found["Seccomp"], found["NoNewPrivs"]) == ("2", "1")
    assert (found["CapBnd"], found["CapEff"]) == ("0" * 16, "0" * 16)


def test_a_front_end_waits_for_the_one_before(disk: BackEnd, client: Client) -> None:
    assert client.ask(Request.GET_QUEUE_NUM) == 2
    second = Client(disk.path)
    second.connection.send(message.pack(Request.GET_QUEUE_NUM))
    assert client.ask(Request.GET_QUEUE_NUM) == 2
    client.connection.close()
    assert second.connection.receive().header.reply
    second.close()


@pytest.fixture
def rng(tmp_path: Path) -> Iterator[BackEnd]:
    with back_end(tmp_path / "socket", "rng") as running:
        yield running


def serve(rng: BackEnd, guest: Guest) -> Client:
    client = Client(rng.path)
    client.negotiate(V1)
    client.set_memory(guest)
    client.set_up(guest, 0, V1)
    (random,) = client.converse(0, (64,))
    assert len(set(random)) > 8
    return client


def test_a_device_without_configuration_offers_none(rng: BackEnd) -> None:
    client = serve(rng, Guest())
    assert not client.ask(Request.GET_PROTOCOL_FEATURES) & message.PROTOCOL_F_CONFIG
    client.close()


def test_memory_that_is_taken_away_ends_the_device_by_name(rng: BackEnd) -> None:
    guest = Guest()
    memory = os.memfd_create("whole")
    os.truncate(memory, MEMORY_SIZE)
    guest.files = memory, memory
    guest.memory = GuestMemory.attach(os.dup(memory), [Region(0, MEMORY_SIZE, 0)])
    client = serve(rng, guest)
    os.truncate(memory, 0)
    os.eventfd_write(client.kicks[0], 1)
    code, said = rng.wait()
    assert (code, said) == (33, "vmsup: rng: killed by SIGBUS\n")
    assert not rng.path.exists()


def test_a_killed_device_ends_the_back_end_by_name(rng: BackEnd) -> None:
    client = serve(rng, Guest())
    os.kill(rng.device(), signal.SIGKILL)
    assert rng.wait() == (33, "vmsup: rng: killed by SIGKILL\n")
    assert not rng.path.exists()
    assert client.is_dropped()


def test_the_end_of_the_process_for_front_ends_is_the_back_end_s(rng: BackEnd) -> None:
    client = serve(rng, Guest())
    os.kill(rng.process_named("frontend"), signal.SIGKILL)
    assert rng.wait() == (33, "vmsup: frontend: has ended\n")
    assert not rng.path.exists()
    assert client.is_dropped()


def test_a_killed_back_end_leaves_nothing(rng: BackEnd) -> None:
    serve(rng, Guest())
    device = rng.device()
    rng.process.kill()
    rng.process.wait()
    until_s = time.monotonic() + WAIT_S
    while rng.path.exists() or Path(f"/proc/{device}").exists():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def test_it_ends_when_told_to(rng: BackEnd) -> None:
    client = serve(rng, Guest())
    assert rng.stop() == (143, "vmsup: ended by SIGTERM\n")
    assert not rng.path.exists()
    assert client.is_dropped()
