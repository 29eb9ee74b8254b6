"""devproc/virtio/CONFORMANCE.md tells the truth, and what every virtio device of the catalogue has in common.

`STATEMENTS` was counted by a script in the specification's sources (github.com/oasis-tcs/virtio-spec, tag
v1.2-cs01): for each section of device requirements of those that CONFORMANCE.md names, how often MUST or
SHOULD is in it, notes excepted.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from devproc.catalog import CATALOG
from devproc.virtio import spec
from devproc.wire import Space

ROOT = Path(__file__).resolve().parents[3]
STATEMENTS = {
    "2.1.2": 3, "2.2.2": 4, "2.4.1": 2, "2.5.2": 1, "2.6.1.1.1": 2, "2.6.1.2.1": 1, "2.7.4.1": 1,
    "2.7.5.1": 3, "2.7.5.3.2": 2, "2.7.7.2": 6, "2.7.8.2": 2, "2.7.10.2": 3, "2.8.12": 2, "2.8.15": 4,
    "2.8.18": 1, "2.10.2": 1, "4.1.1": 1, "4.1.2.1": 5, "4.1.3.2": 1, "4.1.4.2": 2, "4.1.4.3.1": 14,
    "4.1.4.4.1": 11, "4.1.4.5.1": 5, "4.1.4.6.1": 1, "4.1.4.7.1": 2, "4.1.4.8.1": 3, "4.1.4.9.1": 3,
    "4.1.5.1.2.1": 9, "4.1.5.3.1": 1, "4.1.5.4.1": 1, "5.1.4.1": 11, "5.1.6.2.2": 4, "5.1.6.3.2": 2,
    "5.1.6.4.1": 21, "5.1.6.5.1.1": 13, "5.1.6.5.2.1": 4, "5.1.6.5.4.2": 1, "5.1.6.5.6.2": 2,
    "5.1.6.5.7.3": 1, "5.2.5.2": 4, "5.2.6.2": 11, "5.3.5.1": 2, "5.3.6.2.1": 2, "5.4.6.2": 1,
    "5.5.6.3.2": 2, "5.5.6.5.2": 5, "5.5.6.7.2": 1, "5.10.6.1.2": 1, "5.10.6.3.2": 2, "5.10.6.4.2": 2,
    "5.11.4.2": 2, "5.11.6.2.1": 1, "5.11.6.4.1": 4, "6.2": 5,
}  # fmt: skip
CHAPTERS = {"5.1": 1, "5.2": 2, "5.3": 3, "5.4": 4, "5.5": 5, "5.10": 19, "5.11": 26}  # device ids
NAMES = sorted(name for name, entry in CATALOG.items() if entry.virtio is not None)
every_function = pytest.mark.parametrize("name", NAMES)


class Row(NamedTuple):
    section: str
    statements: int
    what: str
    shown: str


def rows() -> list[Row]:
    """The table of CONFORMANCE.md."""
    found = []
    for line in (ROOT / "devproc/virtio/CONFORMANCE.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0][0].isdigit():
            section, statements, what, shown = cells
            found.append(Row(section, int(statements), what, shown))
    return found


def names_in(module: str) -> set[str]:
    """The tests of a module, named as in the table."""
    folder, _, name = module.rpartition("/")
    where = (ROOT / "integration" / folder) if folder else ROOT / "tests"
    (path,) = where.rglob(f"test_{name}.py")
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return {function.name for function in functions}


def test_no_statement_is_missing() -> None:
    counted: Counter[str] = Counter()
    for row in rows():
        counted[row.section] += row.statements
    assert counted == STATEMENTS


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row.section} {row.what[:30]}")
def test_every_row_names_tests_or_features_or_a_reason(bench: Any, row: Row) -> None:
    kind, _, rest = row.shown.partition(": ")
    if kind == "not shown":
        assert rest
        return
    if kind == "not offered":
        chapter = CHAPTERS.get(".".join(row.section.split(".")[:2]))
        bits = [int(bit) for bit in re.findall(r"VIRTIO_\w+ \((\d+)\)", rest)]
        assert bits
        for name in NAMES:
            virtio = CATALOG[name].virtio
            assert virtio is not None
            if chapter in (None, virtio.device_id) and not name.startswith("vhost-user"):  # not its own
                assert not any(bench(name).driver().offered() >> bit & 1 for bit in bits), name
        return
    for group in row.shown.split("; "):
        module, _, names = group.partition(": ")
        assert {f"test_{name}" for name in names.split(", ")} <= names_in(module), group


@every_function
def test_what_is_offered_can_be_accepted_again_and_again(bench: Any, name: str) -> None:
    driver = bench(name).driver()
    offered = driver.offered()
    assert offered & spec.F_VERSION_1
    for features in (offered, spec.F_VERSION_1, offered):
        driver.start(features)
        assert driver.status & spec.FEATURES_OK
        assert driver.offered() == offered


@every_function
def test_the_structures_are_as_and_where_the_specification_wants_them(bench: Any, name: str) -> None:
    driver = bench(name).driver()
    virtio = CATALOG[name].virtio
    assert virtio is not None

    def config(at: int, size: int) -> int:
        return int(driver.function.read(Space.CONFIG, at, size))

    assert config(0, 4) == (0x1040 + virtio.device_id) << 16 | 0x1AF4
    assert config(8, 1) >= 1  # revision
    assert config(0x2E, 2) >= 0x40  # subsystem
    found: dict[int, tuple[int, int, int]] = {}  # type: length of the capability, offset, length
    at = config(0x34, 1)
    while at:
        if config(at, 1) == 0x09:
            kind = config(at + 3, 1)
            assert kind not in found
            found[kind] = config(at + 2, 1), config(at + 8, 4), config(at + 12, 4)
        else:
            assert config(at, 1) == 0x11
            vectors = (config(at + 2, 2) & 0x7FF) + 1
        at = config(at + 1, 1)
    # Neither shared memory (8) nor vendor data (9).
    assert {kind: size for kind, (size, _, _) in found.items()} == {1: 16, 2: 20, 3: 16, 4: 16, 5: 20}
    assert found[1][1] % 4 == found[2][1] % 2 == found[4][1] % 4 == 0
    multiplier = config(spec.CONFIG_NOTIFY + 16, 4)
    assert multiplier in (0, *(4**n for n in range(16)))
    queues = driver.get(spec.NUM_QUEUES, 2)
    assert queues == len(virtio.queue_sizes)
    for queue in range(queues):
        driver.put(spec.QUEUE_SELECT, 2, queue)
        assert found[2][2] >= driver.get(spec.QUEUE_NOTIFY_OFF, 2) * multiplier + 2
    assert 2 <= vectors <= queues + 1
