"""`vmsup doctor` and its probe guest on this machine's own /dev/kvm."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from integration import kvm as local
from integration.ordinary import as_user
from kvmcore import probe
from kvmcore.errors import KvmError
from kvmcore.kvm import Kvm
from kvmcore.probe import ABSENT, GROUPS, OK, Group

pytestmark = pytest.mark.kvm


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    try:
        handle = Kvm()
    except KvmError as e:
        pytest.skip(str(e))
    with handle:
        yield handle


def test_every_group_has_an_answer_and_what_every_kvm_can_do_is_ok(kvm: Kvm) -> None:
    answers = probe.instructions(kvm)
    assert list(answers) == [g.name for g in GROUPS]
    for name in (
        "cpuid",
        "rdtsc",
        "ud2",
        "page fault",
        "iretq",
        "rdmsr, wrmsr",
        "hlt until a timer interrupt",
    ):
        assert answers[name] == OK


def test_a_group_that_fails_or_hangs_is_named_and_the_others_still_run(
    kvm: Kvm, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = GROUPS[0]
    groups = (
        fine,
        Group("for ever", "1: jmp 1b", "ebfe"),
        Group("wrong", "test %rsp,%rsp", "4885e4"),
        Group("no such instruction", "ud2", "0f0b"),
        Group("another port", "out %al,$0xf5", "e6f5"),
        Group("triple fault", "lidt (%rdi); ud2", "0f011f0f0b"),
        fine,
    )
    monkeypatch.setattr(probe, "GROUPS", groups)
    assert probe.instructions(kvm) == {
        fine.name: OK,
        "for ever": "no answer for 3 s",
        "wrong": "wrong result",
        "no such instruction": "#UD",
        "another port": "KVM_EXIT_IO at port 0xf5",
        "triple fault": "KVM_EXIT_SHUTDOWN",
    }


def test_an_instruction_that_the_guest_lacks_is_not_run(kvm: Kvm, monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group("hang", "1: jmp 1b", "ebfe", feature=probe.Feature(0x4FFF_FFFF, "ecx", 0))
    monkeypatch.setattr(probe, "GROUPS", (group,))
    assert probe.instructions(kvm) == {"hang": ABSENT}


def doctor(*prefix: str) -> tuple[int, dict[str, object]]:
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "supervisor.cli", "doctor", "--json"],
        stdout=subprocess.PIPE,
        check=False,
        timeout=60,
    )
    return done.returncode, json.loads(done.stdout)


def test_the_commands_verdict_is_its_exit_code(kvm: Kvm) -> None:
    code, report = doctor()
    assert code == (0 if report["can_run"] else 33)
    assert report["kvm"]["stock_kernel"] == (local.no_linux() is None)  # type: ignore[index]
    assert report["user"] == {"uid": os.geteuid(), "root": os.geteuid() == 0}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_is_offered_the_same_layers_but_one() -> None:
    somebody = as_user()
    _, root = doctor()
    code, user = doctor(*somebody)
    assert code in (0, 33)
    root_layers, user_layers = (r["jail"]["layers"] for r in (root, user))  # type: ignore[index]
    assert {n for n in root_layers if root_layers[n] != user_layers[n]} <= {"own host uid"}
