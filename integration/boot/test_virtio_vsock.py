"""Debian's vmw_vsock_virtio_transport on our function: programs on both sides reach each other."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm

pytestmark = pytest.mark.linux

PATIENCE_S = 120
SIZE = 512 << 10
SCRIPT = rf"""
dd if=/dev/urandom of=/data bs=4096 count={SIZE // 4096} 2>/dev/null
echo "sent: $(sha256sum < /data)"
timeout {PATIENCE_S} vsock connect 80 < /data > /answer
echo "connected: $? $(sha256sum < /answer)"
vsock connect 81 < /dev/null
echo "nobody: $?"
cd /sys/bus/virtio/drivers/vmw_vsock_virtio_transport
for n in 1 2 3; do echo virtio0 > unbind; echo virtio0 > bind; done
timeout {PATIENCE_S} vsock listen 1024 < /data > /answer
echo "called: $? $(sha256sum < /answer)"
dmesg | grep -E 'BUG|Oops|WARNING:|soft lockup|(virtio|vsock).*(fail|error)' | sed 's/^/trouble: /'
"""


def guest_program(tmp_path: Path) -> bytes:
    made = tmp_path / "vsock"
    subprocess.run(["gcc", "-Wall", "-static", "-o", made, Path(__file__).with_name("vsock.c")], check=True)
    return made.read_bytes()


def converse(stream: socket.socket, answer: bytes) -> str:
    """The sum of all that the guest sends, which is answered when it has ended."""
    said = b""
    while more := stream.recv(65536):
        said += more
    stream.sendall(answer)
    return hashlib.sha256(said).hexdigest()


def call(path: str) -> socket.socket:
    """A connection to port 1024 of the guest, once somebody listens there."""
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(PATIENCE_S)
        client.connect(path)
        with contextlib.suppress(ConnectionError):  # without a driver, what we say is not even read
            client.sendall(b"CONNECT 1024\n")
            if client.recv(3) == b"OK ":
                while client.recv(1) != b"\n":
                    pass
                return client
        client.close()
        time.sleep(0.2)
    raise TimeoutError("nobody listens in the guest")


def test_linux_and_host_programs_reach_each_other(tmp_path: Path, booted: Callable[[], None]) -> None:
    kernel = images.kernel(images.CLOUD)
    initrd, path = tmp_path / "initrd", str(tmp_path / "v")
    script = images.POWEROFF.replace(images.REPORT, images.REPORT + SCRIPT)
    files = {"bin/vsock": images.file(guest_program(tmp_path), 0o755)}
    initrd.write_bytes(images.initramfs(script, kernel, ("virtio_pci", "vmw_vsock_virtio_transport"), files))
    answers = os.urandom(SIZE), os.urandom(SIZE)
    heard: list[str] = []

    def host() -> None:
        with listener.accept()[0] as guest:
            guest.settimeout(PATIENCE_S)
            heard.append(converse(guest, answers[0]))
        with call(path) as guest:
            heard.append(converse(guest, answers[1]))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}_80")
        listener.listen()
        listener.settimeout(PATIENCE_S)
        program = threading.Thread(target=host)
        program.start()
        words = ("quiet", "tsc=reliable", "nokaslr", "mitigations=off")
        params = [w for p in words for w in ("-p", p)]
        vmsup = vm.run(
            "--no-rng", "--vsock", f"3,path={path}", "-i", str(initrd), *params, str(kernel.bzimage)
        )
        program.join()
    assert vmsup.code == 0, vmsup.errors
    booted()
    assert "trouble:" not in vmsup.console
    sums = [hashlib.sha256(answer).hexdigest() for answer in answers]
    assert vmsup["connected:"] == f"0 {sums[0]}  -"
    assert vmsup["nobody:"] == "5"
    assert vmsup["called:"] == f"0 {sums[1]}  -"
    assert [f"{of_guest}  -" for of_guest in heard] == [vmsup["sent:"]] * 2
