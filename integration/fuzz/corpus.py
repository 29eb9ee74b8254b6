"""A fuzzer's corpus as a text file: one input a line, in hexadecimal, the short ones first."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

REGRESSIONS = Path(__file__).parents[2] / "tests" / "regressions"


def load(name: str) -> list[bytes]:
    """The inputs kept for target `name`."""
    return [bytes.fromhex(line) for line in (REGRESSIONS / f"{name}.hex").read_text().splitlines()]


def save(name: str, inputs: Iterable[bytes]) -> None:
    lines = [data.hex() for data in sorted(set(inputs), key=lambda data: (len(data), data)) if data]
    (REGRESSIONS / f"{name}.hex").write_text("".join(f"{line}\n" for line in lines))


def unpack(inputs: Iterable[bytes], where: Path) -> None:
    """One file each, as libFuzzer wants them."""
    where.mkdir()
    for data in inputs:
        (where / hashlib.sha256(data).hexdigest()).write_bytes(data)


def pack(where: Path) -> list[bytes]:
    return [path.read_bytes() for path in where.iterdir()]
