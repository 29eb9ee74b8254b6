import dataclasses
import json
import logging
import os
import stat

import pytest

from kvmcore.probe import ABSENT, OK
from supervisor import doctor
from supervisor.doctor import JailReport, KvmReport, Report

KVM = KvmReport(True, True, 12, {"KVM_CAP_IRQCHIP": 1, "KVM_CAP_PIT2": 1}, {"cpuid": OK, "int3": OK}, None)
JAIL = JailReport({"namespaces": "offered", "landlock": "offered"}, (), 4)
GOOD = Report(1000, KVM, JAIL, "advise")


def with_kvm(**changes):
    return dataclasses.replace(GOOD, kvm=dataclasses.replace(KVM, **changes))


def test_a_host_that_offers_everything_can_run():
    assert GOOD.can_run
    assert GOOD.kvm_runs_stock_kernel
    assert "can run a stock kernel" in GOOD.text()
    assert GOOD.text().endswith("\nvmsup can run here")


def test_a_kvm_that_cannot_boot_linux_can_still_run_other_guests():
    report = with_kvm(instructions={"cpuid": OK, "int3": "KVM_EXIT_INTERNAL_ERROR: emulation failure"})
    assert report.can_run
    assert not report.kvm_runs_stock_kernel
    assert "int3: KVM_EXIT_INTERNAL_ERROR: emulation failure" in report.text()
    assert report.as_json()["kvm"]["stock_kernel"] is False


def test_an_instruction_that_the_guest_is_not_promised_does_not_count():
    assert with_kvm(instructions={"cpuid": OK, "cmpxchg16b": ABSENT}).kvm_runs_stock_kernel


def test_an_unusable_kvm_cannot_run_and_says_why():
    report = with_kvm(error="open /dev/kvm: no", extensions={}, instructions={})
    assert not report.can_run
    assert not report.kvm_runs_stock_kernel
    assert "open /dev/kvm: no" in report.text()
    assert report.text().endswith("vmsup cannot run here")


def test_a_lacking_layer_of_the_jail_cannot_run():
    jail = JailReport({"namespaces": "unshare: Operation not permitted"}, ("namespaces",), None)
    report = dataclasses.replace(GOOD, jail=jail)
    assert not report.can_run
    assert "unshare: Operation not permitted" in report.text()


def test_an_absent_optional_extension_is_named():
    assert "KVM_CAP_PIT2: absent" in with_kvm(extensions={"KVM_CAP_IRQCHIP": 1, "KVM_CAP_PIT2": 0}).text()


def test_a_host_without_huge_pages_is_told_what_they_are_good_for():
    assert "shmem_enabled" not in GOOD.text()
    assert "faster with 'advise'" in dataclasses.replace(GOOD, huge_pages="never").text()


def test_the_policy_for_huge_pages_is_the_word_in_brackets(tmp_path):
    policy = tmp_path / "shmem_enabled"
    assert doctor._examine_huge_pages(policy) == "never"
    policy.write_text("always within_size [advise] never deny force\n")
    assert doctor._examine_huge_pages(policy) == "advise"


def test_the_json_has_what_a_script_asks_for():
    found = json.loads(json.dumps(GOOD.as_json()))
    assert found["can_run"] is True
    assert found["user"] == {"uid": 1000, "root": False}
    assert found["kvm"]["present"] is found["kvm"]["permitted"] is found["kvm"]["stock_kernel"] is True
    assert found["kvm"]["api_version"] == 12
    assert found["kvm"]["instructions"]["int3"] == "ok"
    assert found["memory"]["huge_pages"] == "advise"
    assert found["jail"]["layers"]["namespaces"] == "offered"


def test_without_dev_kvm_the_report_says_so(tmp_path):
    report = doctor._examine_kvm(str(tmp_path / "kvm"))
    assert (report.present, report.permitted, report.api_version) == (False, False, None)
    assert "No such file" in report.error


def test_what_is_not_kvm_is_not_usable(tmp_path):
    (tmp_path / "kvm").touch()
    report = doctor._examine_kvm(str(tmp_path / "kvm"))
    assert (report.present, report.permitted) == (True, True)
    assert "KVM_GET_API_VERSION" in report.error


@pytest.mark.skipif(os.geteuid() == 0, reason="root is permitted everything")
def test_without_permission_the_report_says_so(tmp_path):
    (tmp_path / "kvm").touch(0o000)
    report = doctor._examine_kvm(str(tmp_path / "kvm"))
    assert (report.present, report.permitted) == (True, False)
    assert "EACCES" in report.error


def test_a_layer_this_kernel_never_had_is_told_and_not_lacking(monkeypatch):
    def try_jail(tell):
        tell(f"{logging.DEBUG}\tlandlock\tnot offered by this kernel: no Landlock")
        tell(f"{logging.WARNING}\troot\tpivot_root: Invalid argument")

    monkeypatch.setattr(doctor, "_try_jail", try_jail)
    report = doctor._examine_jail()
    assert report.layers["landlock"] == "not offered by this kernel: no Landlock"
    assert report.layers["seccomp"] == doctor.OFFERED
    assert report.lacking == ("root",)


def test_a_device_that_cannot_be_started_lacks_every_layer(monkeypatch):
    def try_jail(tell):
        raise OSError("fork: Resource temporarily unavailable")

    monkeypatch.setattr(doctor, "_try_jail", try_jail)
    report = doctor._examine_jail()
    assert report.layers["seccomp"] == "fork: Resource temporarily unavailable"
    assert "seccomp" in report.lacking


@pytest.mark.usefixtures("no_process_left")
def test_examining_leaves_nothing_behind():
    """On this host, whatever it offers: no process, no descriptor, no change of ours."""
    before = (os.getcwd(), os.readlink("/proc/self/ns/user"), len(os.listdir("/proc/self/fd")))
    doctor._examine_jail()
    assert (os.getcwd(), os.readlink("/proc/self/ns/user"), len(os.listdir("/proc/self/fd"))) == before
    assert stat.S_ISDIR(os.stat("/proc/self").st_mode)  # the host's /proc is still mounted
