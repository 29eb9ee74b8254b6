"""Debian's virtiofs on our directories: a tree copied both ways, built in, unmounted and mounted again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from integration.boot import images, vm

pytestmark = pytest.mark.linux

WORDS = ("quiet", "tsc=reliable", "nokaslr", "mitigations=off")
SCRIPT = r"""
tree() { (cd "$1" && find . -type f | sort | xargs sha256sum | sha256sum | cut -d' ' -f1); }
mkdir -p /mnt /ro
mount -t virtiofs work /mnt && echo "mounted: yes"
mount -t virtiofs look /ro && echo "mounted-ro: yes"
echo "read: $(tree /ro)"
echo "entries: $(ls /ro/many | wc -l)"
echo "link: $(readlink /ro/link)"
touch /ro/new 2>/dev/null || echo "refused: yes"

cp -a /ro /tmp/copy && cp -a /tmp/copy /mnt/copied && echo "written: $(tree /mnt/copied)"
dd if=/dev/urandom of=/tmp/big bs=64k count=64 2>/dev/null
cp /tmp/big /mnt/big && sync && echo "big: $(sha256sum < /tmp/big | cut -d' ' -f1)"

mkdir /mnt/build && cd /mnt/build
for n in 0 1 2 3 4 5 6 7 8 9; do
    for f in /mnt/copied/many/$n?; do
        sed 's/line/object/' "$f" > "${f##*/}.tmp" && mv "${f##*/}.tmp" "${f##*/}.o"
    done
done
cat *.o > all && rm [0-8]?.o && ln all also && ln -s all soft && touch -d 2020-01-01 old
mkfifo pipe 2>/dev/null || echo "no-pipe: yes"
[ all -nt old ] && echo "newer: yes"
echo "built: $(sha256sum < soft | cut -d' ' -f1)"
echo "more" >> all && chmod 600 all && truncate -s 5 old && mv all renamed
echo "left: $(ls | wc -l) $(stat -c %h renamed) $(stat -c %a renamed) $(stat -c %s old)"
exec 3> open && rm open && echo "unlinked" >&3 && exec 3>&-
df /mnt | tail -n 1 | grep -q % && echo "df: yes"
ls /mnt/no/such 2>/dev/null; cat soft 2>/dev/null || echo "dangling: yes"

cd / && umount /mnt && echo "unmounted: yes"
for n in 1 2 3; do mount -t virtiofs work /mnt && [ -e /mnt/build/renamed ] && umount /mnt; done &&
    echo "remounted: yes"
umount /ro && mount -t virtiofs look /ro && echo "again: $(tree /ro)"
dmesg | grep -E 'BUG|Oops|WARNING:|nobody cared|soft lockup|(virtio|fuse).*(fail|error)' |
    sed 's/^/trouble: /'
"""


def digest(tree: Path) -> str:
    """What the script's `tree` prints."""
    files = sorted(
        os.fsencode(p.relative_to(tree)) for p in tree.rglob("*") if p.is_file() and not p.is_symlink()
    )
    lines = [
        hashlib.sha256((tree / os.fsdecode(f)).read_bytes()).hexdigest().encode() + b"  ./" + f + b"\n"
        for f in files
    ]
    return hashlib.sha256(b"".join(lines)).hexdigest()


def test_linux_works_in_our_directories(tmp_path: Path, booted: Callable[[], None]) -> None:
    look, work = tmp_path / "look", tmp_path / "work"
    work.mkdir()
    (look / "many").mkdir(parents=True)
    (look / "a/b/c").mkdir(parents=True)
    (look / "a/b/c/empty").touch()
    (look / "a/data").write_bytes(os.urandom(300_000))
    for n in range(100):
        (look / f"many/{n:02}").write_text(f"line {n}\n" * n)
    (look / "link").symlink_to("a/data")
    kernel = images.kernel(images.CLOUD)
    initrd = tmp_path / "initrd"
    script = images.POWEROFF.replace(images.REPORT, images.REPORT + SCRIPT)
    initrd.write_bytes(images.initramfs(script, kernel, ("virtio_pci", "virtiofs")))
    params = [word for p in WORDS for word in ("-p", p)]
    shares = ["--shared-dir", f"{work},tag=work", "--shared-dir", f"{look},tag=look,ro"]
    before = digest(look)
    vmsup = vm.run("-i", str(initrd), *shares, *params, str(kernel.bzimage))
    assert vmsup.code == 0, vmsup.errors
    booted()
    assert "trouble:" not in vmsup.console
    for word in (
        "mounted", "mounted-ro", "refused", "newer", "df", "no-pipe", "dangling", "unmounted", "remounted",
    ):  # fmt: skip
        assert vmsup[f"{word}:"] == "yes"
    assert vmsup["read:"] == vmsup["written:"] == vmsup["again:"] == before == digest(look)
    assert digest(work / "copied") == before
    assert os.readlink(work / "copied/link") == vmsup["link:"] == "a/data"
    assert vmsup["entries:"] == "100"
    assert hashlib.sha256((work / "big").read_bytes()).hexdigest() == vmsup["big:"]
    objects = "".join(f"object {n}\n" * n for n in range(100)).encode()
    assert vmsup["built:"] == hashlib.sha256(objects).hexdigest()
    build = work / "build"
    assert vmsup["left:"] == f"{len(os.listdir(build))} 2 600 5"
    assert (build / "renamed").read_bytes() == (build / "also").read_bytes() == objects + b"more\n"
    assert (build / "old").stat().st_size == 5
    assert not (build / "pipe").exists() and not (build / "open").exists()
