"""What `vmsup jail inspect` makes of what it finds; integration/jail has the processes."""

import os

import pytest

from devproc import jail
from devproc.catalog import CATALOG
from kvmcore.errors import ConfigError
from supervisor.attest import UNSEEN, Finding, Report, attest, of_vm

PROVEN = Finding("rtc", 7, "seccomp", "seccomp mode", "2", "2")
DIFFERS = Finding("rtc", 7, "seccomp", "seccomp filters", "2", "0")
HIDDEN = Finding("rtc", 7, "descriptors", "descriptors", "0 null", None)


def test_a_hidden_field_is_not_proven():
    report = Report(1000, (PROVEN, HIDDEN), {})
    assert report.unproven == [HIDDEN]
    assert report.as_json()["proven"] is False
    assert "hidden from uid 1000: rtc: descriptors" in report.text()


def test_what_differs_is_named_with_both_values():
    report = Report(0, (PROVEN, DIFFERS), {})
    assert "DIFFERS: rtc: seccomp filters: declared 2, found 0" in report.text()
    assert [f["verdict"] for f in report.as_json()["findings"]] == ["as declared", "differs"]


def test_the_table_counts_each_process():
    line = Report(0, (PROVEN, DIFFERS, HIDDEN), {}).text().splitlines()[1]
    assert line.split() == ["rtc", "7", "1", "1", "1"]


def test_what_no_kernel_shows_is_said():
    report = Report(0, (PROVEN,), {})
    assert report.unproven == []
    assert all(what in report.text() for what in UNSEEN)


def test_a_layer_that_the_kernel_lacks_is_named(monkeypatch):
    monkeypatch.setattr(jail, "lacking", lambda: {"landlock": "it is switched off"})
    report = attest([], os.getpid())
    assert "not offered by this kernel: landlock: it is switched off" in report.text().splitlines()
    assert report.as_json()["lacking"] == {"landlock": "it is switched off"}


def test_a_process_that_is_not_jailed_differs_in_every_layer_that_shows():
    pid = os.fork()
    if pid == 0:
        os.read(os.pipe()[0], 1)
        os._exit(0)
    try:
        report = attest([("free", pid, CATALOG["rtc"])], os.getpid())
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    differs = {f.layer for f in report.findings if f.process == "free" and f.verdict == "differs"}
    assert differs >= {"namespaces", "descriptors", "limits", "no-gain", "seccomp"}


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"pid": 1, "zygote": 2, "processes": [["rtc", 3]]},
        {"pid": 1, "zygote": 2, "processes": [["rtc", 3]], "kinds": {"rtc": "abacus"}},
        {"pid": 1, "zygote": 2, "processes": [3], "kinds": {}},
    ],
)
def test_an_answer_of_another_version_is_refused(answer):
    with pytest.raises(ConfigError, match="does not say what its processes are"):
        of_vm(answer)
