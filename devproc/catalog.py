"""Every kind of device there is: module, register spaces, descriptors, parameters, limits.

One entry is the first half of a device's page (the second is policies/NAME.policy).  Descriptor slots
are fixed: 0 and 1 are /dev/null, 2 the log pipe, 3 the access channel, 4 the control channel, 5 the mailbox,
6 the eventfd that wakes who does not look into it, and the entry's own descriptors follow from 7 in the order
written here; policies name them FD_<NAME>.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

from devproc.record import record, replace
from devproc.virtio import spec
from devproc.wire import Scalar, Space

FD_LOG: Final = 2
FD_ACCESS: Final = 3
FD_CONTROL: Final = 4
FD_MAILBOX: Final = 5
FD_BELL: Final = 6
FD_FIRST: Final = 7

Params = dict[str, int | bytes]
"""The values of an entry's parameters, by name."""


@record
class Descriptor:
    """A named descriptor, or array of them, and the backend that wraps it.

    `kind`: "signal" an eventfd written by the device; "kick" an eventfd read by it; "input" a byte source;
    "output" a byte sink; "memory" the memfd of guest memory; "disk" an image; "tap" a tap interface;
    "stream" a unix stream socket that carries frames; "directory" an O_PATH descriptor of a directory, which
    becomes the process's root; "exchange" a socket from which connections come; "line" a place for one, empty
    but when there is one; "back-end" a socket to a vhost-user back end.  `count` makes it an array: the model
    gets a tuple of ports, and policies name its slots FD_<NAME>_FIRST and FD_<NAME>_LAST, not FD_<NAME>.
    """

    name: str
    kind: Literal[
        "signal",
        "kick",
        "input",
        "output",
        "memory",
        "disk",
        "tap",
        "stream",
        "directory",
        "exchange",
        "line",
        "back-end",
    ]
    meaning: str
    count: int | None = None


@record
class Param:
    """A value the supervisor gives at spawn: an integer in [low, high], or that many bytes."""

    name: str
    low: int
    high: int
    meaning: str
    type: type[int] | type[bytes] = int

    def allows(self, value: int | bytes) -> bool:
        """Whether `value` is in range."""
        return self.low <= (len(value) if isinstance(value, bytes) else value) <= self.high


@record
class Region:
    """A register space and its size in bytes; who puts it at which address is supervisor/machine.py.

    `coalesced`: offsets of bytes whose writes may reach the device a little later, for nothing comes of them
    that the guest could wait for; but always before whatever else it does to the device.
    """

    space: Space
    size: int
    meaning: str
    coalesced: tuple[int, ...] = ()


@record
class Virtio:
    """What the supervisor's shadow of a virtio function must know without importing its code.

    `device_id` as in Virtio 1.2, section 5 (4 is entropy; the PCI device id is 0x1040 more); `class_code`
    24 bits; `queue_sizes` the largest size of each queue, a power of 2.
    """

    device_id: int
    class_code: int
    queue_sizes: tuple[int, ...]

    @property
    def vectors(self) -> int:
        """MSI-X vectors: one for each queue and one for changes of the configuration."""
        return len(self.queue_sizes) + 1


