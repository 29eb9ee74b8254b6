import os

import pytest

from devproc.catalog import BLOCK, NET_PAIRS
from kvmcore.errors import ConfigError
from supervisor import config
from supervisor.config import (
    BlockConfig,
    NetConfig,
    RunConfig,
    SerialConfig,
    VsockConfig,
    build,
    parse_affinity,
    parse_cpu_list,
)

BASES = (0x3F8, 0x2F8, 0x3E8, 0x2E8)


def test_the_defaults_are_one_jailed_cpu_with_com1_on_stdio():
    c = build({"kernel": "vmlinux", "cpus": None, "serial": None})
    assert (c.cpus, c.mem, c.jail, c.irqchip) == (1, 256, "full", "kernel")
    assert [s.type for s in c.serial_ports()] == ["stdio", "sink", "sink", "sink"]
    assert c.command_line(BASES) == "console=ttyS0 reboot=k panic=-1"


def test_a_missing_kernel_is_named():
    with pytest.raises(ConfigError, match="KERNEL is missing"):
        build({})


def test_stdio_moves_to_the_port_that_asks_for_it():
    c = build({"kernel": "k", "serial": ["type=stdio,num=2"]})
    assert [s.type for s in c.serial_ports()] == ["sink", "stdio", "sink", "sink"]
    assert c.command_line(BASES).startswith("console=ttyS1 ")


def test_the_port_marked_console_is_the_kernels_console():
    c = build({"kernel": "k", "serial": ["sink,num=3,console,earlycon"]})
    assert c.command_line(BASES).startswith("console=ttyS2 earlycon=uart8250,io,0x3e8 ")


def test_a_virtio_console_has_numbers_of_its_own():
    c = build({"kernel": "k", "serial": ["sink", "hardware=virtio-console,type=stdio", "file,path=x,num=2"]})
    assert [s.type for s in c.serial_ports()] == ["sink", "file", "sink", "sink"]
    assert [s.type for s in c.virtio_consoles()] == ["stdio"]
    assert c.command_line(BASES).startswith("console=hvc0 ")


def test_hvc_counts_the_ports_without_a_name():
    ports = ["sink,num=3,console", "sink,num=2", "sink,num=1,name=agent"]
    c = build({"kernel": "k", "serial": [f"{port},hardware=virtio-console" for port in ports]})
    assert [s.name for s in c.virtio_consoles()] == ["agent", "", ""]
    assert c.command_line(BASES).startswith("console=hvc1 ")


def test_a_named_port_on_stdio_is_no_console():
    c = build({"kernel": "k", "serial": ["stdio,hardware=virtio-console,name=agent"]})
    assert c.command_line(BASES).startswith("console=ttyS0 ")


def test_every_params_word_is_kept_in_order():
    c = build({"kernel": "k", "params": ["a=1 b", "quiet"]})
    assert c.command_line(BASES).endswith(" a=1 b quiet")


@pytest.mark.parametrize(
    ("serial", "why"),
    [
        (["num=2"], "type is missing"),
        (["type=file"], "type=file needs path="),
        (["type=socket"], "type=socket needs path="),
        (["type=sink,path=x"], "path= has no meaning"),
        (["type=pty,input=x"], "input= goes with"),
        (["sink", "sink"], "num=1 given twice"),
        (["stdio", "stdio,num=2"], "stdio given twice"),
        (["sink,console", "sink,num=2,console"], "console given twice"),
        (["sink,console", "sink,hardware=virtio-console,console"], "console given twice"),
        (["sink,hardware=virtio-console"] * 2, "hardware=virtio-console,num=1 given twice"),
        (["sink,hardware=virtio-console,num=2"], "num=2 without num=1"),
        (["sink,hardware=virtio-console,earlycon"], "earlycon goes with hardware=serial"),
        (["sink,name=agent"], "name= is for a port"),
        (["sink,hardware=virtio-console,name=agent,console"], "name= is for a port"),
        (["sink,hardware=virtio-console,name=a/b"], "name: expected up to 63"),
    ],
)
def test_serial_ports_that_make_no_sense_are_refused(serial, why):
    with pytest.raises(ConfigError, match=f"^--serial: .*{why}"):
        build({"kernel": "k", "serial": serial})


@pytest.mark.parametrize(
    ("field", "value", "option"),
    [
        ("cpus", 0, "--cpus"),
        ("cpus", config.CPUS_MAX + 1, "--cpus"),
        ("mem", config.MEM_MIB_MIN - 1, "--mem"),
        ("mem", config.MEM_MIB_MAX + 1, "--mem"),
        ("device_timeout", 0.0, "--device-timeout"),
        ("device_timeout", float("nan"), "--device-timeout"),
    ],
)
def test_numbers_out_of_range_name_their_option(field, value, option):
    with pytest.raises(ConfigError, match=f"^{option}: expected"):
        RunConfig("k", **{field: value})


