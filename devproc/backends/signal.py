"""An edge towards KVM or the supervisor: an eventfd that is only ever written (eventfd(2))."""

from __future__ import annotations

import os

_ONE = (1).to_bytes(8, "little")


class Signal:
    """Calling it adds one to the eventfd `fd`; several edges before the reader looks are one."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __call__(self) -> None:
        os.write(self.fd, _ONE)
