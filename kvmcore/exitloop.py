"""The exit loop as the supervisor sees it: routes in, exits that only Python can answer out.

Everything happens in `_core.c`, with the GIL released: KVM_RUN, the look-up of an address, and the
transaction with the device process that owns it (messages of devproc/wire.py, as frames on a SOCK_SEQPACKET
socket or through a mailbox).
"""

from __future__ import annotations

import enum
import mmap
import os
from collections.abc import Iterable
from typing import Final, NamedTuple, Self

from kvmcore._core import ffi, lib
from kvmcore.errors import KvmError
from kvmcore.mailbox import Mailbox

DEADLINE_MS: Final = 2000

_GONE = {
    lib.CAUSE_EOF: "it closed its access channel",
    lib.CAUSE_TIMEOUT: "it did not answer in time",
    lib.CAUSE_SEND_FAILED: "nothing can be sent to it",
    lib.CAUSE_RECEIVE_FAILED: "nothing can be received from it",
    lib.CAUSE_BAD_REPLY: "its reply is not one",
    lib.CAUSE_MARKED: "it was given up",
}


_LOST = tuple(_GONE[cause] for cause in (lib.CAUSE_EOF, lib.CAUSE_SEND_FAILED, lib.CAUSE_RECEIVE_FAILED))


def is_lost(cause: str) -> bool:
    """Whether `DeviceGone.cause` says no more than that the connection is: as with any end of a process."""
    return cause.startswith(_LOST)


def _gone_text(cause: int, error: int) -> str:
    return f"{_GONE[cause]}: {os.strerror(error)}" if error else _GONE[cause]


class DeviceGone(Exception):
    """An access found its device dead, or killed it by waiting; `cause` says how it went."""

    def __init__(self, index: int, cause: str) -> None:
        super().__init__(cause)
        self.index = index
        self.cause = cause


class RouteKind(enum.IntEnum):
    DEVICE = lib.ROUTE_DEVICE
    FLOAT = lib.ROUTE_FLOAT
    PYTHON = lib.ROUTE_PYTHON
    PCI_CONFIG = lib.ROUTE_PCI_CONFIG
    CHECKED = lib.ROUTE_CHECKED


class Route(NamedTuple):
    """What [start, start + size) of a bus does; the last three are for a device."""

    start: int
    size: int
    kind: RouteKind
    number: int = 0
    space: int = 0
    base_offset: int = 0

    @classmethod
    def device(cls, start: int, size: int, index: int, space: int, base_offset: int = 0) -> Self:
        """Device `index` has it at `base_offset` of its `space`."""
        return cls(start, size, RouteKind.DEVICE, index, space, base_offset)

    @classmethod
    def checked(cls, start: int, size: int, index: int, space: int, base_offset: int = 0) -> Self:
        """Reads go to the device as from `device`; a write is an IO exit, for Python to pass on or drop."""
        return cls(start, size, RouteKind.CHECKED, index, space, base_offset)

    @classmethod
    def floating(cls, start: int, size: int) -> Self:
        """Reads are all ones, writes vanish, both counted; as where there is no route."""
        return cls(start, size, RouteKind.FLOAT)

    @classmethod
    def python(cls, start: int, size: int) -> Self:
        """`CoreVcpu.run` returns an IO exit."""
        return cls(start, size, RouteKind.PYTHON)

    @classmethod
    def pci_config(cls, start: int, size: int, space: int) -> Self:
        """PCI configuration: the eight ports of mechanism #1, or on the mmio bus ECAM from bus 0 on.

        A read goes to `space` of the function's device, a write is an IO exit, the rest floats.
        """
        return cls(start, size, RouteKind.PCI_CONFIG, 0, space)


class DeviceCounters(NamedTuple):
    """Transactions with one device, reads that its shadows saved, and the time spent in transactions."""

    reads: int
    writes: int
    shadowed: int
    wait_ns: int


class FloatCounters(NamedTuple):
    """Accesses that nobody owns (each byte of one that crosses a boundary counts)."""

    reads: int
    writes: int