def test_a_cpu_list_has_numbers_and_ranges(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert parse_cpu_list("--x", "0,2-4") == {0, 2, 3, 4}


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-2", "0,,1", "0 1", "1-2-3"])
def test_what_is_not_a_cpu_list_is_refused(text):
    with pytest.raises(ConfigError, match="expected CPUs like 0,2-3"):
        parse_cpu_list("--x", text)


def test_a_host_cpu_that_we_may_not_use_is_refused():
    missing = max(os.sched_getaffinity(0)) + 1
    with pytest.raises(ConfigError, match=f"no CPU {missing}"):
        parse_cpu_list("--x", str(missing))


def test_affinity_is_one_list_for_all_or_one_for_each(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert parse_affinity("0-1", 2) == {0: {0, 1}, 1: {0, 1}}
    assert parse_affinity("0=1:2=0,3", 3) == {0: {1}, 2: {0, 3}}


@pytest.mark.parametrize("text", ["0=", "=1", "0=1:", "0=1:0=2", "x=1", "-1=0"])
def test_what_is_not_an_affinity_is_refused(text, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    with pytest.raises(ConfigError, match="--cpu-affinity"):
        parse_affinity(text, 4)


def test_affinity_of_a_vcpu_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no vCPU 1"):
        build({"kernel": "k", "cpu_affinity": f"1={min(os.sched_getaffinity(0))}"})


def file(tmp_path, text):
    path = tmp_path / "vm.toml"
    path.write_text(text)
    return str(path)


def test_a_file_takes_the_options_own_names(tmp_path):
    path = file(
        tmp_path,
        """
        kernel = "bzImage"
        cpus = 2
        mem = 512
        pcie-ecam = false
        device-timeout = 3
        params = ["quiet"]
        [[serial]]
        type = "file"
        path = "log"
        """,
    )
    c = build({"config": path})
    assert (c.kernel, c.cpus, c.mem, c.pcie_ecam, c.device_timeout) == ("bzImage", 2, 512, False, 3.0)
    assert c.serial == (SerialConfig(1, "file", "log"),)
    assert c.params == ("quiet",)


def test_the_command_line_wins_over_the_file_and_its_lists_come_after(tmp_path):
    path = file(tmp_path, 'kernel = "a"\ncpus = 2\nparams = ["one"]')
    c = build({"config": path, "kernel": "b", "cpus": 1, "params": ["two"]})
    assert (c.kernel, c.cpus, c.params) == ("b", 1, ("one", "two"))


def test_a_switch_that_was_not_given_leaves_the_files_value(tmp_path):
    path = file(tmp_path, 'kernel = "a"\nverbose = true\npcie-ecam = false')
    c = build({"config": path, "verbose": None, "pcie_ecam": None})
    assert c.verbose is True
    assert c.pcie_ecam is False


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("kernel = ", "not TOML"),
        ("speed = 1", "unknown key 'speed', expected one of kernel, cpus"),
        ('cpus = "two"', "cpus: expected an integer"),
        ("cpus = 0", "cpus: expected an integer from 1"),
        ('jail = "some"', "jail: expected one of full"),
        ("device-timeout = true", "device-timeout: expected seconds"),
        ('params = "quiet"', "params: expected a list of strings"),
        ("params = [1]", "params: expected a list of strings"),
        ("serial = 1", "serial: expected a list of tables"),
        ('[[serial]]\ntype = "file"', "serial: type=file needs path="),
        ("[[serial]]\nbaud = 9600", "serial: unknown key 'baud'"),
        ("config = 1", "unknown key 'config'"),
        ('log-format = "xml"', "log-format: expected one of text, json"),
        ("jail-report = 1", "jail-report: expected"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, text, why):
    path = file(tmp_path, text)
    with pytest.raises(ConfigError, match=f"^--config {path}: .*{why}") as e:
        build({"config": path, "kernel": "k"})
    assert "\n" not in str(e.value)


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "vm.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not TOML"):
        build({"config": str(path)})


@pytest.mark.parametrize(("path", "why"), [("/nonexistent", "No such file"), ("/", "directory")])
def test_a_file_that_cannot_be_read_is_refused(path, why):
    with pytest.raises(ConfigError, match=f"^--config {path}: .*{why}"):
        build({"config": path})


def test_a_disk_is_its_path_and_what_is_said_of_it():
    c = build(
        {"kernel": "k", "block": ["a.img", "path=b.img,ro,id=data,block-size=4096,bps=1000,sparse=off"]}
    )
    assert c.block == (
        BlockConfig("a.img"),
        BlockConfig("b.img", ro=True, id="data", block_size=4096, bps=1000, sparse=False),
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ro", "path is missing"),
        ("x,block-size=1000", "block-size: expected a power of 2"),
        ("x,block-size=8192", "block-size: expected an integer from 512 to 4096"),
        ("x,id=twenty-one-characters", "id: expected up to 20"),
        ("x,id=\u00e9", "id: expected up to 20 ASCII"),
        ("x,format=vmdk", "format: expected one of raw"),
        ("x,queues=0", "queues: expected an integer from 1"),
        ("x,readonly", "'readonly' has no value"),
    ],
)
def test_disks_that_make_no_sense_are_refused(text, why):
    with pytest.raises(ConfigError, match=f"^--block: .*{why}"):
        build({"kernel": "k", "block": [text]})


def test_the_guest_cannot_be_given_more_queues_than_the_device_has():
    assert len(BLOCK.queue_sizes) == config.BLOCK_QUEUES_MAX


@pytest.mark.parametrize(("mode", "word"), [("", "rw"), (",ro", "ro")])
def test_the_root_disk_is_named_by_its_place_and_before_what_the_user_says(mode, word):
    c = build({"kernel": "k", "block": ["a", f"b,root{mode}"], "params": ["root=/dev/sda"]})
    assert c.command_line(BASES).endswith(f" root=/dev/vdb {word} root=/dev/sda")


def test_there_is_one_root():
    with pytest.raises(ConfigError, match="root given twice"):
        build({"kernel": "k", "block": ["a,root", "b,root"]})


def test_disks_of_the_file_come_before_those_of_the_command_line(tmp_path):
    path = tmp_path / "vm.toml"
    path.write_text('kernel = "k"\n[[block]]\npath = "a"\nblock-size = 4096\n')
    c = build({"config": str(path), "block": ["b"]})
    assert c.block == (BlockConfig("a", block_size=4096), BlockConfig("b"))


def test_a_card_is_its_tap_and_what_is_said_of_it():
    c = build({"kernel": "k", "net": ["tap0", "passt,mac=02:aB:00:00:00:01,mtu=1500,pps=9", "tap-fd=7"]})
    assert c.net == (
        NetConfig(tap_name="tap0"),
        NetConfig(passt=True, mac="02:aB:00:00:00:01", mtu=1500, pps=9),
        NetConfig(tap_fd=7),
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("mtu=1500", "expected one of tap-name=, tap-fd= and passt"),
        ("tap0,passt", "expected one of tap-name=, tap-fd= and passt"),
        ("passt=false", "expected one of tap-name=, tap-fd= and passt"),
        ("tap0,mtu=67", "mtu: expected an integer from 68"),
        ("tap0,mac=02:00:00:00:00", "mac: expected an address"),
        ("tap0,mac=01:00:5e:00:00:01", "mac: expected an address"),
        ("tap0,queues=5", "queues: expected an integer from 1 to 4"),
        ("tap-fd=7,queues=2", "queues= goes with tap-name="),
        ("passt,queues=2", "queues= goes with tap-name="),
        ("tap0,tcp-ports=22", "go with passt"),
        ("a-name-that-is-long", "tap-name: expected an interface's name"),
        ("../../etc", "tap-name: expected an interface's name"),
    ],
)
def test_cards_that_make_no_sense_are_refused(text, why):
    with pytest.raises(ConfigError, match=f"^--net: .*{why}"):
        build({"kernel": "k", "net": [text]})


def test_a_guest_has_one_context_id_and_a_path_to_it():
    assert build({"kernel": "k", "vsock": ["3,path=v"]}).vsock == (VsockConfig(3, "v"),)
    with pytest.raises(ConfigError, match="--vsock given twice"):
        build({"kernel": "k", "vsock": ["3,path=v", "4,path=w"]})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("3", "path is missing"),
        ("path=v", "cid is missing"),
        ("2,path=v", "cid: expected an integer from 3 to 4294967294"),
        ("0xffffffff,path=v", "cid: expected an integer from 3 to 4294967294"),
        ("3,path=", "path"),
    ],
)
def test_a_context_id_or_path_that_makes_no_sense_is_refused(text, why):
    with pytest.raises(ConfigError, match=f"^--vsock: .*{why}"):
        build({"kernel": "k", "vsock": [text]})


def test_the_guest_cannot_be_given_more_pairs_of_queues_than_the_card_has():
    assert config.NET_QUEUES_MAX == NET_PAIRS
