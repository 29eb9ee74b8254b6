"""What `vmsup device block|net|rng` is asked for, and what it says when that cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmcore.errors import EXIT_USAGE, ConfigError
from supervisor.backend import build, rings
from supervisor.machine import virtio_functions


def options(**more: object) -> dict[str, object]:
    return {"socket": "/s", "jail": "full", **more}


def test_each_kind_is_one_function_of_the_machine() -> None:
    for kind, given, expected, most in (
        ("block", ["/d,queues=3,ro"], "virtio-blk", 3),
        ("net", ["tap0"], "virtio-net", 2),
        ("net", ["passt"], "virtio-net-stream", 2),
        ("rng", [], "virtio-rng", 1),
    ):
        config = build(kind, options(**{kind: given} if given else {}))
        (function,) = virtio_functions(config)
        assert (function.kind, rings(config)) == (expected, most)
    assert build("rng", options(jail=None, device_timeout=5.0)).device_timeout == 5.0


def test_a_back_end_is_one_device() -> None:
    with pytest.raises(ConfigError, match="--block given twice"):
        build("block", options(block=["/d", "/e"]))
    with pytest.raises(ConfigError, match="one pair of queues"):
        build("net", options(net=["tap0,queues=2"]))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["block", "--block", "{tmp}/image"], "the following arguments are required: -s/--socket"),
        (["block", "--socket", "{tmp}/s"], "the following arguments are required: --block"),
        (["block", "--socket", "{tmp}/s", "--block", "{tmp}/none"], "--block {tmp}/none: No such file"),
        (["block", "--socket", "{tmp}/image", "--block", "{tmp}/image"], "Address already in use"),
        (["rng", "--socket", "{tmp}/none/s"], "--socket {tmp}/none/s: No such file"),
    ],
)
def test_what_cannot_be_is_one_line(tmp_path: Path, words: list[str], why: str) -> None:
    (tmp_path / "image").write_bytes(bytes(4096))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "supervisor.cli",
            "device",
            *(w.format(tmp=tmp_path) for w in words),
            "--no-jail",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_USAGE
    assert why.format(tmp=tmp_path) in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == ["image"]
