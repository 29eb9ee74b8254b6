"""Opens the directories that a guest may mount; their device processes have them as their root."""

from __future__ import annotations

import os

from kvmcore.errors import ConfigError
from supervisor.config import SharedDirConfig
from supervisor.host import Host, Opened


def open_share(shared: SharedDirConfig, host: Host) -> Opened:
    """The directory of `shared`, as O_PATH.

    Raises:
        ConfigError: it is no directory, or not to be had.
    """
    try:
        fd = os.open(shared.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        raise ConfigError(f"--shared-dir {shared.path}: {e.strerror}") from None
    host.undo.callback(os.close, fd)
    return Opened({"directory": (fd,)})
