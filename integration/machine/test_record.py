"""`vmsup run --record` of a guest, and `vmsup replay` of what its devices were asked."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from integration.boot import vm

TYPED = "typed before it asks q"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        vm.command(*words), cwd=vm.ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_what_a_guest_and_its_devices_said_is_recorded_and_said_again(
    elf: Callable[[str], str], tmp_path: Path
) -> None:
    keys, log, where = tmp_path / "keys", tmp_path / "log", tmp_path / "record"
    keys.write_text(TYPED)
    done = run("run", "--record", str(where), "--serial", f"type=file,path={log},input={keys}", elf("echo"))
    assert done.returncode == 0, done.stderr
    assert log.read_text().endswith(TYPED[:-1])
    text = (where / "serial1.vmrep").read_text()
    assert f"input {TYPED[0].encode().hex()}" in text.splitlines()
    assert text.count("\nsent ") >= len(TYPED)
    assert "write PORT" in (where / "acpi-pm.vmrep").read_text()  # the power-off

    again = run("replay", str(where))
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{where}/serial1.vmrep: " in again.stdout

    changed = text.replace("= 0x60", "= 0x61", 1)
    (where / "serial1.vmrep").write_text(changed)
    again = run("replay", str(where))
    assert again.returncode == 33
    assert "read 0x5: [96, " in again.stdout