class Core:
    """Both buses of a machine and the access channels of its devices; safe to use from any thread."""

    def __init__(self, deadline_ms: int = DEADLINE_MS) -> None:
        """`deadline_ms`: how long a device may hold up one access before it counts as dead."""
        core = lib.core_new(deadline_ms)
        if core == ffi.NULL:
            raise MemoryError("exit loop")
        self._core = ffi.gc(core, lib.core_free)

    def add_device(self, access_fd: int, patience_ms: int = 0, mailbox: Mailbox | None = None) -> int:
        """The index of a new device behind `access_fd`, which is duplicated (and made blocking).

        `patience_ms`: how much longer than the deadline it may hold up an access.
        With a `mailbox`, duplicated too, accesses go through that; the channel says that the device is gone.

        Raises:
            OSError: it is not a SOCK_SEQPACKET socket, or there are CORE_DEVICES_MAX devices.
        """
        page, bell = mailbox.fds if mailbox is not None else (-1, -1)
        index: int = lib.core_add_device(self._core, access_fd, patience_ms, page, bell)
        if index < 0:
            raise OSError(ffi.errno, f"access channel: {os.strerror(ffi.errno)}")
        return index

    def mark_dead(self, index: int) -> None:
        """No access reaches the device any more, and one that waits for it returns; idempotent.

        Raises:
            IndexError: no such device.
        """
        if lib.core_mark_dead(self._core, index):
            raise IndexError(f"device {index}")

    def set_routes(self, pio: Iterable[Route], mmio: Iterable[Route]) -> None:
        """Replace both tables at once; an access is looked up in the old or in the new ones.

        Raises:
            ValueError: a range is empty, leaves its bus, overlaps another or names no device; the tables
                are then as they were.
        """
        buses = [sorted(bus, key=lambda r: r.start) for bus in (pio, mmio)]
        tables = [ffi.new("struct core_route[]", bus) for bus in buses]
        at = lib.core_set_routes(self._core, tables[0], len(buses[0]), tables[1], len(buses[1]))
        if at == lib.ROUTES_NO_MEMORY:
            raise MemoryError("routes")
        if at != lib.ROUTES_SET:
            bus, at = (buses[0], at) if at < len(buses[0]) else (buses[1], at - len(buses[0]))
            before = f" after {bus[at - 1]}" if at else ""
            raise ValueError(
                f"cannot route {bus[at]}{before}: empty, outside, overlapping, or no such device"
            )

    def read(self, index: int, space: int, offset: int, size: int) -> int:
        """A register read from Python, with the GIL released.

        Raises:
            DeviceGone: the device is dead, or has just died of this.
            ValueError: no such device, or `size` is not 1, 2, 4 or 8.
        """
        data = ffi.new("uint64_t *")
        self._check(index, lib.core_read(self._core, index, space, offset, size, data))
        return int(data[0])

    def write(self, index: int, space: int, offset: int, size: int, data: int, posted: bool) -> None:
        """A register write from Python; unless `posted`, it has taken effect on return.

        Raises:
            DeviceGone: the device is dead, or has just died of this.
            ValueError: no such device, a `size` that is not 1, 2, 4 or 8, or `data` that does not fit it.
        """
        self._check(index, lib.core_write(self._core, index, space, offset, size, data, posted))

    @staticmethod
    def _check(index: int, gone: int) -> None:
        if gone == lib.CORE_INVALID:
            raise ValueError(f"no such access to device {index}")
        if gone:
            raise DeviceGone(index, _gone_text(gone & 0xFF, gone >> 8))

    def set_pci_function(self, devfn: int, index: int) -> None:
        """Function `devfn` (device << 3 | function) of bus 0 is device `index`.

        Raises:
            IndexError: no such function or device.
        """
        if lib.core_set_pci_function(self._core, devfn, index):
            raise IndexError(f"function {devfn}, device {index}")

    @property
    def pci_address(self) -> int:
        """CONFIG_ADDRESS, as the guest last wrote it."""
        return int(lib.core_pci_address(self._core))

    def coalesce(self, vcpu_fd: int, page: int, index: int) -> None:
        """KVM coalesces writes to device `index`: post them before any later access to it, and in `drain`.

        `page` of any vCPU is the VM's ring (KVM_CAP_COALESCED_MMIO).  Before any vCPU runs.

        Raises:
            OSError: it cannot be mapped, or there is no such device.
        """
        if lib.core_coalesce(self._core, vcpu_fd, page, index):
            raise OSError(ffi.errno, f"coalesced writes: {os.strerror(ffi.errno)}")

    def oldest_coalesced(self) -> int | None:
        """Where in KVM's ring the oldest write is that nobody has posted yet, if there is one."""
        at = int(lib.core_oldest(self._core))
        return None if at == lib.CORE_INVALID else at

    def drain(self) -> None:
        """Post what KVM has coalesced: a guest that writes and then halts makes no exit.

        Raises:
            DeviceGone: the device is dead, or has just died of this.
        """
        gone = ffi.new("uint32_t *")
        if lost := lib.core_drain(self._core, gone):
            raise DeviceGone(lost - 1, _gone_text(gone[0] & 0xFF, gone[0] >> 8))

    def device_counters(self, index: int) -> DeviceCounters:
        """Raises IndexError if there is no such device."""
        counters = ffi.new("struct core_device_counters *")
        if lib.core_device_counters(self._core, index, counters):
            raise IndexError(f"device {index}")
        return DeviceCounters(counters.reads, counters.writes, counters.shadowed, counters.wait_ns)

    def float_counters(self) -> FloatCounters:
        """What nobody owned, by vCPUs only."""
        counters = ffi.new("uint64_t[2]")
        lib.core_float_counters(self._core, counters, counters + 1)
        return FloatCounters(*counters)


