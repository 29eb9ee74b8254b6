"""The supervisor's own filters in a running VM, seen from outside and tried from inside."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import vm
from integration.machine.conftest import PATIENCE_S, Machine, alive

pytestmark = pytest.mark.kvm

Start = Callable[..., Machine]
Elf = Callable[[str], str]

# Has one of the supervisor's threads try something as soon as the guest runs.
TRY = """
import os, socket, sys
from kvmcore.kvm import Kvm
from supervisor import cli, runloop, vcputhread
owner, method, attempt = {where}
before = getattr(owner, method)
def tried(*args):
    print("trying", file=sys.stderr, flush=True)
    attempt()
    return before(*args)
setattr(owner, method, tried)
cli.main({words})
"""
WHERE = {
    "main": "runloop.RunLoop, '_once', lambda: {}",
    "vcpu": "vcputhread.VcpuThread, '_answer', lambda: {}",
}


def attempt(thread: str, code: str, elf: Elf, *options: str) -> subprocess.CompletedProcess[str]:
    """A VM of which `thread` runs `code`."""
    words = ["run", *options, "--irqchip", "split", elf("pic")]
    text = TRY.format(where=WHERE[thread].format(code), words=words)
    return subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        cwd=vm.ROOT,
        check=False,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize("thread", WHERE)
@pytest.mark.parametrize(
    "code", ["socket.socket()", "os.execv('/bin/true', ['true'])", "os.fork()", "os.pipe()"]
)
def test_a_thread_that_breaks_out_kills_the_supervisor(
    elf: Elf, tmp_path: Path, thread: str, code: str
) -> None:
    path = tmp_path / "socket"
    done = attempt(thread, code, elf, "-s", str(path))
    assert (done.returncode, done.stderr) == (-signal.SIGSYS, "trying\n")
    until_s = time.monotonic() + PATIENCE_S
    while path.exists():  # the janitor still puts everything back
        assert time.monotonic() < until_s
        time.sleep(0.02)


@pytest.mark.parametrize("thread", WHERE)
def test_no_thread_opens_a_file(elf: Elf, thread: str) -> None:
    done = attempt(thread, "os.open('/etc/passwd', os.O_RDONLY)", elf)
    assert done.returncode == 33
    assert "internal error: FileNotFoundError" in done.stderr


def test_a_thread_that_breaks_out_is_not_stopped_without_a_jail(elf: Elf) -> None:
    done = attempt("main", "socket.socket()", elf, "--no-jail")
    assert done.returncode == 0
    assert "five ticks" in done.stdout


@pytest.mark.parametrize(("options", "mode", "filters"), [((), "2", "1"), (("--no-jail",), "0", "0")])
def test_every_thread_has_a_filter_of_its_own(
    machine: Start, options: tuple[str, ...], mode: str, filters: str
) -> None:
    one = machine("idle", "-c", "2", *options)
    seen = {}
    for task in Path(f"/proc/{one.process.pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        status = {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
        seen[status["Name"]] = status["Seccomp"], status["Seccomp_filters"]
    # Newer kernels do KVM's housekeeping on a thread of the process; it is theirs.
    ours = {name for name in seen if not name.startswith("kvm-")}
    assert len(ours) == 3
    assert {"vcpu0", "vcpu1"} < ours
    assert set(seen.values()) == {(mode, filters)}


@pytest.mark.parametrize("name", ["supervisor", "vcpu"])
def test_a_filter_that_cannot_be_loaded_ends_the_start_by_name(elf: Elf, name: str) -> None:
    text = f"""
