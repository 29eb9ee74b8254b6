"""Debian's virtio_console on our function: hvc0 on a terminal, and a port with a name on a socket."""

from __future__ import annotations

import fcntl
import os
import pty
import socket
import struct
import termios
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm

pytestmark = pytest.mark.linux

PATIENCE_S = 300
# hvc0 hears of its size a little after it has been opened.
SCRIPT = r"""
size_after() { while [ "$(stty size <&3)" = "$1" ]; do sleep 0.1; done; stty size <&3; }
await_agent() { until grep -qx agent /sys/class/virtio-ports/*/name; do sleep 0.1; done 2>/dev/null; }
await_agent
exec 3<>/dev/hvc0
port=$(basename $(dirname $(grep -lx agent /sys/class/virtio-ports/*/name)))
echo "consoles: $(cat /sys/class/tty/console/active)"
echo "size: $(size_after "0 0")"
stty -echo <&3
echo "name?" >&3
read line <&3
echo "typed: $line"
echo "resized: $(size_after "24 80")"
echo "from $port" > /dev/$port
read line < /dev/$port
echo "agent: $line"
exec 3<&-
cd /sys/bus/virtio/drivers/virtio_console
for n in 1 2 3; do
    echo virtio0 > unbind; echo virtio0 > bind
    await_agent
done
exec 3<>/dev/hvc0
echo "size again: $(size_after "0 0")"
echo "again" >&3
read line <&3
echo "typed again: $line"
dmesg | grep -E 'BUG|Oops|WARNING:|soft lockup|virtio.*(fail|error)' | sed 's/^/trouble: /'
"""


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("<4H", rows, columns, 0, 0))


def read_until(terminal: int, text: bytes) -> bytes:
    seen = b""
    while text not in seen:
        seen += os.read(terminal, 4096)
    return seen


def test_linux_talks_over_its_virtio_console(tmp_path: Path, booted: Callable[[], None]) -> None:
    kernel = images.kernel(images.CLOUD)
    initrd, com1, agent = tmp_path / "initrd", tmp_path / "com1", str(tmp_path / "agent")
    script = images.POWEROFF.replace(images.REPORT, images.REPORT + SCRIPT)
    initrd.write_bytes(images.initramfs(script, kernel, ("virtio_pci", "virtio_console")))
    params = [
        w for p in ("tsc=reliable", "nokaslr", "mitigations=off", "console=ttyS0", "quiet") for w in ("-p", p)
    ]
    master, slave = pty.openpty()
    resize(master, 24, 80)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(agent)
        listener.listen()
        process = vm.start(
            "--no-rng",
            "--serial", f"file,num=1,path={com1}",
            "--serial", "stdio,hardware=virtio-console,num=1,console",
            "--serial", f"socket,hardware=virtio-console,num=2,name=agent,path={agent}",
            "-i", str(initrd), *params, str(kernel.bzimage),
            stdin=slave, stdout=slave, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        client, _ = listener.accept()
    killer = threading.Timer(900, process.kill)
    killer.start()
    with process, client:
        try:
            client.settimeout(PATIENCE_S)
            read_until(master, b"name?")
            booted()
            os.write(master, b"vmsup\r")
            resize(master, 50, 132)
            seen = b""
            while not seen.endswith(b"\n"):
                seen += client.recv(100)
            client.sendall(b"to the guest\n")
            read_until(master, b"again")
            os.write(master, b"still\r")
            _, errors = process.communicate(timeout=PATIENCE_S)
        except OSError as e:
            raise AssertionError(com1.read_text()) from e
        finally:
            killer.cancel()
            process.kill()
    os.close(master)
    vmsup = vm.Result(
        process.returncode, [(0, line.strip()) for line in com1.read_text().splitlines()], errors.decode()
    )
    assert vmsup.code == 0, vmsup.errors
    assert "hvc0" in vmsup["consoles:"]
    assert vmsup["size:"] == "24 80"
    assert vmsup["typed:"] == "vmsup"
    assert vmsup["resized:"] == "50 132"
    assert seen.startswith(b"from vport")
    assert vmsup["agent:"] == "to the guest"
    assert vmsup["size again:"] == "50 132"
    assert vmsup["typed again:"] == "still"
    assert "trouble:" not in vmsup.console