class ExitKind(enum.IntEnum):
    """Why `CoreVcpu.run` returned."""

    STOPPED = lib.EXIT_STOPPED
    IO = lib.EXIT_IO
    DEVICE_DEAD = lib.EXIT_DEVICE_DEAD
    SHUTDOWN = lib.EXIT_SHUTDOWN
    SYSTEM_EVENT = lib.EXIT_SYSTEM_EVENT
    INTERNAL_ERROR = lib.EXIT_INTERNAL_ERROR
    FAIL_ENTRY = lib.EXIT_FAIL_ENTRY
    IOAPIC_EOI = lib.EXIT_IOAPIC_EOI
    IRQ_WINDOW_OPEN = lib.EXIT_IRQ_WINDOW_OPEN
    HLT = lib.EXIT_HLT
    UNKNOWN = lib.EXIT_UNKNOWN
    RUN_FAILED = lib.EXIT_RUN_FAILED


_KINDS = {kind.value: kind for kind in ExitKind}
_INTERNAL_ERROR_EMULATION = 1  # <linux/kvm.h>


class Exit:
    """One exit: a view of the loop's own record, good until the next `run`.

    Each property is good for the kinds that it names.
    """

    __slots__ = ("_exit", "kind")

    def __init__(self, kind: ExitKind, record: ffi.CData) -> None:
        self.kind = kind
        self._exit = record

    @property
    def is_mmio(self) -> bool:
        """IO: `addr` is guest-physical, not a port."""
        return bool(self._exit.is_mmio)

    @property
    def is_write(self) -> bool:
        """IO."""
        return bool(self._exit.is_write)

    @property
    def addr(self) -> int:
        """IO: absolute."""
        return int(self._exit.addr)

    @property
    def size(self) -> int:
        """IO: 1, 2, 4 or 8; [addr, addr + size) lies in one range."""
        return int(self._exit.size)

    @property
    def data(self) -> int:
        """IO: what is written; of a read, all ones until `complete`."""
        return int(self._exit.data)

    @property
    def index(self) -> int:
        """DEVICE_DEAD."""
        return int(self._exit.index)

    @property
    def cause(self) -> str:
        """DEVICE_DEAD."""
        return _gone_text(self._exit.cause, self._exit.error)

    @property
    def event(self) -> int:
        """SYSTEM_EVENT: its KVM_SYSTEM_EVENT_ type."""
        return int(self._exit.reason)

    @property
    def vector(self) -> int:
        """IOAPIC_EOI."""
        return int(self._exit.reason)

    @property
    def reason(self) -> int:
        """INTERNAL_ERROR: suberror; FAIL_ENTRY: the hardware's reason; UNKNOWN: KVM's exit reason."""
        return int(self._exit.reason)

    @property
    def values(self) -> tuple[int, ...]:
        """SYSTEM_EVENT, INTERNAL_ERROR: what KVM says beside it, at most 16 words."""
        return tuple(self._exit.values[0 : self._exit.n_values])

    def describe(self) -> str:
        """One line for the user."""
        match self.kind:
            case ExitKind.IO:
                bus = "mmio" if self.is_mmio else "port"
                return f"{'write' if self.is_write else 'read'} of {self.size} at {bus} {self.addr:#x}"
            case ExitKind.DEVICE_DEAD:
                return f"device {self.index}: {self.cause}"
            case ExitKind.SYSTEM_EVENT:
                return f"system event {self.event}"
            case ExitKind.INTERNAL_ERROR if self.reason == _INTERNAL_ERROR_EMULATION:
                return f"KVM cannot emulate an instruction of the guest{self._instruction()}"
            case ExitKind.INTERNAL_ERROR:
                words = " ".join(f"{v:#x}" for v in self.values)
                return f"KVM internal error {self.reason} ({words})"
            case ExitKind.FAIL_ENTRY:
                return f"the processor refuses to enter the guest, reason {self.reason:#x}"
            case ExitKind.IOAPIC_EOI:
                return f"end of interrupt {self.vector:#x}"
            case ExitKind.UNKNOWN:
                return f"unexpected KVM exit reason {self.reason}"
            case ExitKind.RUN_FAILED:
                return str(KvmError("KVM_RUN", self._exit.error))
            case _:
                return self.kind.name.lower().replace("_", " ")

    def _instruction(self) -> str:
        """The bytes that KVM could not emulate (struct kvm_run, emulation_failure), if it says."""
        flags, *words = self.values or (0,)
        raw = b"".join(w.to_bytes(8, "little") for w in words[:2])
        return f": {raw[1 : 1 + min(raw[0], 15)].hex(' ')}" if flags & 1 and len(raw) == 16 else ""


