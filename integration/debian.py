"""`make debian`: Debian's userland on a disk, as an ordinary user, with a network and a shared directory.

Debian 12, made of its packages, has an ext4 image as its root.  It mounts a directory of the host, has its
address from passt, installs a package from a web server on the host, and powers off; the image must then be
clean.  Its init is a script of ours: systemd takes minutes where KVM is emulated, as in the testbed, which
this runs in where the local /dev/kvm boots no stock kernel.  The exit status is not 0 if any of it failed.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import hashlib
import http.server
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from integration import kvm  # noqa: E402
from integration.boot import images, vm  # noqa: E402
from integration.testbed import cache  # noqa: E402
from integration.testbed.debian import tool  # noqa: E402

INCLUDE = "iproute2,mount,netbase,udhcpc"
PACKAGE = "hello"
PORT = 8080
IMAGE_MIB = 512
MODULES = ("virtio_pci", "virtio_blk", "ext4", "virtio_net", "virtiofs")
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs tmpfs /run
mount -t virtiofs share /srv
ip link set eth0 up
udhcpc --interface eth0 --now --quit 2> /run/udhcpc
sh /srv/session 2>&1 | cat
umount /srv
mount -o remount,ro /
echo o > /proc/sysrq-trigger
while :; do :; done
"""
SWITCH = """
mount -t ext4 /dev/vda /root
for dir in dev proc sys; do mount --move /$dir /root/$dir; done
exec switch_root /root /init
"""
SESSION = rf"""
set -e
host=$(ip route show default | cut -d' ' -f3)
echo "deb [trusted=yes lang=none] http://$host:{PORT} ./" > /etc/apt/sources.list
PS4='# '
set -x
findmnt --types ext4,virtiofs
ip -brief address show eth0
apt-get update --quiet
apt-get install --yes --quiet --option Dpkg::Use-Pty=0 {PACKAGE}
{PACKAGE} > /srv/greeting
"""
# The testbed's L1 has no network, and passt wants a default route.  What is below somebody's private home is
# to be run by an ordinary user; the mode changes in L1's overlay alone.
UPLINK = """
chmod a+x "$HOME"
ip link add out0 type veth peer name out1
ip address add 198.51.100.1/24 dev out0
ip link set out0 up; ip link set out1 up
ip route add default via 198.51.100.254
exec "$@"
"""


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def distribution() -> Path:
    """A directory with `disk`, an ext4 image of Debian 12, and `packages`, the files of an apt repository.

    Raises:
        TestbedError: a program is missing.
        CalledProcessError: one failed; it has said why.
    """
    mmdebstrap, fakeroot = tool("mmdebstrap", "mmdebstrap"), tool("fakeroot", "fakeroot")
    mkfs = tool("mkfs.ext4", "e2fsprogs")

    def build(into: Path) -> None:
        root, packages = into / "root", into / "packages"
        packages.mkdir()
        subprocess.run(["apt-get", "download", PACKAGE], cwd=packages, check=True)
        (deb,) = packages.glob("*.deb")
        control = subprocess.check_output(["dpkg-deb", "--field", deb], text=True)
        index = f"{control}Filename: ./{deb.name}\nSize: {deb.stat().st_size}\nSHA256: {sha256(deb)}\n"
        (packages / "Packages").write_text(index)
        date = email.utils.formatdate(usegmt=True)
        listed = f"{sha256(packages / 'Packages')} {len(index)} Packages"
        (packages / "Release").write_text(f"Date: {date}\nSHA256:\n {listed}\n")
        tar = into / "root.tar"
        subprocess.run([mmdebstrap, "--variant=apt", f"--include={INCLUDE}", "bookworm", tar], check=True)
        root.mkdir()
        (root / "init").write_text(INIT)
        (root / "init").chmod(0o755)
        fill = f'tar -xf root.tar -C root && "$0" -q -d root disk {IMAGE_MIB}M'
        subprocess.run([fakeroot, "sh", "-c", fill, mkfs], cwd=into, check=True)
        tar.unlink()
        shutil.rmtree(root)

    return cache.once("debian", build)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Says nothing of each request."""

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[None]:
    """Its files by HTTP, to this machine alone."""
    handler = functools.partial(Handler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", PORT), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield
        server.shutdown()


def boot(work: Path, made: Path, kernel: images.Kernel) -> bool:
    """Whether everything went as it should."""
    share, disk, initrd = work / "share", work / "disk", work / "initrd"
    share.mkdir()
    (share / "session").write_text(SESSION)
    subprocess.run(["cp", "--sparse=always", made / "disk", disk], check=True)
    initrd.write_bytes(images.initramfs(SWITCH, kernel, MODULES))
    shutil.copy(kernel.bzimage, work / "vmlinuz")
    as_user: list[str] = []
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", "1000:1000", work], check=True)
        as_user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
    # Emulated twice, a device process may wait long for its turn.
    options = ["--device-timeout", vm.DEVICE_TIMEOUT_S, "--mem", "512", "--params", "quiet"]
    options += ["--initrd", "initrd", "--block", "disk,root", "--net", "passt"]
    options += ["--shared-dir", "share,tag=share", "vmlinuz"]
    print(f"$ id -u\n{os.geteuid() or 1000}\n$ vmsup run {shlex.join(options)}", flush=True)
    command = [*as_user, *vm.command("run", *options)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with serving(made / "packages"):
        code = subprocess.run(command, cwd=work, env=env, stdin=subprocess.DEVNULL, check=False).returncode
    greeting = share / "greeting"
    said = greeting.read_text() if greeting.exists() else ""
    print(f"$ echo $?\n{code}\n$ cat share/greeting\n{said}$ e2fsck -fn disk", flush=True)
    fsck = subprocess.run([tool("e2fsck", "e2fsprogs"), "-fn", disk], check=False).returncode
    return bool(code == 0 and said and fsck == 0)


def main() -> int:
    try:
        made, kernel = distribution(), images.kernel(images.CLOUD)
    except (images.TestbedError, subprocess.CalledProcessError) as e:
        print(f"debian: {e}", file=sys.stderr)
        return 1
    if (why := kvm.no_linux()) is not None:
        print(f"debian: no stock kernel boots on /dev/kvm ({why}): using the testbed", flush=True)
        job = ["sh", "-c", UPLINK, "sh", sys.executable, __file__]
        os.execv(ROOT / "integration/testbed/run", ["run", "--timeout", "600", "--", *job])
    with tempfile.TemporaryDirectory(prefix="vmsup-debian-") as work:
        return int(not boot(Path(work), made, kernel))


if __name__ == "__main__":
    sys.exit(main())
