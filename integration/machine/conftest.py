"""Guests of the whole machine, and the VM that runs one, watched from outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from integration.boot import vm
from kvmcore.errors import KvmError
from kvmcore.kvm import Kvm

HERE = Path(__file__).parent
PATIENCE_S = 60


@pytest.fixture(scope="session")
def elf(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Name of a .S file here -> path of an ELF kernel made of it."""
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("no assembler for the guests (Debian: binutils)")
    try:
        with Kvm() as kvm:
            kvm.create_vm().close()
    except KvmError as e:
        pytest.skip(str(e))
    where = tmp_path_factory.mktemp("guests")

    def make(name: str) -> str:
        made = where / name
        if not made.exists():
            subprocess.run(["as", "--64", "-I", HERE, "-o", f"{made}.o", HERE / f"{name}.S"], check=True)
            subprocess.run(["ld", "-Ttext", "0x200000", "-e", "start", "-o", made, f"{made}.o"], check=True)
        return str(made)

    return make


class Machine:
    """A running `vmsup run`; everything it made must be gone when it has ended."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.process = process
        self.socket = socket
        self.pids: dict[str, int] = {}

    def wait_for(self, text: bytes) -> bytes:
        """Read the console until `text` has come."""
        assert self.process.stdout is not None
        seen = b""
        while text not in seen:
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, f"{seen!r} {self.errors()}"
            seen += byte
        return seen

    def look(self) -> dict[str, int]:
        """Name -> pid of every process of the VM."""
        answer = subprocess.run(
            vm.command("ps", "--json", str(self.socket)), check=True, capture_output=True, cwd=vm.ROOT
        )
        self.pids = {row["name"]: row["pid"] for row in json.loads(answer.stdout)}
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.pids |= {f"child {pid}": int(pid) for pid in children}
        return self.pids

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()

    def end(self) -> int:
        """The exit code, once it has ended by itself and left nothing behind."""
        code = self.process.wait(PATIENCE_S)
        until_s = time.monotonic() + PATIENCE_S
        while any(alive(pid) for pid in self.pids.values()) or self.socket.exists():
            left = [name for name, pid in self.pids.items() if alive(pid)]
            assert time.monotonic() < until_s, f"left behind: {left}, socket {self.socket.exists()}"
            time.sleep(0.02)
        return code


def alive(pid: int) -> bool:
    """Whether there is such a process, zombies excepted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def machine(elf: Callable[[str], str], tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    """(guest, options, how) -> a VM that has said "ready"."""
    made: list[Machine] = []

    def start(guest: str, *options: str, ready: bool = True, **how: object) -> Machine:
        socket = tmp_path / f"socket{len(made)}"
        one = Machine(vm.start("-s", str(socket), *options, elf(guest), **how), socket)
        made.append(one)
        if ready:
            one.wait_for(b"ready")
            one.look()
        return one

    yield start
    for one in made:
        if one.process.poll() is None:
            one.process.kill()
        one.process.wait()
        for pipe in (one.process.stdin, one.process.stdout, one.process.stderr):
            if pipe is not None:
                pipe.close()