class CoreVcpu:
    """One vCPU in the exit loop; `run` is for one thread at a time, `stop` for any."""

    def __init__(self, core: Core, vcpu_fd: int, run: mmap.mmap) -> None:
        """Both `vcpu_fd` and its `run` page must outlive this.

        Raises:
            ValueError: the page is smaller than a kvm_run.
        """
        self._core = core  # the loop points into it
        self._run_page = ffi.from_buffer(run, require_writable=True)
        vcpu = lib.core_vcpu_new(core._core, vcpu_fd, self._run_page, len(run))
        if vcpu == ffi.NULL:
            raise ValueError(f"a run page of {len(run)} bytes")
        self._vcpu = ffi.gc(vcpu, lib.core_vcpu_free)
        self._exit = lib.core_vcpu_exit(vcpu)

    def run(self) -> Exit:
        """Run the guest until there is something for Python; the GIL is released.

        After IO (a read having been answered by `complete`, else it gives all ones), STOPPED or
        DEVICE_DEAD the next call goes on where this one left; the access that found its device dead is
        tried again, by the routes there are then.
        """
        return Exit(_KINDS[lib.core_vcpu_run(self._vcpu)], self._exit)

    def dispatch(self) -> Exit | None:
        """Act on the exit in the run page as `run` does after KVM_RUN; None: served, nothing for Python.

        The part of `run` that needs no KVM, for tests and fuzzers.
        """
        kind = lib.core_vcpu_dispatch(self._vcpu)
        return Exit(_KINDS[kind], self._exit) if kind else None

    def complete(self, value: int) -> None:
        """What the read of the last IO exit gives (the low bytes that fit)."""
        lib.core_vcpu_complete(self._vcpu, value)

    def stop(self) -> None:
        """Have the `run` under way, or else the next one, return STOPPED, once; from any thread.

        A `run` that waits for a device returns when that is over, within the deadline.
        """
        lib.core_vcpu_stop(self._vcpu)

    def close(self) -> None:
        """Let go of the run page; no `run` may be under way."""
        ffi.release(self._vcpu)
        ffi.release(self._run_page)


def install_kick_signal() -> None:
    """Make SIGRTMIN, which `stop` sends to the thread, interrupt KVM_RUN and do nothing else.

    Raises:
        OSError: the kernel refuses.
    """
    if lib.core_install_kick_signal():
        raise OSError(ffi.errno, os.strerror(ffi.errno))
