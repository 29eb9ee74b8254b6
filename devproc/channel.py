"""One end of a wire channel: a SOCK_SEQPACKET socket, its frame limit and its transition table.

Both ends use it: the supervisor's side of every channel, the zygote's, and a device's control channel.  A
device's access channel is served by `devproc/child.py` itself, where microseconds count.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

from devproc.wire import CONTROL_FRAME_MAX, Conversation, Message, PeerError, Sender, Table, decode, encode

FDS_MAX = 128


class ChannelClosed(Exception):
    """The other end is gone."""


class Channel:
    """Sends and receives messages that the transition table allows.

    Args:
        sock: a connected SOCK_SEQPACKET socket; closed by `close`.
        table, state: see `wire.Conversation`.
        me: which end this is; the other one is the peer.
        limit: the longest frame, bytes, either way.
    """

    def __init__(
        self,
        sock: socket.socket,
        table: Table,
        state: str,
        me: Sender,
        peer: Sender,
        limit: int = CONTROL_FRAME_MAX,
    ) -> None:
        self.sock = sock
        self.conversation = Conversation(table, state, me)
        self._me = me
        self._peer = peer
        self._limit = limit

    def fileno(self) -> int:
        """The descriptor, so that a Channel can be waited for with select."""
        return self.sock.fileno()

    @property
    def state(self) -> str:
        """Where the conversation stands, a state of its table."""
        return self.conversation.state

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send `message`, with `fds` as SCM_RIGHTS.

        Raises:
            WireError: the message is not valid, or not allowed now.
            ChannelClosed: the other end is gone.
            TimeoutError: the socket has a timeout and the peer did not drain it.
        """
        frame = self.frame(message)
        try:
            if fds:
                socket.send_fds(self.sock, [frame], list(fds))
            else:
                self.sock.send(frame)
        except (BrokenPipeError, ConnectionResetError):
            raise ChannelClosed from None

    def frame(self, message: Message) -> bytes:
        """What `send` sends, for whoever must send it in another way.

        Raises:
            WireError: the message is not valid, or not allowed now.
        """
        frame = encode(message, self._limit)
        self.conversation.advance(self._me, message)
        return frame

    def recv(self) -> Message:
        """The next message; descriptors sent along are discarded by the kernel.

        Raises:
            PeerError: not a message, or not one that may come now.
            ChannelClosed: the other end is gone (or sent an empty frame, which looks the same).
            TimeoutError: the socket has a timeout and nothing came.
        """
        try:
            # One byte more than allowed: a longer frame is then seen to be longer instead of cut to fit.
            frame = self.sock.recv(self._limit + 1)
        except ConnectionResetError:
            raise ChannelClosed from None
        return self._accept(frame)

    def recv_fds(self, most: int) -> tuple[Message, list[int]]:
        """As `recv`, with up to `most` descriptors (close-on-exec) that the caller then owns.

        Raises:
            PeerError: also when more descriptors came than expected.
        """
        # Not socket.recv_fds: it loses its flags argument, so the descriptors would outlive an exec.
        room = socket.CMSG_LEN(most * array.array("i").itemsize)
        try:
            frame, ancillary, flags, _ = self.sock.recvmsg(self._limit + 1, room, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            raise ChannelClosed from None
        fds = array.array("i")
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        try:
            if flags & socket.MSG_CTRUNC:  # the kernel has closed the others
                raise PeerError(f"more than {most} descriptors")
            return self._accept(frame), list(fds)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def _accept(self, frame: bytes) -> Message:
        if not frame:
            raise ChannelClosed
        message = decode(frame, self._limit)
        self.conversation.advance(self._peer, message)
        return message

    def close(self) -> None:
        """Close the socket; again is harmless."""
        self.sock.close()
