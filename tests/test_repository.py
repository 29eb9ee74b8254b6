"""What CONTRIBUTING asks of every change: lint, types, import direction, a complete catalogue."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devproc.catalog import CATALOG, Entry
from supervisor import confine

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kvmcore", "devproc", "policies", "supervisor")
POWERS = {"os", "socket", "time", "threading", "select", "subprocess"}
IMPORTERS = {
    "msgpack": {"devproc/wire.py"},
    "pyseccomp": {"policies/crosscheck.py"},
    "prctl": {"devproc/jail.py"},
    "elftools": {"kvmcore/elf.py"},
    "cffi": {"kvmcore/_build.py"},
    "kvmcore._core": {"kvmcore/exitloop.py"},
    "distributed": {"supervisor/fuzzcluster.py"},
    "fsspec": {"supervisor/fuzzcluster.py"},
}


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """Every module that the file imports, wherever in it; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run(tool: str, *arguments: str) -> None:
    """A tool of this environment must find nothing; what it finds is the failure's text."""
    program = shutil.which(tool, path=str(Path(sys.executable).parent))
    assert program is not None, f"{tool} is not installed beside {sys.executable}"
    done = subprocess.run([program, *arguments], cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        pytest.fail(f"{tool} {' '.join(arguments)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_finds_nothing_to_lint() -> None:
    run("ruff", "check", ".", "integration/testbed/run")


def test_ruff_finds_nothing_to_format() -> None:
    run("ruff", "format", "--diff", "--quiet", ".", "integration/testbed/run")


def test_mypy_finds_nothing_in_our_packages() -> None:
    run("mypy")


def test_packages_import_each_other_only_in_the_allowed_direction() -> None:
    run("lint-imports")


def test_device_models_import_no_powers() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources("devproc/devices", "devproc/virtio")
        for name in imported(path)
        if name.partition(".")[0] in POWERS
    }
    assert not found


def test_device_processes_use_nothing_of_kvmcore_but_its_memory() -> None:
    found = {name for path in sources("devproc") for name in imported(path) if name.startswith("kvmcore")}
    assert all(name == "kvmcore" or name.startswith("kvmcore.memory") for name in found)


@pytest.mark.parametrize("library", IMPORTERS)
def test_an_untyped_library_has_one_importer(library: str) -> None:
    found = {
        str(path.relative_to(ROOT))
        for path in sources(*PACKAGES)
        if any(name == library or name.startswith(f"{library}.") for name in imported(path))
    }
    assert found == IMPORTERS[library]


@pytest.mark.parametrize("entry", CATALOG.values(), ids=CATALOG)
def test_a_catalogue_entry_is_complete(entry: Entry) -> None:
    """The five steps of adding a device; the fifth's guest is looked for by the boots themselves."""
    module = entry.module.rpartition(".")[2]
    placed = ast.walk(ast.parse((ROOT / "supervisor/machine.py").read_text()))
    missing = [
        what
        for what, there in {
            f"the module devproc/devices/{module}.py": (ROOT / f"devproc/devices/{module}.py").is_file(),
            f"its test tests/devproc/devices/test_{module}.py": (
                ROOT / f"tests/devproc/devices/test_{module}.py"
            ).is_file(),
            f"its policy policies/{entry.name}.policy": (ROOT / f"policies/{entry.name}.policy").is_file(),
            "its line in supervisor/machine.py": any(
                isinstance(node, ast.Constant) and node.value == entry.name for node in placed
            ),
        }.items()
        if not there
    ]
    assert not missing
    assert module.replace("_", "-") == entry.name


def test_no_device_is_missing_from_the_catalogue() -> None:
    models = {p.stem for p in sources("devproc/devices") if not p.stem.startswith("_")}
    assert models == {e.module.rpartition(".")[2] for e in CATALOG.values()}
    policies = {p.stem for p in (ROOT / "policies").glob("*.policy")}
    assert policies == {*CATALOG, "base", "virtio", "vhost-user", *confine.POLICIES, "interpreter"}