from supervisor import cli, confine
compiled = confine.compile_single
confine.compile_single = lambda policy: b"" if policy.name == {name!r} else compiled(policy)
cli.main(["run", {elf("hello")!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", text],
        capture_output=True,
        text=True,
        cwd=vm.ROOT,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 33
    where = "vcpu0: " if name == "vcpu" else ""
    assert done.stderr == f"vmsup: {where}cannot load policies/{name}.policy: seccomp: Invalid argument\n"
    assert done.stdout == ""


def test_a_vm_that_was_stopped_goes_on(machine: Start) -> None:
    one = machine("idle", "-c", "2")
    one.process.send_signal(signal.SIGSTOP)
    time.sleep(0.3)
    one.process.send_signal(signal.SIGCONT)
    subprocess.run(vm.command("stop", str(one.socket)), check=True, cwd=vm.ROOT)
    assert one.end() == 0


def test_a_full_standard_error_changes_nothing(elf: Elf) -> None:
    words = vm.command("run", "-v", elf("hello"))
    with open("/dev/full", "wb") as full:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=full, cwd=vm.ROOT, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, b"hello")


# -- policies that cannot be used

WITH_POLICIES = """
import sys
from pathlib import Path
from policies import parse
parse.DIRECTORY = Path(sys.argv[1])
from supervisor import cli
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize("name", ["rtc", "supervisor", "vcpu"])
def test_a_policy_that_cannot_be_used_is_named_with_its_line(elf: Elf, tmp_path: Path, name: str) -> None:
    policies = tmp_path / "policies"
    shutil.copytree(vm.ROOT / "policies", policies)
    with open(policies / f"{name}.policy", "a") as policy:
        policy.write("\nopen sesame: 1  # please\n")
    words = [sys.executable, "-c", WITH_POLICIES, str(policies), "run", elf("idle")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=vm.ROOT, check=False, timeout=PATIENCE_S)
    assert done.returncode == 35
    assert done.stderr.startswith(f"vmsup: {policies}/{name}.policy:")
    assert "open sesame: 1" in done.stderr


WITHOUT_LANDLOCK = """
import sys
from devproc import jail
jail.lacking = lambda: {"landlock": "it is switched off"}
from supervisor import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("options", [(), ("-v",), ("-v", "--no-jail")])
def test_a_layer_that_the_kernel_lacks_is_said_to_who_wants_to_know(
    elf: Elf, options: tuple[str, ...]
) -> None:
    words = [sys.executable, "-c", WITHOUT_LANDLOCK, "run", *options, elf("hello")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=vm.ROOT, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0
    said = "vmsup: jail: landlock: not offered by this kernel: it is switched off\n" in done.stderr
    assert said == (options == ("-v",))


# -- what is said to machines


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_an_ending_is_a_json_object(machine: Start) -> None:
    one = machine("idle", "--log-format", "json")
    os.kill(one.pids["rtc"], signal.SIGKILL)
    assert one.end() == 33
    (said,) = lines(one.errors())
    assert said.pop("time")
    assert said.pop("message") == "rtc: killed by SIGKILL"
    assert said == {"level": "error", "device": "rtc", "event": "end", "exit_code": 33}


def test_every_line_is_a_json_object(machine: Start) -> None:
    one = machine("idle", "--log-format", "json", "-v", "--no-jail")
    one.process.terminate()
    assert one.end() == 143
    said = lines(one.errors())
    assert {(s["level"], s["event"]) for s in said} == {
        ("info", "step"), ("warning", "note"), ("info", "accesses"), ("error", "end"),
    }  # fmt: skip


def violation(elf: Elf, *options: str) -> subprocess.CompletedProcess[str]:
    """A VM whose rtc process asks for a socket."""
    words = ["-m", "integration.hostile.attacker", "a socket", "run", *options, elf("idle")]
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=vm.ROOT, check=False, timeout=PATIENCE_S
    )


def test_a_violation_is_reported_with_call_arguments_and_policy(elf: Elf, tmp_path: Path) -> None:
    path = tmp_path / "report"
    done = violation(elf, "--log-format", "json", "--jail-report", str(path))
    assert done.returncode == 33
    (record,) = lines(path.read_text())
    assert record.pop("time")
    pid = record.pop("pid")
    assert isinstance(pid, int) and not alive(pid)
    args = record.pop("args")
    assert isinstance(args, list)
    assert args[:3] == ["0x1", "0x80001", "0x0"]  # AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC
    policy = str(vm.ROOT / "policies/rtc.policy")
    assert record == {"device": "rtc", "nr": 53, "name": "socketpair", "policy": policy}
    said = next(s for s in lines(done.stderr) if s["event"] == "violation")
    assert said["message"] == "rtc: killed for system call 53 (socketpair), which its policy forbids"
    assert said.items() >= {**record, "pid": pid, "args": args, "level": "error", "exit_code": 33}.items()


def test_a_report_on_standard_output_follows_the_console(elf: Elf) -> None:
    done = violation(elf, "--jail-report", "-")
    (record,) = lines(done.stdout[done.stdout.index("{") :])
    assert record["name"] == "socketpair"


def test_without_a_violation_the_report_is_empty(elf: Elf, tmp_path: Path) -> None:
    path = tmp_path / "report"
    assert vm.run("--jail-report", str(path), elf("hello")).code == 0
    assert path.read_text() == ""


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(elf: Elf) -> None:
    result = vm.run("--jail-report", "/nonexistent/report", elf("hello"))
    assert (result.code, result.console) == (35, "")
    assert result.errors == "vmsup: --jail-report /nonexistent/report: No such file or directory\n"