@record
class Entry:
    name: str
    summary: str
    module: str
    model: str
    regions: tuple[Region, ...]
    descriptors: tuple[Descriptor, ...] = ()
    params: tuple[Param, ...] = ()
    sources: tuple[Literal["clock", "wall", "entropy", "log"], ...] = ()  # of the host, without a descriptor
    settings: tuple[Param, ...] = ()  # what `Set` may change while it serves
    virtio: Virtio | None = None
    patience_s: int = 0  # how much longer than --device-timeout it may take: its host's storage may
    opens: int = 0  # descriptors that it may open beyond those it is handed
    data_mib: int = 64  # RLIMIT_DATA
    fsize: int | str = 0  # RLIMIT_FSIZE in bytes, or the parameter that gives it: no file grows beyond
    without: frozenset[str] = frozenset()  # layers of the jail left out: only what tests the others does that

    def coalesced(self, space: Space) -> tuple[int, ...]:
        """As of the region."""
        return next((r.coalesced for r in self.regions if r.space == space), ())

    @property
    def guest_memory(self) -> bool:
        """Whether the process is given guest memory."""
        return any(d.kind == "memory" for d in self.descriptors)

    def own_slots(self, first: int = FD_FIRST) -> Iterator[tuple[Descriptor, range]]:
        """Each of the entry's descriptors with its numbers, of which an array has several."""
        for d in self.descriptors:
            numbers = range(first, first + (1 if d.count is None else d.count))
            yield d, numbers
            first = numbers.stop

    @property
    def held(self) -> int:
        """How many descriptors the process holds: numbers 0 to held - 1."""
        return FD_FIRST + sum(len(numbers) for _, numbers in self.own_slots())

    @property
    def descriptors_max(self) -> int:
        """RLIMIT_NOFILE: what it is handed, and what it opens."""
        return self.held + self.opens

    def slots(self) -> dict[str, int]:
        """Policy constant -> descriptor number; of an array, and of what it opens, the first and the last."""
        slots = {
            "FD_LOG": FD_LOG,
            "FD_ACCESS": FD_ACCESS,
            "FD_CONTROL": FD_CONTROL,
            "FD_MAILBOX": FD_MAILBOX,
            "FD_BELL": FD_BELL,
        }
        for d, numbers in self.own_slots():
            name = f"FD_{d.name.upper()}"
            if d.count is None:
                slots[name] = numbers[0]
            else:
                slots |= {f"{name}_FIRST": numbers[0], f"{name}_LAST": numbers[-1]}
        if self.opens:
            slots |= {"FD_OPENED_FIRST": self.held, "FD_OPENED_LAST": self.descriptors_max - 1}
        return slots

    def check_params(self, values: tuple[Scalar, ...]) -> Params:
        """Parameters by name.

        Raises:
            ValueError: wrong number, type or range.
        """
        if len(values) != len(self.params):
            raise ValueError(f"{self.name}: {len(values)} parameters, expected {len(self.params)}")
        named: Params = {}
        for p, v in zip(self.params, values, strict=True):
            if isinstance(v, str) or type(v) is not p.type or not p.allows(v):
                what = "an integer in" if p.type is int else "bytes of a length in"
                raise ValueError(f"{self.name}: {p.name} must be {what} [{p.low}, {p.high}]")
            named[p.name] = v
        return named

    def check_setting(self, name: str, value: int) -> None:
        """Check what a `Set` says.

        Raises:
            ValueError: there is no such setting, or the value is out of its range.
        """
        if not any(p.name == name and p.low <= value <= p.high for p in self.settings):
            known = ", ".join(f"{p.name} in [{p.low}, {p.high}]" for p in self.settings)
            raise ValueError(f"{self.name}: cannot set {name} to {value}, expected {known or 'no setting'}")


def shared_directory(entry: Entry) -> int | None:
    """The number of the descriptor that becomes the process's root, if it has one."""
    return next((numbers[0] for d, numbers in entry.own_slots() if d.kind == "directory"), None)


_IRQ = Descriptor("irq", "signal", "its interrupt: an eventfd that KVM turns into an edge")
MEMORY_PARAMS: Final = (
    Param("mem_below_4g", 0, 1 << 32, "bytes of RAM below 4 GiB"),
    Param("mem_above_4g", 0, 1 << 52, "bytes of RAM from 4 GiB on"),
)
"""First of the parameters of every entry that has guest memory."""


RNG: Final = Virtio(spec.ID_ENTROPY, 0x00FF00, (256,))
NET_PAIRS: Final = 4
"""Pairs of queues that a card on a tap can have."""
NET: Final = Virtio(spec.ID_NET, 0x020000, (*(256,) * 2 * NET_PAIRS, 64))
NET_STREAM: Final = Virtio(spec.ID_NET, 0x020000, (256, 256, 64))
CONSOLE_PORTS: Final = 4
CONSOLE: Final = Virtio(spec.ID_CONSOLE, 0x078000, (64,) * (2 * CONSOLE_PORTS + 2))
BALLOON: Final = Virtio(spec.ID_BALLOON, 0x00FF00, (64,) * 5)
VSOCK_LINES: Final = 64
"""Connections that a guest can have with the host at once."""
VSOCK: Final = Virtio(spec.ID_VSOCK, 0x078000, (256, 256, 64))
FS: Final = Virtio(spec.ID_FS, 0x018000, (64, 512))
BLOCK: Final = Virtio(spec.ID_BLOCK, 0x018000, (256,) * 4)
VHOST_NET: Final = Virtio(spec.ID_NET, 0x020000, (256, 256))
VHOST_BLK_CONFIG: Final = 60
"""Bytes of a disk's device configuration (virtio 1.2, 5.2.4)."""


_PLUGGED: Final = Param("link", 0, 1, "whether the cable is plugged in")
_PACKED: Final = Param("packed", 0, 1, "packed rings are offered, which drivers prefer and which are slower")


def _net_params(pairs: int) -> tuple[Param, ...]:
    return (
        Param("mac", 6, 6, "Ethernet address", bytes),
        Param("mtu", 0, 65535, "the largest IP packet in bytes; 0: not said"),
        Param("pairs", 1, pairs, "pairs of queues"),
        Param("bps", 0, 1 << 40, "bytes a second each way; 0: no limit"),
        Param("pps", 0, 1 << 40, "frames a second each way; 0: no limit"),
        _PACKED,
    )


