"""Connects to vhost-user back ends, programs on the host that serve a guest's queues, and asks what they can.

Spec: QEMU's docs/interop/vhost-user.rst, "Communication", "Feature bits", "Protocol features".  What a back
end says here is bounded, checked and waited for only so long; from then on its device process alone hears it
(devproc/virtio/vhost_user.py).  Left out: being the socket's server.
"""

from __future__ import annotations

import socket
from typing import Final

from devproc.catalog import FS, VHOST_BLK_CONFIG, VHOST_NET
from devproc.vhost.connection import Closed, Connection
from devproc.vhost.message import (
    F_PROTOCOL_FEATURES,
    PROTOCOL_F_CONFIG,
    PROTOCOL_F_MQ,
    ConfigSpace,
    MessageError,
    Payload,
    Request,
    pack,
    parse_reply,
)
from devproc.virtio import spec
from devproc.wire import Scalar
from kvmcore.errors import ConfigError
from supervisor.config import VhostUserConfig
from supervisor.host import Host, Opened
from supervisor.nets import address

_RINGS: Final = spec.F_VERSION_1 | spec.F_INDIRECT_DESC | spec.F_EVENT_IDX | spec.F_RING_PACKED
_NUM_QUEUES: Final = 0x22  # 5.2.4, 16 bits


_FEATURES: Final = {
    # SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, MQ, DISCARD, WRITE_ZEROES
    "block": 0x7676,
    # CSUM, GUEST_CSUM, MAC, GUEST_TSO4, _TSO6, _ECN, _UFO, HOST_TSO4, _TSO6, _ECN, _UFO, MRG_RXBUF
    "net": 0xFFA3,
    "fs": 0,
}
"""Those of a device type that its model can pass on: masks (virtio 1.2, 5.1.3, 5.2.3, 5.11.3)."""


class _Talk(Connection):
    """The conversation before the device has its process; raises Closed and MessageError."""

    def tell(self, request: Request, payload: Payload = None) -> None:
        self.send(pack(request, payload))

    def ask(self, request: Request, payload: Payload = None) -> Payload:
        self.tell(request, payload)
        answer = self.receive()
        answer.close()
        return parse_reply(request, answer.header, answer.body)

    def number(self, request: Request) -> int:
        answer = self.ask(request)
        assert isinstance(answer, int)
        return answer


def open_vhost_user(vhost: VhostUserConfig, host: Host) -> Opened:
    """The opener of a vhost-user function.

    Raises:
        ConfigError: there is no back end at the socket, or not one that can be this device.
    """
    where = f"--vhost-user {vhost.type},socket={vhost.socket}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    host.undo.callback(sock.close)
    talk = _Talk(sock)
    try:
        sock.connect(vhost.socket)
        params = _settle(vhost, talk)
    except OSError as e:
        raise ConfigError(f"{where}: {e.strerror or e}") from None
    except Closed:
        raise ConfigError(f"{where}: the back end has closed the connection") from None
    except MessageError as e:
        raise ConfigError(f"{where}: the back end: {e}") from None
    sock.setblocking(False)
    return Opened({"backend": (sock.fileno(),)}, params)


def _settle(vhost: VhostUserConfig, talk: _Talk) -> tuple[Scalar, ...]:
    """What both can do, and what the model has to know of it: its parameters.

    Raises:
        MessageError: the other end is no such back end, or silent.
        Closed: it is gone.
    """
    disk = vhost.type == "block"
    offered = talk.number(Request.GET_FEATURES)
    if not offered & spec.F_VERSION_1 or not offered & F_PROTOCOL_FEATURES:
        raise MessageError(f"offers features {offered:#x}, expected VERSION_1 and PROTOCOL_FEATURES")
    can = talk.number(Request.GET_PROTOCOL_FEATURES)
    if disk and not can & PROTOCOL_F_CONFIG:
        raise MessageError(f"offers protocol features {can:#x}, expected CONFIG, for it is to be a disk")
    many = disk and bool(can & PROTOCOL_F_MQ)
    talk.tell(Request.SET_PROTOCOL_FEATURES, PROTOCOL_F_CONFIG * disk | PROTOCOL_F_MQ * many)
    talk.tell(Request.SET_OWNER)
    features = offered & (_FEATURES[vhost.type] | _RINGS)
    if vhost.type == "net":
        return features, len(VHOST_NET.queue_sizes), address(vhost.mac)
    if vhost.type == "fs":
        assert vhost.tag is not None
        return features, len(FS.queue_sizes), vhost.tag.encode()
    rings = min(vhost.queues, talk.number(Request.GET_QUEUE_NUM) if many else 1)
    if not rings:
        raise MessageError("has no queues")
    config = talk.ask(Request.GET_CONFIG, ConfigSpace(0, bytes(VHOST_BLK_CONFIG)))
    if not isinstance(config, ConfigSpace) or (config.offset, len(config.data)) != (0, VHOST_BLK_CONFIG):
        raise MessageError(f"answers GET_CONFIG by {config!r:.40}, expected {VHOST_BLK_CONFIG} bytes")
    data = bytearray(config.data)
    data[_NUM_QUEUES : _NUM_QUEUES + 2] = rings.to_bytes(2, "little")
    return features, rings, bytes(data)
