"""The whole machine with tiny guests: guest nonsense, devices that die or hang, and every way to end."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import vm
from integration.machine.conftest import PATIENCE_S, Machine
from integration.machine.remote import Remote, RemoteMemory
from kvmcore import layout
from kvmcore.kvm import Kvm

pytestmark = pytest.mark.kvm

Start = Callable[..., Machine]
DEVICES = (
    "serial1",
    "serial2",
    "serial3",
    "serial4",
    "rtc",
    "i8042",
    "pit",
    "acpi-pm",
    "pvpanic",
    "pci-host",
    "rng",
    "console",
    "balloon",
    "fs1",
)
SHARE = ("--shared-dir", "/usr/share,tag=share,ro")
ALL = ("--irqchip", "split", "--serial", "sink,hardware=virtio-console", "--balloon", *SHARE)


@pytest.mark.parametrize("guest", ["ports", "hole"])
@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_guest_nonsense_leaves_the_vm_running(elf: Callable[[str], str], guest: str, irqchip: str) -> None:
    result = vm.run("--irqchip", irqchip, elf(guest))
    assert "still here" in result.console
    assert (result.code, result.errors) == (0, "")


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_the_pit_interrupts_through_the_pic(elf: Callable[[str], str], irqchip: str) -> None:
    result = vm.run("--irqchip", irqchip, elf("pic"))
    assert "five ticks" in result.console
    assert (result.code, result.errors) == (0, "")


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_the_tsc_can_be_calibrated_against_the_pit(elf: Callable[[str], str], irqchip: str) -> None:
    with Kvm() as kvm, kvm.create_vm() as vm_, vm_.create_vcpu(0) as vcpu:
        expected = vcpu.tsc_khz() * 50
    result = vm.run("--irqchip", irqchip, elf("calibrate"))
    ticks = int(result.lines[-1][1], 16)
    # Linux takes the shortest of its tries; one try may have waited for a CPU, but is never short.
    assert 0.98 * expected < ticks < 2 * expected


@pytest.mark.parametrize("transport", ["mailbox", "socket"])
def test_what_a_guest_transmits_before_it_halts_or_ends_is_seen(
    machine: Start, elf: Callable[[str], str], transport: str
) -> None:
    machine("unasked", "--transport", transport).wait_for(b"!")
    result = vm.run("--transport", transport, elf("farewell"))
    assert (result.console, result.code, result.errors) == ("bye", 0, "")


def test_each_start_is_another_generation(machine: Start) -> None:
    ids = set()
    for _ in range(2):
        guest = Remote(machine("remote", stdin=subprocess.PIPE))
        ids.add(RemoteMemory(guest).read(layout.VM_GENERATION_ID, 16))
        assert guest.power_off() == 0
    assert len(ids) == 2 and bytes(16) not in ids


@pytest.mark.parametrize("name", DEVICES)
def test_a_killed_device_ends_the_vm_by_name(machine: Start, name: str) -> None:
    one = machine("idle", *ALL)
    os.kill(one.pids[name], signal.SIGKILL)
    assert one.end() == 33
    assert one.errors() == f"vmsup: {name}: killed by SIGKILL\n"


@pytest.mark.parametrize("name", DEVICES)
def test_a_stopped_device_ends_the_vm_by_name(machine: Start, name: str) -> None:
    one = machine("idle", *ALL)
    os.kill(one.pids[name], signal.SIGSTOP)
    assert one.end() == 33
    assert one.errors() == f"vmsup: {name}: stopped by SIGSTOP\n"


def test_a_device_that_dies_under_an_access_is_named_with_its_cause(machine: Start) -> None:
    one = machine("clock")
    os.kill(one.pids["rtc"], signal.SIGKILL)
    assert one.end() == 33
    assert one.errors() == "vmsup: rtc: killed by SIGKILL\n"


def test_the_zygote_is_missed_too(machine: Start) -> None:
    one = machine("idle")
    zygote = next(
        pid
        for n, pid in one.pids.items()
        if n.startswith("child") and b"zygote" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(zygote, signal.SIGKILL)
    assert one.end() == 33
    assert one.errors() == "vmsup: zygote: killed by SIGKILL\n"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)],
)
@pytest.mark.parametrize("guest", ["idle", "clock", "chatter"])
def test_a_signal_leaves_nothing_behind(machine: Start, guest: str, number: int, code: int) -> None:
    one = machine(guest)
    if guest == "chatter":  # its console must not fill up and stop the guest
        subprocess.Popen(["cat"], stdin=one.process.stdout, stdout=subprocess.DEVNULL)
    one.process.send_signal(number)
    assert one.end() == code


def test_stop_ends_the_vm(machine: Start) -> None:
    one = machine("idle")
    subprocess.run(vm.command("stop", str(one.socket)), check=True, cwd=vm.ROOT)
    assert one.end() == 0
    assert one.errors() == "vmsup: stopped by the user\n"


def test_a_full_standard_output_ends_the_vm(machine: Start) -> None:
    with open("/dev/full", "wb") as full:
        one = machine("chatter", ready=False, stdout=full)
        assert one.end() == 33
    assert one.errors() == "vmsup: serial1: cannot write output: No space left on device\n"


def test_a_reader_that_leaves_ends_the_vm(machine: Start) -> None:
    one = machine("chatter")
    assert one.process.stdout is not None
    one.process.stdout.close()
    one.process.stdout = None
    assert one.end() == 33
    assert "serial1: cannot write output" in one.errors()


def test_a_reader_that_does_not_read_stops_only_the_guest(machine: Start) -> None:
    one = machine("chatter")
    time.sleep(4)  # longer than a ping and its deadline would take
    assert one.process.poll() is None
    one.process.terminate()
    assert one.end() == 143


def test_a_closed_standard_output_is_an_error(elf: Callable[[str], str]) -> None:
    words = vm.command("run", elf("hello"))
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *words], stderr=subprocess.PIPE, cwd=vm.ROOT, check=False
    )
    assert done.returncode == 35
    assert done.stderr == b"vmsup: --serial num=1: type=stdio: standard output is closed\n"


class Terminal:
    """A VM on a terminal of its own, in its own session."""

    def __init__(self, guest: str) -> None:
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        # As a shell does: the VM leads its session and has the terminal in the foreground.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *vm.command("run", guest)],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, cwd=vm.ROOT,
        )  # fmt: skip

    def read_until(self, text: bytes) -> bytes:
        seen = b""
        while text not in seen:
            seen += os.read(self.master, 1000)
        return seen

    def restored(self) -> bool:
        until_s = time.monotonic() + PATIENCE_S
        while termios.tcgetattr(self.slave) != self.before:
            if time.monotonic() > until_s:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(elf: Callable[[str], str]) -> Terminal:
    one = Terminal(elf("echo"))
    yield one  # type: ignore[misc]
    one.close()


def test_typed_bytes_reach_the_guest_and_ctrl_c_too(terminal: Terminal) -> None:
    terminal.read_until(b"ready")
    typed = bytes(range(ord("A"), ord("Z") + 1)) * 100  # faster than the guest takes them
    os.write(terminal.master, typed + b"\x03.")
    echoed = terminal.read_until(b"\x03.")
    assert echoed.endswith(typed + b"\x03.")
    os.write(terminal.master, b"q")
    assert terminal.process.wait(PATIENCE_S) == 0
    assert terminal.restored()


def test_the_escape_ends_the_vm_and_restores_the_terminal(terminal: Terminal) -> None:
    terminal.read_until(b"ready")
    os.write(terminal.master, b"\x01\x01-")
    assert b"\x01-" in terminal.read_until(b"-")
    os.write(terminal.master, b"\x01x")
    assert terminal.process.wait(PATIENCE_S) == 0
    assert terminal.restored()


def test_the_terminal_is_restored_when_the_supervisor_is_killed(terminal: Terminal) -> None:
    terminal.read_until(b"ready")
    assert termios.tcgetattr(terminal.slave) != terminal.before
    terminal.process.kill()
    assert terminal.restored()