def virtio_entry(
    name: str,
    summary: str,
    model: str,
    virtio: Virtio,
    *,
    descriptors: tuple[Descriptor, ...] = (),
    params: tuple[Param, ...] = (),
    sources: tuple[Literal["clock", "wall", "entropy", "log"], ...] = (),
    **more: Any,
) -> Entry:
    """The entry of a virtio function: what all have, then its own; the module is named after `name`."""
    return Entry(
        name,
        summary,
        f"devproc.devices.{name.replace('-', '_')}",
        model,
        regions=(
            Region(Space.CONFIG, 4096, "configuration space"),
            Region(Space.BAR0, spec.BAR_MSIX_TABLE, "all of the BAR but MSI-X"),
        ),
        descriptors=(*virtio_descriptors(virtio), *descriptors),
        params=(*MEMORY_PARAMS, *params),
        sources=("log", *sources),
        virtio=virtio,
        **more,
    )


def virtio_descriptors(virtio: Virtio) -> tuple[Descriptor, ...]:
    """The descriptors every virtio function has, in order; its own follow."""
    return (
        Descriptor("memory", "memory", "guest memory"),
        Descriptor("irq", "signal", "MSI-X vectors: the configuration's, each queue's", virtio.vectors),
        Descriptor("intx", "signal", "raises INTA"),
        Descriptor("resample", "kick", "the guest has acknowledged INTA: raise it again while ISR is not 0"),
        Descriptor("kick", "kick", "the driver's notifications, one for each queue", len(virtio.queue_sizes)),
    )


def vhost_user_entry(name: str, summary: str, model: str, virtio: Virtio, own: Param) -> Entry:
    """The entry of a virtio function whose rings a vhost-user back end serves."""
    # It kicks where KVM does not, and the back end hears both: the one descriptor that is another's to read.
    common = (replace(d, kind="signal") if d.name == "kick" else d for d in virtio_descriptors(virtio))
    called = Descriptor("call", "kick", "the back end's interrupts, by queue", len(virtio.queue_sizes))
    entry = virtio_entry(
        name,
        summary,
        model,
        virtio,
        params=(
            Param("features", 0, (1 << 64) - 1, "what the back end offers the driver"),
            Param("rings", 1, len(virtio.queue_sizes), "queues that the back end serves"),
            own,
        ),
        sources=("clock",),
    )
    return replace(entry, descriptors=(*common, called, Descriptor("backend", "back-end", "the back end")))


