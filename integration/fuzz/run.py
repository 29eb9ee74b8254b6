"""`make fuzz`: `run.py [SECONDS]` fuzzes the C core, the rings in C, and the wire, from tests/regressions.

A finding is printed and ends the run with status 1.  Otherwise what reached something new is kept there.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from integration.fuzz import corpus

HERE = Path(__file__).parent
LENGTH_MAX = {"core": 512, "ring": 512, "wire": 256}


def c_fuzzer(name: str, where: Path) -> list[str]:
    """The command of the fuzzer NAME.c, built in `where`."""
    clang = next((c for c in ("clang", "clang-19", "clang-16", "clang-14") if shutil.which(c)), None)
    if clang is None:
        sys.exit("no clang (Debian: clang-14 and libclang-rt-14-dev)")
    sanitizers = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined"]
    program = where / f"{name}.fuzzer"
    subprocess.run([clang, "-g", "-O1", *sanitizers, HERE / f"{name}.c", "-o", program], check=True)
    return [str(program)]


def wire_fuzzer() -> list[str]:
    return [sys.executable, "-m", "integration.fuzz.atheris_wire"]


def fuzz(name: str, command: list[str], seconds: int, where: Path, *, minimise: bool) -> None:
    found, kept = where / name / "found", where / name / "kept"
    found.parent.mkdir()
    corpus.unpack(corpus.load(name), found)
    options = [f"-max_len={LENGTH_MAX[name]}", f"-artifact_prefix={found.parent}/"]
    runs = [[f"-max_total_time={seconds}", "-print_final_stats=1", found]]
    if minimise:
        kept.mkdir()
        runs.append(["-merge=1", kept, found])
    for run in runs:
        if subprocess.run([*command, *options, *map(str, run)], check=False).returncode:
            for finding in sorted(found.parent.glob("*-*")):
                print(f"{name}: {finding.name}: {finding.read_bytes().hex()}")
            sys.exit(1)
    corpus.save(name, corpus.pack(kept if minimise else found))


def main() -> None:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    with tempfile.TemporaryDirectory() as directory:
        where = Path(directory)
        for name in ("core", "ring"):
            fuzz(name, c_fuzzer(name, where), seconds, where, minimise=True)
        # libFuzzer minimises in a process of its own, which Atheris cannot start.
        fuzz("wire", wire_fuzzer(), seconds, where, minimise=False)


if __name__ == "__main__":
    main()
