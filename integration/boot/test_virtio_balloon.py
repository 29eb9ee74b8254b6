"""Debian's virtio_balloon on our function: free pages are reported, the balloon grows and shrinks."""

from __future__ import annotations

import json
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm

pytestmark = pytest.mark.linux

MEM_MIB, USED_MIB, BALLOON_MIB = 256, 96, 64
PATIENCE_S = 300
# Memory that was used and is free again is what the host still holds until it is told.
SCRIPT = rf"""
mkdir /mnt
mount -t tmpfs -o size={USED_MIB}m used /mnt
dd if=/dev/zero of=/mnt/used bs=1M count={USED_MIB} 2>/dev/null
echo "used"
sync; read line
umount /mnt
echo "freed"
read line
cd /sys/bus/virtio/drivers/virtio_balloon
for n in 1 2 3; do echo virtio0 > unbind; echo virtio0 > bind; done
dmesg | grep -E 'BUG|Oops|WARNING:|virtio.*(fail|error)|Out of puff' | sed 's/^/trouble: /'
echo "done"
"""


class Guest:
    """The VM, its console as lines, and its balloon."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.process = process
        self._socket = str(socket)
        self.lines: list[str] = []

    def wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        for raw in self.process.stdout:
            self.lines.append(raw.decode(errors="replace").strip())
            if self.lines[-1] == line:
                return
        assert self.process.stderr is not None
        raise AssertionError(f"no line {line!r}: {self.lines[-20:]} {self.process.stderr.read()!r}")

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def balloon(self, *args: str) -> str:
        command = vm.command("balloon", self._socket, *args)
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=vm.ROOT).stdout

    def held_mib(self) -> int:
        """Guest memory that the supervisor has touched and the host still holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (kib,) = re.findall(r"RssShmem:\s+(\d+) kB", status)
        return int(kib) // 1024

    def until(self, condition: Callable[[dict[str, int]], bool]) -> dict[str, int]:
        """The counters once they meet `condition`."""
        until_s = time.monotonic() + PATIENCE_S
        while True:
            counters: dict[str, int] = json.loads(self.balloon("--json"))
            if condition(counters):
                return counters
            assert time.monotonic() < until_s, counters
            time.sleep(0.2)


def test_linux_gives_memory_back(tmp_path: Path, booted: Callable[[], None]) -> None:
    kernel = images.kernel(images.CLOUD)
    initrd, socket = tmp_path / "initrd", tmp_path / "socket"
    script = images.POWEROFF.replace(images.REPORT, images.REPORT + SCRIPT)
    initrd.write_bytes(images.initramfs(script, kernel, ("virtio_pci", "virtio_balloon")))
    params = [w for p in ("quiet", "tsc=reliable", "nokaslr", "mitigations=off") for w in ("-p", p)]
    process = vm.start(
        "-m", str(MEM_MIB), "--no-rng", "--balloon", "-s", str(socket), "-i", str(initrd),
        *params, str(kernel.bzimage), stdin=subprocess.PIPE,
    )  # fmt: skip
    killer = threading.Timer(900, process.kill)
    killer.start()
    with process:
        guest = Guest(process, socket)
        try:
            guest.wait_for("used")
            booted()
            give_and_take(guest)
            guest.wait_for("done")
            process.communicate(timeout=PATIENCE_S)
        finally:
            killer.cancel()
            process.kill()
    assert process.returncode == 0
    assert not any(line.startswith("trouble:") for line in guest.lines)


def give_and_take(guest: Guest) -> None:
    held = guest.held_mib()
    assert held > USED_MIB
    used = guest.until(lambda c: c.get("updates", 0) > 0)
    assert used["free_bytes"] < used["available_bytes"] < used["total_bytes"] <= MEM_MIB << 20
    assert used["free_bytes"] < (MEM_MIB - USED_MIB) << 20

    guest.go_on()
    guest.wait_for("freed")
    freed = guest.until(lambda c: guest.held_mib() < held - USED_MIB * 3 // 4)
    assert freed["reported_bytes"] > (USED_MIB * 3 // 4) << 20

    held = guest.held_mib()
    guest.balloon(str(BALLOON_MIB))
    less = freed["free_bytes"] - (BALLOON_MIB * 3 // 4 << 20)
    full = guest.until(lambda c: c["actual_mib"] == BALLOON_MIB and c["free_bytes"] < less)
    assert full["inflated_pages"] >= BALLOON_MIB * 256
    assert guest.held_mib() <= held + 8
    guest.balloon("0")
    empty = guest.until(lambda c: c["actual_mib"] == 0)
    assert empty["deflated_pages"] >= BALLOON_MIB * 256
    assert empty["refused_pages"] == empty["failures"] == 0
    guest.go_on()
