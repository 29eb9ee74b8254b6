"""A device process that attacks ends its VM, by name and within the deadline, or does not even end that."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from devproc.virtio import spec
from integration.boot import vm
from integration.hostile.attacker import ATTACKS, DONE, FLOOD, FLOOD_OF_INTERRUPTS, TEXT, TIMEOUT_S
from integration.machine.conftest import PATIENCE_S, Machine
from integration.machine.remote import Remote
from kvmcore import layout
from supervisor import msix
from supervisor.machine import pci_interrupts

pytestmark = pytest.mark.kvm

MEMORY_MAX_KIB = 8 * 1024  # by which a flood of 18 MB may make the supervisor grow

Elf = Callable[[str], str]


def children() -> set[str]:
    """Of the main thread, which is the one that adopts."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """What a VM leaves behind becomes a child of ours."""
    before = children()
    yield
    left = children() - before
    for pid in left:
        os.waitpid(int(pid), os.WNOHANG)
    assert not left


class Attacked:
    """A VM under attack `name`, with its console on pipes."""

    def __init__(self, name: str, elf: Elf, *options: str, guest: str | None = None) -> None:
        attack = ATTACKS[name]
        words = ["-m", "integration.hostile.attacker", name, "run", "--device-timeout", TIMEOUT_S]
        words += ["--transport", attack.transport]
        self.process = subprocess.Popen(
            [sys.executable, *words, *attack.options, *options, elf(guest or attack.guest)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=vm.ROOT,
        )
        self._killer = threading.Timer(PATIENCE_S, self.process.kill)
        self._killer.start()

    def __enter__(self) -> Attacked:
        return self

    def __exit__(self, *_: object) -> None:
        self._killer.cancel()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()

    def type(self, text: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def echoes(self, text: bytes) -> None:
        """The guest still receives and transmits."""
        assert self.process.stdout is not None
        self.type(text)
        seen = b""
        while text not in seen:
            data = os.read(self.process.stdout.fileno(), 1000)
            assert data, f"the console ended: {self.errors()}"
            seen += data

    def wait_for_log(self, text: str) -> list[str]:
        """The lines of standard error up to the first that ends with `text`."""
        assert self.process.stderr is not None
        seen: list[str] = []
        while not (seen and seen[-1].endswith(text)):
            line = self.process.stderr.readline()
            assert line, "\n".join(seen)
            seen.append(line.decode().rstrip("\n"))
        return seen

    def listen(self, lines: list[str]) -> None:
        """Append the lines of standard error as they come, to its end."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            lines.append(line.decode().rstrip("\n"))

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def memory_kib(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        assert found is not None
        return int(found[1])


@pytest.mark.parametrize("name", [name for name, attack in ATTACKS.items() if attack.line is not None])
def test_an_attack_ends_the_vm_by_name(elf: Elf, name: str) -> None:
    with Attacked(name, elf) as one:
        _, errors = one.process.communicate(timeout=PATIENCE_S)
    said = [
        line for line in errors.decode().splitlines() if "WARNING: --no-jail" not in line and DONE not in line
    ]
    assert said == [f"vmsup: {ATTACKS[name].line}"]
    assert one.process.returncode == 33


@pytest.mark.parametrize("name", [name for name, a in ATTACKS.items() if a.line is None and a.guest == "ask"])
def test_an_attack_that_the_vm_survives_costs_it_nothing(elf: Elf, tmp_path: Path, name: str) -> None:
    socket = str(tmp_path / "socket")
    with Attacked(name, elf, "-s", socket) as one:
        one.echoes(b"before")
        held, used_kib = one.descriptors(), one.memory_kib()
        one.echoes(b"r")  # it begins
        one.echoes(b"during")
        ps = vm.command("ps", socket)  # although nobody reads standard error
        subprocess.run(ps, check=True, stdout=subprocess.DEVNULL, cwd=vm.ROOT, timeout=PATIENCE_S)
        lines: list[str] = []
        listener = threading.Thread(target=one.listen, args=[lines])
        listener.start()
        asked = 0
        while f"vmsup: rtc: {DONE}" not in lines:
            one.echoes(b"r")
            asked += 1
        assert one.descriptors() == held
        assert one.memory_kib() - used_kib < MEMORY_MAX_KIB
        one.type(b"q")
        assert one.process.wait(PATIENCE_S) == 0
        listener.join()
    if name in ("a flood of messages", "a flood of log lines"):
        shown = [line for line in lines if line == f"vmsup: rtc: {TEXT}"]
        unsaid = [int(n) for n in re.findall(r"\((\d+) more lines are not shown\)", "\n".join(lines))]
        assert 0 < len(shown) <= FLOOD + asked - sum(unsaid) < FLOOD


@pytest.mark.parametrize(
    "name",
    [
        "silence in an access",
        "endless work in an access",
        "silence in the mailbox",
        "endless work in the mailbox",
    ],
)
def test_a_device_that_holds_up_two_vcpus_does_not_hold_up_the_third(elf: Elf, name: str) -> None:
    with Attacked(name, elf, "--cpus", "3", "--device-timeout", "10", guest="three") as one:
        one.wait_for_log(f"rtc: {DONE}")
        one.echoes(b"still here")
        assert one.process.poll() is None
        _, errors = one.process.communicate(timeout=PATIENCE_S)
    assert errors.decode() == f"vmsup: {ATTACKS[name].line}\n"
    assert one.process.returncode == 33


@pytest.mark.parametrize("irqchip", ["kernel", "split"])
def test_interrupts_without_end_leave_guest_and_supervisor_running(elf: Elf, irqchip: str) -> None:
    table, control = layout.PCI_MMIO + spec.BAR_MSIX_TABLE, layout.ECAM + (1 << 15) + spec.CONFIG_MSIX
    with Attacked(FLOOD_OF_INTERRUPTS, elf, "--irqchip", irqchip) as one:
        guest = Remote(Machine(one.process, Path("/nonexistent")))
        for n, word in enumerate((0xFEE00000, 0, 0x41, 0)):
            guest.write(table + 4 * n, 4, word)
        guest.write(control + msix.CONTROL, 2, msix.ENABLE)
        for half, register in ((1 << 15 | 0x42, 0x10), (0, 0x11)):  # INTA: a level
            guest.write(layout.IOAPIC, 4, register + 2 * pci_interrupts()[0].gsi)
            guest.write(layout.IOAPIC + 0x10, 4, half)
        guest.read(control, 4)  # it begins
        lines: list[str] = []
        listener = threading.Thread(target=one.listen, args=[lines])
        listener.start()
        while f"vmsup: rng: {DONE}" not in lines:
            guest.read(control, 4)
        assert guest.interrupts(0x41) > 1
        assert guest.interrupts(0x42) > 0
        assert guest.power_off() == 0
        listener.join()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_device_lost_under_the_accesses_of_two_vcpus_is_named(
    machine: Callable[..., Machine], number: signal.Signals
) -> None:
    one = machine("three", "--cpus", "3")
    os.kill(one.pids["rtc"], number)
    how = "stopped" if number == signal.SIGSTOP else "killed"
    assert one.end() == 33
    assert one.errors() == f"vmsup: rtc: {how} by {number.name}\n"
