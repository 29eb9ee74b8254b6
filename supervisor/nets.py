"""Opens what each network card is connected to: a tap interface of the host, or a passt process of its own.

Spec: Linux Documentation/networking/tuntap.rst, include/uapi/linux/if_tun.h; passt(1).  A tap must exist:
who makes one decides where it leads and who may use it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pwd
import re
import select
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from devproc.catalog import NET_PAIRS
from kvmcore.errors import ConfigError
from supervisor.config import NetConfig
from supervisor.host import Host, Opened

if TYPE_CHECKING:
    import subprocess

_TUN: Final = "/dev/net/tun"
_TUNSETIFF, _TUNGETIFF = 0x400454CA, 0x800454D2
_TUNSETVNETHDRSZ: Final = 0x400454D8
_SIOCGIFMTU: Final = 0x8921
_IFREQ: Final = struct.Struct("16sH22x")
_IFREQ_INT: Final = struct.Struct("16si20x")
_IFF_TAP, _IFF_MULTI_QUEUE, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x0100, 0x1000, 0x4000
_FLAGS: Final = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
_HEADER_SIZE: Final = struct.pack("=i", 12)

_PASST: Final = "passt"
_PASST_MTU: Final = 65520  # its own default: there is no segmentation offload that would make large packets
_NOBODY: Final = "nobody"
_SNDBUF: Final = 4 << 20
_READY_S: Final = 10.0
_END_S: Final = 1.0
_LINE_MAX: Final = 4096


def open_net(net: NetConfig, host: Host) -> Opened:
    """The opener of a network card.

    Raises:
        ConfigError: the tap cannot be used as it is, or passt does not start.
    """
    mac = address(net.mac)
    fds: tuple[int, ...]
    if net.passt:
        fds, mtu = (_passt(net, host),), net.mtu or _PASST_MTU
    else:
        fds = tuple(_named_tap(net)) if net.tap_name is not None else (_given_tap(net),)
        host.undo.callback(_close, fds)
        mtu = net.mtu or _mtu_of(fds[0])
        fds += (fds[0],) * (NET_PAIRS - len(fds))
    return Opened({"link": fds}, (mac, mtu, net.queues, net.bps, net.pps, int(net.packed_queue)))


def address(mac: str | None) -> bytes:
    """What the text `mac` says; without one, any unicast address that is locally administered."""
    if mac is not None:
        return bytes.fromhex(mac.replace(":", ""))
    first, *rest = os.urandom(6)
    return bytes([first & 0xFC | 0x02, *rest])


def _close(fds: tuple[int, ...]) -> None:
    for fd in fds:
        os.close(fd)


def _named_tap(net: NetConfig) -> list[int]:
    """A descriptor for each queue of the interface."""
    name, many = net.tap_name, net.queues > 1
    assert name is not None
    where = f"--net tap-name={name}"
    request = _IFREQ.pack(name.encode(), _FLAGS | _IFF_MULTI_QUEUE * many)
    fds: list[int] = []
    try:
        socket.if_nametoindex(name)  # or TUNSETIFF would make one
        for _ in range(net.queues):
            fds.append(os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
            fcntl.ioctl(fds[-1], _TUNSETIFF, request)
            fcntl.ioctl(fds[-1], _TUNSETVNETHDRSZ, _HEADER_SIZE)
    except OSError as e:
        _close(tuple(fds))
        if not fds:
            why = f"there is no such interface, expected one made by: ip tuntap add {name} mode tap user USER"
        elif e.filename is not None:
            why = f"{e.filename}: {e.strerror}"
        else:
            why = {
                errno.EINVAL: f"expected a tap made {'with' if many else 'without'} multi_queue",
                errno.EBUSY: "in use by another process",
                errno.EPERM: "belongs to another user",
            }.get(e.errno or 0, f"TUNSETIFF: {e.strerror}")
        raise ConfigError(f"{where}: {why}") from None
    return fds


def _given_tap(net: NetConfig) -> int:
    """A duplicate of the descriptor that we were started with."""
    where = f"--net tap-fd={net.tap_fd}"
    assert net.tap_fd is not None
    try:
        name, flags = _IFREQ.unpack(fcntl.ioctl(net.tap_fd, _TUNGETIFF, bytes(_IFREQ.size)))
    except OSError:
        raise ConfigError(f"{where}: is not a tap's descriptor") from None
    if flags & _FLAGS != _FLAGS:
        raise ConfigError(
            f"{where}: {name.rstrip(bytes(1)).decode()} has flags {flags:#x}, "
            "expected IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"
        )
    fd = fcntl.fcntl(net.tap_fd, fcntl.F_DUPFD_CLOEXEC, 0)
    os.set_blocking(fd, False)
    fcntl.ioctl(fd, _TUNSETVNETHDRSZ, _HEADER_SIZE)
    return fd


def _mtu_of(tap: int) -> int:
    """The interface's, which the guest must not exceed."""
    name, _ = _IFREQ.unpack(fcntl.ioctl(tap, _TUNGETIFF, bytes(_IFREQ.size)))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, _SIOCGIFMTU, _IFREQ_INT.pack(name, 0))
    mtu: int = _IFREQ_INT.unpack(answer)[1]
    return mtu


