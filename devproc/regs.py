"""Registers as data: the datasheet page is the table, and the table dispatches, documents and traces.

A model lists its registers in `TABLES`.  For each register it either lets the table keep the value
(`stored`) or has a method `read_NAME` / `write_NAME`; a name that is missing or matches no register is a
TypeError when the class is defined, that is, at import.  Accesses are little-endian and byte-addressed:
one that is exactly a register is one call, any other is split into byte accesses at successive offsets,
as an 8-bit ISA device or a PCI function would see it.  A register wider than a byte that is not stored takes
writes only whole.  What no register claims floats (`Table.hole`); other writes vanish; both are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, ClassVar, Final, Literal

from devproc.digest import sha256
from devproc.record import record
from devproc.wire import Space

INDEXED: Final = len(Space)
"""The space of a table behind an index and data register: no guest access names it directly."""

BYTES: Final = [bytes([i]) for i in range(256)]

Access = Literal["RW", "RO", "WO", "W1C"]
Reader = Callable[[], int]
Writer = Callable[[int], None]


@record
class Register:
    """One register of the datasheet.

    `offset` from the base of its space, `size` in bytes; `mask` the bits a guest can write (for "W1C":
    clear by writing 1).  `stored`: `Model.stored[name]` holds the value, a read returns it, and a
    `write_NAME` method, where there is one, is called afterwards with the data as it was written (bytes
    outside the access are the stored ones, or 0 for "W1C").  Otherwise `read_NAME() -> int` and
    `write_NAME(data)` are the register; with `via` they are `read_VIA(offset)` and
    `write_VIA(offset, data)`, shared by the registers of a group.  `when` names the bank in which the
    register is visible; "" is every bank.  `shadow`: `shadow_NAME() -> int | None` is what `read_NAME` would
    return while it changes nothing, else None; the guest may then be answered without the device.  `run`:
    `write_NAME` takes bytes, each of which was written in its turn.
    """

    name: str
    offset: int
    access: Access
    meaning: str
    section: str
    size: int = 1
    reset: int = 0
    mask: int = 0xFF
    stored: bool = False
    via: str = ""
    when: str = ""
    shadow: bool = False
    run: bool = False

    @property
    def writable(self) -> int:
        """The bits a write can change."""
        return 0 if self.access == "RO" else self.mask


@record
class Table:
    """The registers of one space of `size` bytes; `hole` is the byte read where there is none."""

    space: int
    size: int
    registers: tuple[Register, ...]
    hole: int = 0xFF

    def banks(self) -> list[str]:
        """The names of the banks; the first is the one selected at reset."""
        return list(dict.fromkeys(r.when for r in self.registers if r.when)) or [""]


class _Bank:
    """The dispatch of one bank: per byte offset, and per (offset, size) for whole wide registers.

    `run`: bytes written one after the other at the same offset.
    """

    __slots__ = ("read", "read_whole", "run", "table", "write", "write_whole")

    def __init__(self, table: Table) -> None:
        self.table = table
        self.read: dict[int, Reader] = {}
        self.write: dict[int, Writer] = {}
        self.read_whole: dict[tuple[int, int], Reader] = {}
        self.write_whole: dict[tuple[int, int], Writer] = {}
        self.run: dict[int, Callable[[bytes], None]] = {}


class Model:
    """Base of every device model: dispatch from `TABLES`, and what of `ports.Device` only some models need.

    Nothing a guest does raises out of `read` or `write`.
    """

    TABLES: ClassVar[tuple[Table, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not cls.TABLES:  # a base of several models
            return
        wanted: set[str] = set()
        allowed: set[str] = set()
        for table in cls.TABLES:
            _check_layout(cls.__name__, table)
            for r in table.registers:
                if r.stored and r.access != "RO":
                    allowed.add(f"write_{r.name}")
                if not r.stored:
                    wanted |= {f"{verb}_{r.via or r.name}" for verb in _verbs(r)}
                if r.shadow:
                    wanted.add(f"shadow_{r.name}")
        present = {name for name in dir(cls) if name.startswith(("read_", "write_", "shadow_"))}
        if missing := wanted - present:
            raise TypeError(f"{cls.__name__} lacks {', '.join(sorted(missing))}")
        if unknown := present - wanted - allowed:
            raise TypeError(f"{cls.__name__} has {', '.join(sorted(unknown))}, which no register uses")

    def __init__(self) -> None:
        self.stored: Final = {r.name: r.reset for t in self.TABLES for r in t.registers if r.stored}
        self._unclaimed_reads = 0
        self._unclaimed_writes = 0
        self._banks: Final = {(t.space, bank): self._bind(t, bank) for t in self.TABLES for bank in t.banks()}
        # One slot per space, so that an access costs list indexing and no search.
        floating = self._bind(Table(INDEXED, 0, ()), "")
        self._now: Final = [floating] * (INDEXED + 1)
        self.shadows: Final[Mapping[int, Callable[[], int | None]]] = {
            r.offset: getattr(self, f"shadow_{r.name}") for t in self.TABLES for r in t.registers if r.shadow
        }
        for table in self.TABLES:
            self.select(table.space, table.banks()[0])

    def select(self, space: int, bank: str) -> None:
        """Make `bank` the visible one of `space`."""
        self._now[space] = self._banks[space, bank]

    def read(self, space: int, offset: int, size: int) -> int:
        bank = self._now[space]
        if size == 1:
            reader = bank.read.get(offset)
            return reader() if reader is not None else self._float(bank.table, offset)
        whole = bank.read_whole.get((offset, size))
        if whole is not None:
            return whole()
        value = 0
        for i in range(size):
            reader = bank.read.get(offset + i)
            value |= (reader() if reader is not None else self._float(bank.table, offset + i)) << 8 * i
        return value

    def write(self, space: int, offset: int, size: int, data: int) -> None:
        bank = self._now[space]
        if size == 1:
            writer = bank.write.get(offset)
            if writer is not None:
                writer(data & 0xFF)
            else:
                self._unclaimed_writes += 1
            return
        whole = bank.write_whole.get((offset, size))
        if whole is not None:
            whole(data & ((1 << 8 * size) - 1))
            return
        for i in range(size):
            self.write(space, offset + i, 1, data >> (8 * i))

    def writes(self, space: int, offset: int, data: bytes) -> None:
        run = self._now[space].run.get(offset)
        if run is not None:
            run(data)
            return
        for byte in data:
            self.write(space, offset, 1, byte)

    @property
    def deadline_ns(self) -> int | None:
        return None

    def on_deadline(self, now_ns: int) -> None:
        pass

    def stop(self) -> None:
        pass

    def set(self, name: str, value: int) -> None:
        raise AssertionError(f"no setting {name}")

    def counters(self) -> dict[str, int]:
        return {"unclaimed_reads": self._unclaimed_reads, "unclaimed_writes": self._unclaimed_writes}

    def stored_values(self) -> tuple[int, ...]:
        """The stored registers in table order, for `save`."""
        return tuple(self.stored.values())

    def check_stored(self, values: tuple[int, ...]) -> None:
        """Check what `stored_values` gave.

        Raises:
            ValueError: a wrong count, or a value a guest cannot have made.
        """
        registers = [r for t in self.TABLES for r in t.registers if r.stored]
        if len(values) != len(registers):
            raise ValueError(f"{len(values)} stored registers, expected {len(registers)}")
        for r, value in zip(registers, values, strict=True):
            if (value ^ r.reset) & ~r.writable:
                raise ValueError(f"{r.name}: {value:#x} has bits that no write can have made")

    def restore_stored(self, values: tuple[int, ...]) -> None:
        """Take values that `check_stored` has passed; no `write_NAME` is called."""
        self.stored.update(zip(self.stored, values, strict=True))

    def _float(self, table: Table, offset: int) -> int:
        self._unclaimed_reads += 1
        return table.hole if offset < table.size else 0xFF

    def _bind(self, table: Table, bank: str) -> _Bank:
        bound = _Bank(table)
        for r in table.registers:
            if r.when not in ("", bank):
                continue
            if r.access != "WO":
                self._bind_reader(bound, r)
            if r.access != "RO":
                self._bind_writer(bound, r)
        return bound

    def _bind_reader(self, bound: _Bank, r: Register) -> None:
        whole: Reader
        if r.stored:
            whole = partial(self.stored.__getitem__, r.name)
        else:
            method = getattr(self, f"read_{r.via or r.name}")
            whole = partial(method, r.offset) if r.via else method
        if r.size == 1:
            bound.read[r.offset] = whole
            return
        bound.read_whole[r.offset, r.size] = whole
        for i in range(r.size):
            bound.read[r.offset + i] = partial(_byte_of, whole, 8 * i)

    def _bind_writer(self, bound: _Bank, r: Register) -> None:
        if not r.stored:
            method = getattr(self, f"write_{r.via or r.name}")
            writer = partial(method, r.offset) if r.via else method
            if r.run:
                bound.run[r.offset] = method
                bound.write[r.offset] = partial(_write_one, method)
            elif r.size == 1:
                bound.write[r.offset] = writer
            else:
                bound.write_whole[r.offset, r.size] = writer
            return
        hook: Writer | None = getattr(self, f"write_{r.name}", None)
        if r.size > 1:
            bound.write_whole[r.offset, r.size] = partial(self._store, r, hook, 0, r.size)
        for i in range(r.size):
            bound.write[r.offset + i] = partial(self._store, r, hook, i, 1)

    def _store(self, r: Register, hook: Writer | None, first: int, size: int, data: int) -> None:
        """A write of `size` bytes from byte `first` of a stored register."""
        old = self.stored[r.name]
        data <<= 8 * first
        if r.access == "W1C":
            self.stored[r.name] = old & ~(data & r.mask)
        else:
            data |= old & ~(((1 << 8 * size) - 1) << 8 * first)
            self.stored[r.name] = (old & ~r.mask) | (data & r.mask)
        if hook is not None:
            hook(data)


def _write_one(method: Callable[[bytes], None], data: int) -> None:
    method(BYTES[data])


def _byte_of(whole: Reader, shift: int) -> int:
    return (whole() >> shift) & 0xFF


def _verbs(r: Register) -> tuple[str, ...]:
    return {"RO": ("read",), "WO": ("write",)}.get(r.access, ("read", "write"))


def _check_layout(model: str, table: Table) -> None:
    """Every register fits its space, and no two claim the same byte, direction and bank.

    Raises:
        TypeError: naming the register.
    """
    names = [r.name for r in table.registers]
    if len(set(names)) != len(names):
        raise TypeError(f"{model}: two registers have the same name")
    claimed: dict[tuple[str, str, int], str] = {}
    for r in table.registers:
        if r.offset < 0 or r.offset + r.size > table.size:
            raise TypeError(f"{model}.{r.name} lies outside its {table.size} bytes")
        if r.shadow and (table.space, r.size, r.access, r.when) != (Space.PORT, 1, "RO", ""):
            raise TypeError(
                f"{model}.{r.name}: only a byte of the port space that is always read-only has a shadow"
            )
        if r.run and (r.size, r.access, r.stored, r.via) != (1, "WO", False, ""):
            raise TypeError(f"{model}.{r.name}: only a byte that is only written, and not kept, takes runs")
        if (r.mask | r.reset) >> 8 * r.size:
            raise TypeError(f"{model}.{r.name}: mask or reset value is wider than the register")
        for verb in _verbs(r):
            for byte in range(r.offset, r.offset + r.size):
                for bank in [r.when] if r.when else table.banks():
                    other = claimed.setdefault((verb, bank, byte), r.name)
                    if other != r.name:
                        raise TypeError(f"{model}.{r.name} and {other} both {verb} byte {byte:#x}")


def digest(model: type[Model]) -> bytes:
    """SHA-256 of the register tables: what `Ready` says, so that two ends know they mean the same device."""
    kind: Any = model
    return _digest(kind)


def _values(register: Register) -> tuple[Any, ...]:
    return tuple(getattr(register, name) for name in Register.__match_args__)


@cache
def _digest(model: type[Model]) -> bytes:
    tables = [(t.space, t.size, t.hole, [_values(r) for r in t.registers]) for t in model.TABLES]
    return sha256(repr(tables).encode())


def names_at(model: type[Model], space: int, offset: int, *, write: bool) -> str:
    """The registers an access may mean, for traces: "THR|DLL", or "?" where there is none."""
    found = [
        r.name
        for t in model.TABLES
        if t.space == space
        for r in t.registers
        if r.offset <= offset < r.offset + r.size and ("write" if write else "read") in _verbs(r)
    ]
    return "|".join(found) or "?"


def describe(model: type[Model]) -> str:
    """The register tables as text for `vmsup device show`; runs of like registers take one line."""
    return "\n".join(line for t in model.TABLES for line in _lines(t))


def _lines(table: Table) -> Iterator[str]:
    space = "behind the index register" if table.space == INDEXED else Space(table.space).name
    yield f"{space}: {table.size} bytes; elsewhere reads {table.hole:#04x}"
    yield f"  {'offset':<9} {'name':<22} {'size':<4} {'access':<6} {'reset':<10} {'mask':<10} meaning"
    run: list[Register] = []
    for r in [*table.registers, None]:
        if r is not None and run and r.offset == run[-1].offset + 1 and _alike(r, run[-1]):
            run.append(r)
            continue
        if run:
            yield _line(run)
        run = [r] if r is not None else []


def _alike(a: Register, b: Register) -> bool:
    return a.stored and b.stored and (a.meaning, a.access, a.mask) == (b.meaning, b.access, b.mask)


def _line(run: list[Register]) -> str:
    r, last = run[0], run[-1]
    where = f"{r.offset:#04x}" + (f"-{last.offset:#04x}" if len(run) > 1 else "")
    name = r.name + (f"..{last.name}" if len(run) > 1 else "")
    note = (f" [{r.when}]" if r.when else "") + (" [shadow]" if r.shadow else "")
    reset, mask = (f"{v:#0{2 + 2 * r.size}x}" for v in (r.reset, r.writable))
    columns = f"{where:<9} {name:<22} {r.size:<4} {r.access:<6} {reset:<10} {mask:<10}"
    return f"  {columns} {r.meaning}{note} ({r.section})"
