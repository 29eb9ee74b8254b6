"""Directories as the supervisor opens them, and as the command line says them."""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvmcore.errors import ConfigError
from supervisor.config import SharedDirConfig, build
from supervisor.host import Host
from supervisor.janitor import Janitor
from supervisor.shares import open_share


def test_a_directory_is_handed_over_as_a_mere_path(tmp_path: Path) -> None:
    janitor = Janitor.start()
    with ExitStack() as undo:
        undo.callback(janitor.finish)
        host = Host(undo, janitor, lambda _: None)
        (fd,) = open_share(SharedDirConfig(str(tmp_path), "tag"), host).fds["directory"]
        assert os.path.samestat(os.fstat(fd), tmp_path.stat())
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH
        (tmp_path / "file").touch()
        for path, why in (
            (tmp_path / "file", "Not a directory"),
            (tmp_path / "no", "No such file or directory"),
        ):
            with pytest.raises(ConfigError, match=f"^--shared-dir {path}: {why}$"):
                open_share(SharedDirConfig(str(path), "tag"), host)
    with pytest.raises(OSError):
        os.fstat(fd)


def test_directories_are_named_by_their_tags(tmp_path: Path) -> None:
    file = tmp_path / "vm.toml"
    file.write_text('kernel = "k"\n[[shared-dir]]\npath = "/a"\ntag = "a"\nro = true\n')
    config = build({"config": str(file), "shared_dir": ["/b,tag=b", "path=/c,tag=c,ro"]})
    assert config.shared_dir == (
        SharedDirConfig("/a", "a", True),
        SharedDirConfig("/b", "b"),
        SharedDirConfig("/c", "c", True),
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("/a", "tag is missing, expected the name to mount it by"),
        ("tag=a", "path is missing, expected a directory"),
        ("/a,tag=" + "ü" * 19, "tag: expected up to 36 bytes"),
        ("/a,tag=a,rw", "'rw' has no value"),
    ],
)
def test_what_cannot_be_shared_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--shared-dir: {why}")):
        build({"kernel": "k", "shared_dir": [text]})


def test_a_tag_is_one_directorys() -> None:
    with pytest.raises(ConfigError, match=r"^--shared-dir, --vhost-user: tag=a given twice$"):
        build({"kernel": "k", "shared_dir": ["/a,tag=a", "/b,tag=a"]})
