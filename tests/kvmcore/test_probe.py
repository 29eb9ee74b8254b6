import os
import shutil
import signal
import subprocess
import time

import pytest

from kvmcore import probe
from kvmcore.abi import Cap, CpuidEntry
from kvmcore.probe import ABSENT, GROUPS, OK, Feature, bounded, first_failure


@pytest.mark.skipif(shutil.which("as") is None, reason="needs an assembler: Debian package binutils")
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.name)
def test_a_groups_code_is_what_its_source_assembles_to(group, tmp_path):
    source, obj, code = tmp_path / "a.s", tmp_path / "a.o", tmp_path / "a.bin"
    source.write_text(group.asm.replace("; ", "\n") + "\n")
    subprocess.run(["as", "--64", "-o", obj, source], check=True)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", obj, code], check=True)
    assert code.read_bytes().hex() == group.code


def test_every_group_has_a_name_of_its_own():
    assert len({g.name for g in GROUPS}) == len(GROUPS)


def test_a_feature_is_a_bit_of_its_leafs_first_subleaf():
    feature = Feature(1, "ecx", 13)
    assert feature.among([CpuidEntry(1, 0, 0, 0, 0, 1 << 13, 0)])
    assert not feature.among([CpuidEntry(1, 0, 0, 0, 0, ~(1 << 13), 0)])
    assert not feature.among([CpuidEntry(1, 0, 0, 0, 1 << 13, 0, 1 << 13)])
    assert not feature.among([CpuidEntry(1, 1, 0, 0, 0, 1 << 13, 0), CpuidEntry(7, 0, 0, 0, 0, 1 << 13, 0)])
    assert not feature.among([])


def test_what_is_absent_from_cpuid_is_no_failure():
    assert first_failure({"cpuid": OK, "cmpxchg16b": ABSENT}) is None
    assert first_failure({"cpuid": OK, "int3": "#UD", "verw": "#GP"}) == "int3: #UD"


def test_every_extension_is_either_required_or_optional():
    assert set(probe.REQUIRED) | set(probe.OPTIONAL) == set(Cap)
    assert not set(probe.REQUIRED) & set(probe.OPTIONAL)


def test_the_lines_of_a_probe_are_told_in_order():
    assert bounded(lambda tell: [tell(str(n)) for n in range(3)]) == (["0", "1", "2"], None)


def test_a_line_stays_one_line():
    assert bounded(lambda tell: tell("a\nb")) == (["a b"], None)


def test_what_a_probe_changes_stays_in_its_process():
    before = os.getcwd()
    assert bounded(lambda tell: os.chdir("/")) == ([], None)
    assert os.getcwd() == before


def test_an_error_is_told_after_the_lines_before_it():
    def probe_(tell):
        tell("first")
        os.stat("/nonexistent")

    told, failure = bounded(probe_)
    assert told == ["first"]
    assert "No such file" in failure


def test_a_probe_that_is_killed_is_told():
    told, failure = bounded(lambda tell: os.kill(os.getpid(), signal.SIGKILL))
    assert (told, failure) == ([], "killed by signal 9")


def test_a_probe_that_hangs_is_killed_whatever_the_caller_does_with_sigalrm():
    before = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:

        def hang(tell):
            tell("first")
            time.sleep(60)

        assert bounded(hang, silence_s=1) == (["first"], "no answer for 1 s")
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_process_left")
def test_no_process_and_no_descriptor_is_left():
    held = len(os.listdir("/proc/self/fd"))
    bounded(lambda tell: tell("x"))
    bounded(lambda tell: os.kill(os.getpid(), signal.SIGKILL))
    assert len(os.listdir("/proc/self/fd")) == held