CATALOG: Final[dict[str, Entry]] = {
    e.name: e
    for e in (
        Entry(
            "serial", "16550A UART with FIFOs", "devproc.devices.serial", "Serial",
            regions=(Region(Space.PORT, 8, "RBR/THR to SCR", coalesced=(0,)),),
            descriptors=(
                _IRQ,
                Descriptor("input", "input", "what the guest receives"),
                Descriptor("output", "output", "what the guest transmits"),
            ),
            sources=("clock",),
            fsize=1 << 62,
        ),
        Entry(
            "rtc", "MC146818 real-time clock and CMOS memory", "devproc.devices.rtc", "Rtc",
            regions=(Region(Space.PORT, 2, "index, data", coalesced=(0,)),),
            descriptors=(_IRQ,),
            params=MEMORY_PARAMS,
            sources=("clock", "wall"),
        ),
        Entry(
            "i8042", "keyboard controller, for the reset line", "devproc.devices.i8042", "I8042",
            regions=(Region(Space.PORT, 5, "data (0x60), port B (0x61), command/status (0x64)"),),
            descriptors=(Descriptor("reset", "signal", "asks the supervisor for a system reset"),),
        ),
        Entry(
            "pit", "8254 interval timer and port 0x61", "devproc.devices.pit", "Pit",
            regions=(Region(Space.PORT, 4, "counters 0-2, control word"), Region(Space.PORT2, 1, "port B")),
            descriptors=(_IRQ,),
            sources=("clock",),
        ),
        Entry(
            "pci-host", "PCI host bridge, function 0:0.0", "devproc.devices.pci_host", "PciHost",
            regions=(Region(Space.CONFIG, 4096, "configuration space"),),
        ),
        Entry(
            "acpi-pm", "ACPI PM1 event and control blocks, PM timer", "devproc.devices.acpi_pm", "AcpiPm",
            # The timer counts 32 bits, so the FADT sets TMR_VAL_EXT; there is no SMI_CMD: SCI_EN is always 1.
            regions=(Region(Space.PORT, 16, "PM1_STS 0, PM1_EN 2, PM1_CNT 4, PM_TMR 8"),),
            descriptors=(
                _IRQ,
                Descriptor("poweroff", "signal", "asks the supervisor to power the machine off (S5)"),
            ),
            sources=("clock",),
        ),
        Entry(
            "pvpanic", "the guest's word that it has panicked", "devproc.devices.pvpanic", "PvPanic",
            regions=(Region(Space.PORT, 1, "events"),),
            descriptors=(Descriptor("panic", "signal", "tells the supervisor that the guest panicked"),),
        ),
        virtio_entry("virtio-rng", "random numbers", "VirtioRng", RNG, sources=("entropy",)),
        virtio_entry(
            "virtio-console", "consoles and other ports of bytes", "VirtioConsole", CONSOLE,
            descriptors=(
                Descriptor("input", "input", "what the guest receives, by port", CONSOLE_PORTS),
                Descriptor("output", "output", "what the guest transmits, by port", CONSOLE_PORTS),
            ),
            params=(
                Param("names", 0, 255, "a name for each port, NUL between them; without: a console", bytes),
            ),
            settings=(
                Param("size", 0, CONSOLE_PORTS << 32, "a window: columns, rows << 16, port << 32"),
            ),
            fsize=1 << 62,
        ),
        virtio_entry(
            "virtio-balloon", "memory that the guest can spare", "VirtioBalloon", BALLOON,
            settings=(
                Param("target_mib", 0, 1 << 20, "MiB that the balloon should hold"),
                Param("refresh", 1, 1, "ask the guest for new statistics"),
            ),
        ),
        virtio_entry(
            "virtio-net", "network card on a tap", "VirtioNet", NET,
            descriptors=(Descriptor("link", "tap", "the tap's queues, then the first again", NET_PAIRS),),
            params=_net_params(NET_PAIRS),
            sources=("clock",),
            settings=(_PLUGGED,),
        ),
        virtio_entry(
            "virtio-net-stream", "network card on a stream, as passt's", "VirtioNetStream", NET_STREAM,
            descriptors=(Descriptor("link", "stream", "frames to and from the host", 1),),
            params=_net_params(1),
            sources=("clock",),
            settings=(_PLUGGED,),
        ),
        virtio_entry(
            "virtio-vsock", "sockets between guest and host", "VirtioVsock", VSOCK,
            descriptors=(
                Descriptor("exchange", "exchange", "connects host programs, and asks for them"),
                Descriptor("line", "line", "places for connections", VSOCK_LINES),
            ),
            params=(Param("cid", 3, (1 << 32) - 2, "the guest's context id"),),
        ),
        virtio_entry(
            "virtio-blk", "disk", "VirtioBlk", BLOCK,
            descriptors=(
                Descriptor("disk", "disk", "the image"),
                Descriptor("backing", "disk", "the image that it is based on, or nothing"),
            ),
            params=(
                Param("read_only", 0, 1, "writes are refused"),
                Param("sparse", 0, 1, "room that the guest gives back goes back to the host"),
                Param("block_size", 512, 4096, "bytes in a block, a hint for the guest"),
                Param("queues", 1, len(BLOCK.queue_sizes), "queues that the guest may use"),
                Param("bps", 0, 1 << 40, "bytes a second, 0 without limit"),
                Param("iops", 0, 1 << 40, "requests a second, 0 without limit"),
                Param("id", 0, 20, "the answer to GET_ID", bytes),
                Param("format", 0, 1, "of the image: 0 raw, 1 qcow2"),
                Param("backing_format", 0, 1, "of the image that it is based on"),
                _PACKED,
                Param("fsize", 0, 1 << 62, "bytes that the image may have"),
            ),
            sources=("clock",),
            settings=(Param("capacity", 1, 1 << 53, "sectors that the disk should have, never fewer"),),
            patience_s=60,
            fsize="fsize",
        ),
        virtio_entry(
            "virtio-fs", "a directory of the host", "VirtioFs", FS,
            descriptors=(Descriptor("directory", "directory", "what is shared, and the process's root"),),
            params=(
                Param("tag", 1, 36, "what the guest mounts it by, UTF-8", bytes),
                Param("read_only", 0, 1, "nothing below it can be changed"),
            ),
            opens=2048,
            data_mib=256,
            fsize=1 << 62,
        ),
        vhost_user_entry(
            "vhost-user-blk", "disk that another program serves", "VhostUserBlk", BLOCK,
            Param("config", VHOST_BLK_CONFIG, VHOST_BLK_CONFIG, "the device configuration", bytes),
        ),
        vhost_user_entry(
            "vhost-user-net", "network card that another program serves", "VhostUserNet", VHOST_NET,
            Param("mac", 6, 6, "Ethernet address", bytes),
        ),
        vhost_user_entry(
            "vhost-user-fs", "directory that another program serves", "VhostUserFs", FS,
            Param("tag", 1, 36, "what the guest mounts it by, UTF-8", bytes),
        ),
    )
}  # fmt: skip
