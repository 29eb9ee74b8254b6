"""integration/testbed/run as a user sees it; each run costs some two seconds."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from integration.testbed import debian

RUN = Path(__file__).with_name("run")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RUN, *arguments], text=True, capture_output=True, check=False)


@pytest.fixture(autouse=True, scope="module")
def testbed() -> None:
    try:
        debian.tool("qemu-system-x86_64", "qemu-system-x86")
        debian.tool("busybox", "busybox-static")
        debian.kernel(debian.GENERIC)
    except debian.TestbedError as e:
        pytest.skip(str(e))


def test_command_gets_a_kvm_the_directory_and_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ODD", 'it\'s $HOME "quoted"')
    got = run("--", "sh", "-c", 'test -c /dev/kvm && pwd && echo "$ODD" && echo problem >&2; exit 7')
    assert got.stdout == f'{tmp_path}\nit\'s $HOME "quoted"\n'
    assert got.stderr == "problem\n"
    assert got.returncode == 7


def test_only_what_is_written_below_rw_stays(tmp_path: Path) -> None:
    kept, lost = tmp_path / "kept, really", tmp_path / "lost"
    kept.mkdir()
    lost.mkdir()
    got = run(
        "--rw",
        str(kept),
        "--",
        "sh",
        "-c",
        'echo hello | tee "$1/file" "$2/file"',
        "sh",
        str(kept),
        str(lost),
    )
    assert (got.stdout, got.returncode) == ("hello\n", 0)
    assert (kept / "file").read_text() == "hello\n"
    assert not list(lost.iterdir())


def test_a_command_out_of_time_is_ended_with_124_and_the_consoles_tail() -> None:
    got = run("--timeout", "3", "--", "sh", "-c", "echo begun; exec sleep 1000")
    assert got.returncode == 124
    assert got.stdout == "begun\n"
    assert "3 s are over" in got.stderr
    assert "sleep 1000" in got.stderr  # the dump of processes, from L1's console


def test_a_command_that_prints_for_ever_is_ended_too() -> None:
    got = run("--timeout", "3", "--", "sh", "-c", "trap '' TERM ABRT; while :; do echo more; done")
    assert got.returncode == 124


def _qemu_of(run_pid: int) -> int:
    children = Path(f"/proc/{run_pid}/task/{run_pid}/children").read_text().split()
    (qemu,) = [int(pid) for pid in children if "qemu" in os.readlink(f"/proc/{pid}/exe")]
    return qemu


def _heed_interrupts() -> None:
    """A shell starts a job in the background with SIGINT ignored, and we may be in one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("end", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 130), (signal.SIGINT, 130)]
)
def test_no_qemu_outlives_a_run(end: signal.Signals, status: int) -> None:
    process = subprocess.Popen(
        [RUN, "--", "sh", "-c", "echo begun; exec sleep 1000"],
        stdout=subprocess.PIPE,
        preexec_fn=_heed_interrupts,  # noqa: PLW1509  no threads here
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    qemu = os.pidfd_open(_qemu_of(process.pid))
    process.send_signal(end)
    assert process.wait() == status
    assert select.select([qemu], [], [], 10)[0], "QEMU is still there"
    os.close(qemu)
    process.stdout.close()


def test_a_reader_that_leaves_ends_the_run() -> None:
    process = subprocess.Popen([RUN, "--", "yes"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 128 + signal.SIGPIPE


def test_a_missing_qemu_is_one_line_naming_the_package(tmp_path: Path) -> None:
    got = subprocess.run(
        [sys.executable, RUN, "--", "true"],
        env={"PATH": str(tmp_path)},
        text=True,
        capture_output=True,
        check=False,
    )
    assert got.returncode == 125
    assert got.stderr.count("\n") == 1
    assert "Debian package" in got.stderr
