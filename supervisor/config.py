"""What `vmsup run` was asked for, by command line and `--config vm.toml`, checked before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from devproc.record import record
from kvmcore.errors import ConfigError
from supervisor.keyvalue import Key, check_table, parse

CPUS_MAX = 32
MEM_MIB_MIN, MEM_MIB_MAX = 16, 1 << 20
JAILS = ("full", "best-effort", "none")
IRQCHIPS = ("kernel", "split")
TRANSPORTS = ("mailbox", "socket")
SERIAL_TYPES = ("stdio", "file", "socket", "pty", "sink")
SERIAL_HARDWARE = ("serial", "virtio-console")
SERIAL_PORTS = 4  # of either hardware
IMAGE_FORMATS = ("raw", "qcow2")
BLOCK_QUEUES_MAX = 4
BLOCK_ID_MAX = 20  # bytes
RATE_MAX = 1 << 40  # of bytes or operations, per second
NET_QUEUES_MAX = 4
TAG_MAX = 36  # bytes; virtio 1.2, 5.11.4
MTU_MIN, MTU_MAX = 68, 65535  # virtio 1.2, 5.1.4.1
CID_MIN, CID_MAX = 3, (1 << 32) - 2  # virtio 1.2, 5.10.4
LOG_FORMATS = ("text", "json")
DEVICE_TIMEOUT_S = 2.0

SERIAL_KEYS = (
    Key("type", choices=SERIAL_TYPES),
    Key("hardware", choices=SERIAL_HARDWARE),
    Key("num", int, 1, SERIAL_PORTS),
    Key("name"),
    Key("path"),
    Key("input"),
    Key("console", bool),
    Key("earlycon", bool),
)
BLOCK_KEYS = (
    Key("path"),
    Key("ro", bool),
    Key("root", bool),
    Key("sparse", bool),
    Key("block-size", int, 512, 4096),
    Key("id"),
    Key("direct", bool),
    Key("queues", int, 1, BLOCK_QUEUES_MAX),
    Key("bps", int, 1, RATE_MAX),
    Key("iops", int, 1, RATE_MAX),
    Key("format", choices=IMAGE_FORMATS),
    Key("backing"),
    Key("backing-format", choices=IMAGE_FORMATS),
    Key("max-size", int, 512, 1 << 62),
    Key("packed-queue", bool),
)
NET_KEYS = (
    Key("tap-name"),
    Key("tap-fd", int, 0, (1 << 31) - 1),
    Key("passt", bool),
    Key("mac"),
    Key("queues", int, 1, NET_QUEUES_MAX),
    Key("mtu", int, MTU_MIN, MTU_MAX),
    Key("bps", int, 1, RATE_MAX),
    Key("pps", int, 1, RATE_MAX),
    Key("packed-queue", bool),
    Key("tcp-ports"),
    Key("udp-ports"),
)
SHARED_DIR_KEYS = (
    Key("path"),
    Key("tag"),
    Key("ro", bool),
)
VSOCK_KEYS = (
    Key("cid", int, CID_MIN, CID_MAX),
    Key("path"),
)
VHOST_USER_KEYS = (
    Key("type", choices=("block", "net", "fs")),
    Key("socket"),
    Key("queues", int, 1, BLOCK_QUEUES_MAX),
    Key("mac"),
    Key("tag"),
)


@record
class SerialConfig:
    """A 16550A, or a port of the virtio console: its other end, and whether the kernel prints there.

    A port of the virtio console is itself a console in the guest unless it has a `name`.
    """

    num: int
    type: str = "sink"
    path: str | None = None
    input: str | None = None
    console: bool = False
    earlycon: bool = False
    hardware: str = "serial"
    name: str = ""

    @property
    def which(self) -> str:
        """The keys that tell it from the others."""
        hardware = "" if self.hardware == "serial" else f"hardware={self.hardware},"
        return f"{hardware}num={self.num}"

    @classmethod
    def from_values(cls, where: str, values: Mapping[str, Any]) -> SerialConfig:
        """A port from checked keys; what does not go together is refused.

        Raises:
            ConfigError: a path is missing, or given where there is none.
        """
        port = cls(**{"num": 1, **values})
        if "type" not in values:
            raise ConfigError(f"{where}: type is missing, expected one of {', '.join(SERIAL_TYPES)}")
        if port.type in ("file", "socket") and port.path is None:
            raise ConfigError(f"{where}: type={port.type} needs path=")
        if port.type in ("stdio", "sink") and port.path is not None:
            raise ConfigError(f"{where}: path= has no meaning for type={port.type}")
        if port.input is not None and port.type not in ("file", "sink"):
            raise ConfigError(f"{where}: input= goes with type=file and type=sink")
        if port.earlycon and port.hardware != "serial":
            raise ConfigError(f"{where}: earlycon goes with hardware=serial")
        if port.name:
            if port.hardware == "serial" or port.console:
                raise ConfigError(f"{where}: name= is for a port of the virtio console that is no console")
            if re.fullmatch(r"[\w.-]{1,63}", port.name, re.A) is None:
                raise ConfigError(
                    f"{where}: name: expected up to 63 letters, digits, dots and dashes, not {port.name!r}"
                )
        return port


@record
class BlockConfig:
    """One disk: its image, and how the guest may use it.

    `block_size` in bytes, `bps` and `iops` a second, 0 without limit.  Without `format` an image is raw, and
    refused if it looks like another format; `backing` is the image that a qcow2 image is based on.  The disk
    may be given up to `max_size` bytes later.
    """

    path: str
    ro: bool = False
    root: bool = False
    sparse: bool = True
    block_size: int = 512
    id: str = ""
    direct: bool = False
    queues: int = 1
    bps: int = 0
    iops: int = 0
    format: str | None = None
    backing: str | None = None
    backing_format: str | None = None
    max_size: int = 0
    packed_queue: bool = False

    @classmethod
    def from_values(cls, where: str, values: Mapping[str, Any]) -> BlockConfig:
        """A disk from checked keys.

        Raises:
            ConfigError: no path, a block size that is not a power of two, an id that does not fit, or a
                backing image of one that cannot have any.
        """
        if "path" not in values:
            raise ConfigError(f"{where}: path is missing, expected an image")
        disk = cls(**{key.replace("-", "_"): value for key, value in values.items()})
        if disk.block_size & (disk.block_size - 1):
            raise ConfigError(f"{where}: block-size: expected a power of 2, not {disk.block_size}")
        if not disk.id.isascii() or len(disk.id) > BLOCK_ID_MAX:
            raise ConfigError(f"{where}: id: expected up to {BLOCK_ID_MAX} ASCII characters, not {disk.id!r}")
        if disk.backing is not None and disk.format != "qcow2":
            raise ConfigError(f"{where}: backing= goes with format=qcow2")
        if disk.backing_format is not None and disk.backing is None:
            raise ConfigError(f"{where}: backing-format= goes with backing=")
        return disk


@record
class NetConfig:
    """One network card: the tap or the passt that it is connected to, and how the guest may use it.

    Without `mac` it has a random address; without `mtu` its other end's.  `bps` bytes and `pps` frames a
    second in each direction, 0 without limit; the ports are passt's to forward, in its words.
    """

    tap_name: str | None = None
    tap_fd: int | None = None
    passt: bool = False
    mac: str | None = None
    queues: int = 1
    mtu: int | None = None
    bps: int = 0
    pps: int = 0
    packed_queue: bool = False
    tcp_ports: str | None = None
    udp_ports: str | None = None

    @classmethod
    def from_values(cls, where: str, values: Mapping[str, Any]) -> NetConfig:
        """A card from checked keys; what does not go together is refused.

        Raises:
            ConfigError: not exactly one other end, no Ethernet address of one card, or keys of another end.
        """
        net = cls(**{key.replace("-", "_"): value for key, value in values.items()})
        if (net.tap_name is not None) + (net.tap_fd is not None) + net.passt != 1:
            raise ConfigError(f"{where}: expected one of tap-name=, tap-fd= and passt")
        if net.tap_name is not None and re.fullmatch(r"[^\s/:]{1,15}", net.tap_name) is None:
            raise ConfigError(f"{where}: tap-name: expected an interface's name, not {net.tap_name!r}")
        _check_mac(where, net.mac)
        if net.queues > 1 and net.tap_name is None:
            raise ConfigError(f"{where}: queues= goes with tap-name=")
        if not net.passt and (net.tcp_ports is not None or net.udp_ports is not None):
            raise ConfigError(f"{where}: tcp-ports= and udp-ports= go with passt")
        return net


@record
class SharedDirConfig:
    """A directory that the guest may mount by its tag."""

    path: str
    tag: str
    ro: bool = False

    @classmethod
    def from_values(cls, where: str, values: Mapping[str, Any]) -> SharedDirConfig:
        """A directory from checked keys.

        Raises:
            ConfigError: no path, no tag, or a tag that does not fit.
        """
        for key, what in (("path", "a directory"), ("tag", "the name to mount it by")):
            if key not in values:
                raise ConfigError(f"{where}: {key} is missing, expected {what}")
        shared = cls(**values)
        _check_tag(where, shared.tag)
        return shared


@record
class VsockConfig:
    """Sockets between guest and host: the guest's context id, and the unix socket by which it is reached.

    Programs that the guest is to reach at a port listen at `path`_PORT.
    """

    cid: int
    path: str

    @classmethod
    def from_values(cls, where: str, values: Mapping[str, Any]) -> VsockConfig:
        """Both keys, checked already.

        Raises:
            ConfigError: one is missing.
        """
        for key in VSOCK_KEYS:
            if key.name not in values:
                raise ConfigError(f"{where}: {key.name} is missing, expected cid=N,path=SOCKET")
        return cls(**values)


@record
class VhostUserConfig:
    """A device whose queues a program serves that listens at the unix socket `socket`.

    `queues` a disk's, at most; `mac` a card's address, any without; `tag` what a directory is mounted by.
    """

    type: str
    socket: str
    queues: int = BLOCK_QUEUES_MAX
    mac: str | None = None
    tag: str | None = None

    @classmethod
    def from_values(cls, where: str, values: Mapping[str, Any]) -> VhostUserConfig:
        """A device from checked keys; what does not go with its type is refused.

        Raises:
            ConfigError: no type, no socket, no tag of a directory, or a value that does not fit.
        """
        for name in ("type", "socket"):
            if name not in values:
                raise ConfigError(f"{where}: {name} is missing, expected block|net|fs,socket=PATH")
        for name, kind in (("queues", "block"), ("mac", "net"), ("tag", "fs")):
            if name in values and values["type"] != kind:
                raise ConfigError(f"{where}: {name}= goes with {kind}")
        vhost = cls(**values)
        _check_mac(where, vhost.mac)
        if vhost.type == "fs":
            if vhost.tag is None:
                raise ConfigError(f"{where}: tag is missing, expected the name to mount it by")
            _check_tag(where, vhost.tag)
        return vhost


def _check_mac(where: str, mac: str | None) -> None:
    if mac is not None and re.fullmatch(r"[\da-f][02468ace](:[\da-f]{2}){5}", mac, re.I) is None:
        raise ConfigError(f"{where}: mac: expected an address like 02:00:00:00:00:01, not {mac!r}")


def _check_tag(where: str, tag: str) -> None:
    if len(tag.encode()) > TAG_MAX:
        raise ConfigError(f"{where}: tag: expected up to {TAG_MAX} bytes, not {tag!r}")


@record
class RunConfig:
    """Everything `vmsup run` needs; memory in MiB, times in seconds, affinity as vCPU -> host CPUs."""

    kernel: str
    cpus: int = 1
    cpu_affinity: Mapping[int, frozenset[int]] = MappingProxyType({})
    mem: int = 256
    initrd: str | None = None
    params: tuple[str, ...] = ()
    serial: tuple[SerialConfig, ...] = ()
    block: tuple[BlockConfig, ...] = ()
    net: tuple[NetConfig, ...] = ()
    shared_dir: tuple[SharedDirConfig, ...] = ()
    vsock: tuple[VsockConfig, ...] = ()
    vhost_user: tuple[VhostUserConfig, ...] = ()
    irqchip: str = "kernel"
    pcie_ecam: bool = True
    rng: bool = True
    balloon: bool = False
    android_fstab: str | None = None
    socket: str | None = None
    jail: str = "full"
    on_device_death: str = "stop"
    device_timeout: float = DEVICE_TIMEOUT_S
    transport: str = "mailbox"
    verbose: bool = False
    log_format: str = "text"
    jail_report: str | None = None
    record: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.cpus <= CPUS_MAX:
            raise ConfigError(f"--cpus: expected 1 to {CPUS_MAX}, not {self.cpus}")
        if not MEM_MIB_MIN <= self.mem <= MEM_MIB_MAX:
            raise ConfigError(f"--mem: expected {MEM_MIB_MIN} to {MEM_MIB_MAX} MiB, not {self.mem}")
        if not 0.05 <= self.device_timeout <= 3600:
            raise ConfigError(f"--device-timeout: expected 0.05 to 3600 seconds, not {self.device_timeout}")
        for vcpu in self.cpu_affinity:
            if vcpu >= self.cpus:
                raise ConfigError(f"--cpu-affinity: there is no vCPU {vcpu}, --cpus is {self.cpus}")
        ports = [s.which for s in self.serial]
        for port in ports:
            if ports.count(port) > 1:
                raise ConfigError(f"--serial: {port} given twice")
        for n, console in enumerate(self.virtio_consoles(), 1):
            if console.num != n:
                raise ConfigError(f"--serial: {console.which} without num={n}, expected no gap from 1 on")
        if sum(s.type == "stdio" for s in self.serial) > 1:
            raise ConfigError("--serial: type=stdio given twice, there is one standard input")
        if sum(s.console for s in self.serial) > 1:
            raise ConfigError("--serial: console given twice, the kernel has one")
        if sum(d.root for d in self.block) > 1:
            raise ConfigError("--block: root given twice, the kernel has one")
        tags = [*(d.tag for d in self.shared_dir), *(d.tag for d in self.vhost_user if d.tag is not None)]
        for tag in tags:
            if tags.count(tag) > 1:
                raise ConfigError(f"--shared-dir, --vhost-user: tag={tag} given twice")
        if len(self.vsock) > 1:
            raise ConfigError("--vsock given twice, a guest has one context id")

    def serial_ports(self) -> tuple[SerialConfig, ...]:
        """All four ports: COM1 on stdio unless told otherwise, the rest sinks."""
        given = {s.num: s for s in self.serial if s.hardware == "serial"}
        stdio_free = not any(s.type == "stdio" for s in self.serial)
        first = SerialConfig(1, "stdio" if stdio_free else "sink")
        return tuple(given.get(n, first if n == 1 else SerialConfig(n)) for n in range(1, SERIAL_PORTS + 1))

    def virtio_consoles(self) -> tuple[SerialConfig, ...]:
        """The ports of the virtio console, if there is one."""
        return tuple(sorted((s for s in self.serial if s.hardware != "serial"), key=lambda s: s.num))

    def command_line(self, serial_bases: Sequence[int]) -> str:
        """The kernel command line: console and reboot defaults, then every --params in order."""
        ports = self.serial_ports()
        names = {f"ttyS{s.num - 1}": s for s in ports}
        names |= {f"hvc{n}": s for n, s in enumerate(s for s in self.virtio_consoles() if not s.name)}
        on_stdio = next((name for name, s in names.items() if s.type == "stdio"), "ttyS0")
        words = [f"console={next((name for name, s in names.items() if s.console), on_stdio)}"]
        words += [f"earlycon=uart8250,io,{serial_bases[s.num - 1]:#x}" for s in ports if s.earlycon]
        words += ["reboot=k", "panic=-1"]
        for n, disk in enumerate(self.block):
            if disk.root:
                words += [f"root=/dev/vd{chr(ord('a') + n)}", "ro" if disk.ro else "rw"]
        return " ".join([*words, *self.params])


def parse_cpu_list(where: str, text: str) -> frozenset[int]:
    """`0,2-3` as a set of CPU numbers.

    Raises:
        ConfigError: it is not such a list.
    """
    cpus: set[int] = set()
    for part in text.split(","):
        m = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part)
        if m is None or (m[2] and int(m[2]) < int(m[1])):
            raise ConfigError(f"{where}: expected CPUs like 0,2-3, not {text!r}")
        cpus.update(range(int(m[1]), int(m[2] or m[1]) + 1))
    missing = cpus - os.sched_getaffinity(0)
    if missing:
        raise ConfigError(f"{where}: this host has no CPU {min(missing)} for us")
    return frozenset(cpus)


def parse_affinity(text: str, cpus: int) -> dict[int, frozenset[int]]:
    """crosvm's two forms: `0-1` for every vCPU, or `0=0:1=1,3` per vCPU.

    Raises:
        ConfigError: neither form.
    """
    where = "--cpu-affinity"
    if "=" not in text:
        one = parse_cpu_list(where, text)
        return dict.fromkeys(range(cpus), one)
    result: dict[int, frozenset[int]] = {}
    for part in text.split(":"):
        vcpu, eq, rest = part.partition("=")
        if not eq or not vcpu.isdecimal() or int(vcpu) in result:
            raise ConfigError(f"{where}: expected VCPU=CPUS:VCPU=CPUS, not {text!r}")
        result[int(vcpu)] = parse_cpu_list(where, rest)
    return result


# The keys that --config takes: the long options' own names.
_SCALARS = (
    Key("kernel"),
    Key("cpus", int, 1, CPUS_MAX),
    Key("cpu-affinity"),
    Key("mem", int, MEM_MIB_MIN, MEM_MIB_MAX),
    Key("initrd"),
    Key("irqchip", choices=IRQCHIPS),
    Key("pcie-ecam", bool),
    Key("rng", bool),
    Key("balloon", bool),
    Key("android-fstab"),
    Key("socket"),
    Key("jail", choices=JAILS),
    Key("on-device-death", choices=("stop",)),
    Key("transport", choices=TRANSPORTS),
    Key("verbose", bool),
    Key("log-format", choices=LOG_FORMATS),
    Key("jail-report"),
)
# Lists of tables, each on the command line an option that may be given several times.
_Listed = (
    type[SerialConfig]
    | type[BlockConfig]
    | type[NetConfig]
    | type[SharedDirConfig]
    | type[VsockConfig]
    | type[VhostUserConfig]
)
_TABLES: Mapping[str, tuple[tuple[Key, ...], _Listed]] = {
    "serial": (SERIAL_KEYS, SerialConfig),
    "block": (BLOCK_KEYS, BlockConfig),
    "net": (NET_KEYS, NetConfig),
    "shared-dir": (SHARED_DIR_KEYS, SharedDirConfig),
    "vsock": (VSOCK_KEYS, VsockConfig),
    "vhost-user": (VHOST_USER_KEYS, VhostUserConfig),
}
_LISTS = ("params", *_TABLES)
_FLOATS = ("device-timeout",)


def read_file(path: str) -> dict[str, Any]:
    """The settings of a TOML file, keys as RunConfig's fields.

    Raises:
        ConfigError: unreadable, not TOML, or a key or value that does not belong.
    """
    import tomllib  # noqa: PLC0415 - a start without --config does not pay for it

    where = f"--config {path}"
    try:
        with open(path, "rb") as f:
            table = tomllib.load(f)
    except OSError as e:
        raise ConfigError(f"{where}: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{where}: not TOML: {e}") from None
    lists = {k: table.pop(k) for k in _LISTS if k in table}
    floats = {k: table.pop(k) for k in _FLOATS if k in table}
    known = ", ".join([*(k.name for k in _SCALARS), *_LISTS, *_FLOATS])
    for name in table:
        if name not in {k.name for k in _SCALARS}:
            raise ConfigError(f"{where}: unknown key {name!r}, expected one of {known}")
    result: dict[str, Any] = check_table(where, _SCALARS, table)
    for name, value in floats.items():
        if type(value) not in (int, float):
            raise ConfigError(f"{where}: {name}: expected seconds, not {value!r}")
        result[name] = float(value)
    if "params" in lists:
        if not isinstance(lists["params"], list) or not all(isinstance(p, str) for p in lists["params"]):
            raise ConfigError(f"{where}: params: expected a list of strings")
        result["params"] = tuple(lists["params"])
    for name, (keys, kind) in _TABLES.items():
        tables = lists.get(name, [])
        if not isinstance(tables, list) or not all(isinstance(t, dict) for t in tables):
            raise ConfigError(f"{where}: {name}: expected a list of tables")
        at = f"{where}: {name}"
        result[name] = tuple(kind.from_values(at, check_table(at, keys, t)) for t in tables)
    return {name.replace("-", "_"): value for name, value in result.items()}


def build(options: Mapping[str, Any]) -> RunConfig:
    """The configuration from command-line `options` (None: not given) over the file named by `config`.

    Lists of the file come first, then the command line's; of single values the command line's wins.

    Raises:
        ConfigError: anything that cannot be used.
    """
    given = {k: v for k, v in options.items() if v is not None and k != "config"}
    settings = read_file(options["config"]) if options.get("config") else {}
    for name, (keys, kind) in _TABLES.items():
        at = f"--{name}"
        field_name = name.replace("-", "_")
        texts = given.get(field_name, ())
        given[field_name] = tuple(kind.from_values(at, parse(at, keys, text)) for text in texts)
    for name in _LISTS:
        field_name = name.replace("-", "_")
        given[field_name] = (*settings.get(field_name, ()), *given.get(field_name, ()))
    settings |= given
    if "kernel" not in settings:
        raise ConfigError("KERNEL is missing: expected the path of a bzImage or vmlinux")
    if isinstance(settings.get("cpu_affinity"), str):
        settings["cpu_affinity"] = parse_affinity(settings["cpu_affinity"], settings.get("cpus", 1))
    return RunConfig(**settings)
