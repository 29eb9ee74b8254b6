"""Our compiler against minijail's own, over every policy of crosvm and every policy of ours.

Needs checkouts that are no part of this repository: VMSUP_MINIJAIL names one of google/minijail,
VMSUP_CROSVM one of google/crosvm.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from devproc.catalog import CATALOG
from policies import bpf
from policies.compile import compile_single
from policies.constants import CONSTANTS, ERRNOS
from policies.errors import PolicyError
from policies.parse import DIRECTORY, load
from policies.policy import U64_MAX, Policy
from policies.simulate import corners, simulate
from policies.syscalls import AUDIT_ARCH_X86_64, SYSCALLS, X32_BIT

MINIJAIL, CROSVM = os.environ.get("VMSUP_MINIJAIL", ""), os.environ.get("VMSUP_CROSVM", "")
SECCOMP = Path(CROSVM) / "jail/seccomp/x86_64"
CROSVM_POLICIES = sorted(p.name for p in SECCOMP.glob("*.policy")) if CROSVM else []
NUMBERS = [*range(600), X32_BIT - 1, *(X32_BIT + i for i in range(600)), 0xFFFFFFFF]
ARCHITECTURES = [AUDIT_ARCH_X86_64, 0x40000003, 0xC00000B7]

PROBES = {"uretprobe"}  # the kernel's own, no policy may name it
REFUSED = {"fs_device_vhost_user.policy": "an included file includes nothing"}
"""What we refuse on purpose, and why; minijail's compiler takes it, its library does not."""

pytestmark = pytest.mark.skipif(
    not (MINIJAIL and CROSVM), reason="VMSUP_MINIJAIL and VMSUP_CROSVM do not name checkouts"
)


@pytest.fixture(scope="module")
def tools() -> Iterator[Any]:
    """minijail's modules arch, bpf, compiler: plain files that import each other by name."""
    sys.path.insert(0, str(Path(MINIJAIL) / "tools"))
    arch, their_bpf, compiler = (importlib.import_module(name) for name in ("arch", "bpf", "compiler"))

    class Tools:
        Arch, simulate, KillProcess = arch.Arch, staticmethod(their_bpf.simulate), their_bpf.KillProcess
        Compiler, strategies = compiler.PolicyCompiler, compiler.OptimizationStrategy

    yield Tools
    sys.path.pop(0)


@pytest.fixture(scope="module")
def constants() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((SECCOMP / "constants.json").read_text())
    return table


@pytest.fixture(scope="module")
def crosvm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """crosvm's policies as its build lays them side by side, without the hints for minijail's optimiser."""
    directory = tmp_path_factory.mktemp("crosvm")
    for path in SECCOMP.glob("*.policy"):
        lines = path.read_text().replace("/usr/share/policy/crosvm/", "./").splitlines(keepends=True)
        text = "".join(line for line in lines if not line.startswith("@frequency"))
        (directory / path.name).write_text(text)
    return directory


def compile_theirs(tools: Any, table: dict[str, Any], path: Path) -> Any:
    arch = tools.Arch.load_from_json_bytes(json.dumps(table))
    return tools.Compiler(arch).compile_file(
        str(path), optimization_strategy=tools.strategies.BST, kill_action=tools.KillProcess()
    )


def questions(policy: Policy) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """Every number on every architecture, and every corner of every comparison."""
    for nr, arch in product(NUMBERS, ARCHITECTURES):
        yield nr, (0,) * 6, arch
    calls = policy.by_call()
    for nr in range(600):
        rules = [r for name, rs in calls.items() for r in rs if SYSCALLS[name] == nr]
        atoms = [a for r in rules for c in r.clauses for a in c]
        compared = {a.arg for a in atoms}
        values = [corners([a for a in atoms if a.arg == i]) if i in compared else [0] for i in range(6)]
        yield from ((nr, args, AUDIT_ARCH_X86_64) for args in product(*values))


def theirs_says(tools: Any, program: Any, nr: int, args: tuple[int, ...], arch: int) -> str:
    cost, name, *number = tools.simulate(program.instructions, arch, nr, *args)
    assert cost
    return f"{name} {number[0]}" if number else str(name)


def ours_says(program: bytes, nr: int, args: tuple[int, ...], arch: int) -> str:
    action = simulate(program, nr, args, arch)
    return f"ERRNO {action & bpf.DATA}" if action & bpf.ACTION_FULL == bpf.ERRNO else bpf.action_name(action)


def assert_same(tools: Any, policy: Policy, theirs: Any) -> None:
    ours = compile_single(policy)
    asked = 0
    for nr, args, arch in questions(policy):
        asked += 1
        assert ours_says(ours, nr, args, arch) == theirs_says(tools, theirs, nr, args, arch), (nr, args, arch)
    print(f"{policy.name}: {len(ours) // 8} instructions, theirs {len(theirs.instructions)}, {asked} calls")


@pytest.mark.parametrize("name", CROSVM_POLICIES)
def test_a_crosvm_policy_means_what_minijail_says(
    name: str, tools: Any, constants: dict[str, Any], crosvm: Path
) -> None:
    try:
        policy = load(str(crosvm / name), constants["constants"])
    except PolicyError as e:
        assert name in REFUSED and REFUSED[name] in str(e), "\n".join(d.render() for d in e.diagnostics)
        return
    assert name not in REFUSED
    assert_same(tools, policy, compile_theirs(tools, constants, crosvm / name))


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_minijail_takes_our_policies_and_means_the_same(
    name: str, tools: Any, constants: dict[str, Any]
) -> None:
    slots = CATALOG[name].slots()
    table = {**constants, "constants": {**CONSTANTS, **ERRNOS, **slots}}
    assert_same(tools, load(name, slots), compile_theirs(tools, table, DIRECTORY / f"{name}.policy"))


def test_numbers_and_constants_are_those_that_minijail_generated(constants: dict[str, Any]) -> None:
    theirs = constants["constants"]
    shared = {name for name in CONSTANTS if name in theirs}
    assert {n: CONSTANTS[n] for n in shared} == {n: theirs[n] & U64_MAX for n in shared}
    numbers = {n: nr for n, nr in constants["syscalls"].items() if n not in PROBES}
    assert numbers == {n: SYSCALLS[n] for n in numbers}
    print(f"{len(shared)} constants, {len(numbers)} system calls")
