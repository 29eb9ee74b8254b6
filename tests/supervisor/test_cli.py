"""The command as a user has it: one line per error, its exit code, no traceback."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from datetime import datetime, timedelta

import pytest

from devproc.catalog import CATALOG
from supervisor import cli

RUN = [sys.executable, "-m", "supervisor.cli"]


def vmsup(*words):
    """(exit code, stdout, stderr) of one command line."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as end,
    ):
        cli.main(words)
    return end.value.code, out.getvalue(), err.getvalue()


def refused(*words):
    """The one line with which a command line is refused."""
    code, out, err = vmsup(*words)
    assert (code, out) == (35, "")
    assert err.startswith("vmsup: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "VERB"),
        (("fly",), "'fly'"),
        (("run",), "KERNEL is missing"),
        (("jail", "inspect"), "SOCKET"),
        (("jail", "inspect", "/no/such/socket"), "/no/such/socket: No such file"),
        (("jail", "selftest", "abacus"), "device 'abacus' is unknown"),
        (("run", "--speed", "9", "k"), "--speed"),
        (("run", "--cpu", "2", "k"), "--cpu"),
        (("run", "k", "extra"), "extra"),
        (("run", "-c", "many", "k"), "'many'"),
        (("run", "-c", "0", "k"), "--cpus: expected 1 to"),
        (("run", "-m", "1", "k"), "--mem: expected"),
        (("run", "--jail=some", "k"), "'some'"),
        (("run", "--irqchip", "apic", "k"), "'apic'"),
        (("run", "--on-device-death", "cry", "k"), "'cry'"),
        (("run", "--device-timeout", "0", "k"), "--device-timeout: expected"),
        (("run", "--cpu-affinity", "x", "k"), "--cpu-affinity"),
        (("run", "--serial", "type=telex", "k"), "--serial: type: expected one of stdio"),
        (("run", "--serial", "speed=9", "k"), "unknown key 'speed'"),
        (("run", "--log-format", "xml", "k"), "'xml'"),
        (("run", "--config", "/nonexistent.toml"), "/nonexistent.toml"),
        (("run", "/nonexistent/bzImage"), "/nonexistent/bzImage"),
        (("run", "-i", "/nonexistent/initrd", sys.executable), "/nonexistent/initrd"),
        (("run", "/"), "/"),
        (("ps",), "SOCKET"),
        (("ps", "/nonexistent.sock"), "/nonexistent.sock"),
        (("stop", "/dev/null"), "/dev/null"),
        (("device", "show", "telex"), "'telex'"),
    ],
)
def test_what_a_user_gets_wrong_is_one_line_and_exit_code_35(words, why):
    assert why in refused(*words)


def test_a_config_file_is_named_in_its_error(tmp_path):
    path = tmp_path / "vm.toml"
    path.write_text("speed = 9")
    assert f"--config {path}: unknown key 'speed'" in refused("run", "--config", str(path))


def test_help_names_the_exit_codes_and_the_escape():
    code, out, _ = vmsup("run", "--help")
    assert code == 0
    assert "34 the guest panicked" in out
    assert "Ctrl-A x" in out


def test_device_list_has_every_kind():
    code, out, err = vmsup("device", "list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list(CATALOG)


def test_the_word_jail_in_a_kernel_parameter_is_left_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_run", lambda options, _: seen.append(options) or 0)
    vmsup("run", "--jail=best-effort", "-p", "x--jail=y", "k")
    assert (seen[0]["jail"], seen[0]["params"]) == ("best-effort", ["x--jail=y"])


@pytest.mark.parametrize(
    ("word", "mode"), [("--jail", "full"), ("--no-jail", "none"), ("--jail-mode=none", "none")]
)
def test_the_jail_is_chosen_by_the_last_word_on_it(monkeypatch, word, mode):
    seen = []
    monkeypatch.setattr(cli, "_run", lambda options, _: seen.append(options) or 0)
    vmsup("run", "--jail-mode", "best-effort", word, "k")
    assert seen[0]["jail"] == mode


def test_an_internal_error_is_one_line_and_exit_code_33(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda *_: 1 // 0)
    code, _, err = vmsup("run", "k")
    assert code == 33
    assert err.startswith("vmsup: internal error: ZeroDivisionError: ")
    assert err.count("\n") == 1


def test_an_internal_error_shows_where_on_request(monkeypatch):
    monkeypatch.setenv("VMSUP_DEBUG", "1")
    monkeypatch.setattr(cli, "_run", lambda *_: 1 // 0)
    assert "Traceback" in vmsup("run", "k")[2]


def test_what_a_device_says_cannot_drive_the_terminal(capsys):
    cli.complain("serial1: \x1b[2Jowned\r\nnext\x07 \x9b31m gr\u00fc\u00df")
    assert capsys.readouterr().err == "vmsup: serial1: \\x1b[2Jowned next\\x07 \\x9b31m gr\u00fc\u00df\n"


def test_what_goes_wrong_is_a_json_object_on_request(tmp_path):
    path = tmp_path / "vm.toml"
    path.write_text('log-format = "json"\nkernel = "/nonexistent"')
    for words in (("run", "--log-format", "json", "/nonexistent"), ("run", "--config", str(path))):
        code, out, err = vmsup(*words)
        assert (code, out, err.count("\n")) == (35, "", 1)
        said = json.loads(err)
        assert datetime.fromisoformat(said.pop("time")).utcoffset() == timedelta(0)
        assert "/nonexistent" in said.pop("message")
        assert said == {"level": "error", "event": "error", "device": None}
    assert refused("run", "/nonexistent")


def test_ctrl_c_is_exit_code_130(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    assert vmsup("run", "k")[0] == 130


# -- in a process of its own


def test_a_reader_that_has_gone_is_no_traceback():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*RUN, "device", "list"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.stderr == b""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_standard_descriptors_change_neither_the_code_nor_the_other_outputs(closed):
    code = f"""
import os, subprocess, sys
close = lambda: [os.close(fd) for fd in {closed}]
print(subprocess.run({[*RUN, "run", "/nonexistent"]}, preexec_fn=close).returncode)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"35\n"
    assert done.stderr.count(b"\n") == (2 not in closed)


def test_a_full_standard_output_is_no_traceback():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*RUN, "device", "list"], stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 33
    assert done.stderr.startswith(b"vmsup: ")
    assert done.stderr.count(b"\n") == 1


def test_ps_shows_what_the_kernel_says_of_each_process(tmp_path):
    path = str(tmp_path / "vm.sock")
    child = subprocess.Popen(["sleep", "60"])
    answer = {"pid": os.getpid(), "processes": [["sleeper", child.pid], ["gone", 2**22 - 2]]}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)

        def serve():
            client, _ = listener.accept()
            with client:
                client.recv(100)
                client.sendall(json.dumps(answer).encode() + b"\n")

        thread = threading.Thread(target=serve)
        thread.start()
        code, out, _ = vmsup("ps", path, "--json")
        thread.join()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert code == 0
    (row,) = json.loads(out)
    assert (row["name"], row["pid"], row["namespaces"]) == ("sleeper", child.pid, [])


def test_the_supervisor_never_loads_device_code():
    code = "import supervisor.launch, sys\nassert not [m for m in sys.modules if 'devproc.devices' in m]"
    subprocess.run([sys.executable, "-c", code], check=True)