class _Passt:
    """What a running passt says; a `host.Watched`."""

    def __init__(self, stderr: int, tell: Callable[[str], None]) -> None:
        self._stderr = stderr
        self._tell = tell
        self._over = False

    def wants(self) -> dict[int, int]:
        return {} if self._over else {self._stderr: select.POLLIN}

    def ready(self, fd: int, got: int) -> None:
        said = os.read(fd, _LINE_MAX)
        self._over = not said
        for line in said.decode(errors="replace").splitlines() or ["has ended, the network is down"]:
            self._tell(f"passt: {line}")


def _passt(net: NetConfig, host: Host) -> int:
    """Our end of the socket of a passt that has started; it ends when that is closed."""
    import subprocess  # noqa: PLC0415 - no other network pays for it

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    for end in (ours, theirs):  # as much as an ordinary user gets: passt drops what finds no room
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SNDBUF)
    started, pidfile = os.pipe()
    stderr, its_stderr = os.pipe()
    words = [_PASST, "--fd", str(theirs.fileno()), "--foreground", "--quiet"]
    words += ["--pid", f"/proc/self/fd/{pidfile}", "--mtu", str(net.mtu or _PASST_MTU)]
    for option, value in (("--tcp-ports", net.tcp_ports), ("--udp-ports", net.udp_ports)):
        words += [option, value] if value is not None else []
    if os.geteuid() == 0:  # it refuses to be root; the pipe is opened again by what it becomes
        nobody = pwd.getpwnam(_NOBODY)
        os.fchown(pidfile, nobody.pw_uid, nobody.pw_gid)
        words += ["--runas", f"{nobody.pw_uid}:{nobody.pw_gid}"]
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=its_stderr,
            pass_fds=(theirs.fileno(), pidfile),
            start_new_session=True,  # out of reach of the terminal's Ctrl-C
        )
    except FileNotFoundError:
        ours.close()
        os.close(stderr)
        os.close(started)
        raise ConfigError("--net passt: there is no passt, expected Debian's package passt") from None
    finally:
        theirs.close()
        os.close(pidfile)
        os.close(its_stderr)
    fd = ours.detach()
    host.undo.callback(os.close, stderr)
    host.undo.callback(_end, process, fd)
    try:
        if not select.select([started], [], [], _READY_S)[0]:
            raise ConfigError(f"--net passt: not ready after {_READY_S:g} s")
        if not os.read(started, 32):  # it has left without writing its pid
            said = os.read(stderr, _LINE_MAX).decode(errors="replace")
            raise ConfigError(f"--net passt: {_last_line(said)}")
    finally:
        os.close(started)
    host.watched.append(_Passt(stderr, host.tell))
    return fd


def _last_line(said: str) -> str:
    """The reason among what passt printed, which also complains when there is no syslog."""
    lines = [line for line in said.splitlines() if line and not re.match(r"Failed to send \d+ bytes", line)]
    return lines[-1] if lines else "ended at once"


def _end(process: subprocess.Popen[bytes], fd: int) -> None:
    import subprocess  # noqa: PLC0415

    os.close(fd)
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(PermissionError):  # as root, once our capabilities are gone
            process.kill()
