"""How a VM begins: with its zygote, and in steps of which one that fails names itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from devproc import jail, wire, zygote
from devproc.zygote import Zygote
from kvmcore.errors import ConfigError, VmsupError
from policies.errors import PolicyError

if TYPE_CHECKING:
    from supervisor.config import RunConfig

LEARN: Final = "VMSUP_LEARN"  # DEVICE:FILE in the environment: see supervisor/recorder.py


@contextmanager
def step(name: str) -> Iterator[None]:
    """One step of a start: its name begins an error's text.

    Raises:
        VmsupError: whatever went wrong, unless it is in the user's own words already.
    """
    try:
        yield
    except (ConfigError, PolicyError):
        raise  # it names the user's own file or option
    except (VmsupError, jail.JailError, wire.WireError, zygote.SpawnError) as e:
        raise VmsupError(f"cannot {name}: {e}") from e
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        raise VmsupError(f"cannot {name}: {where}{e.strerror or e}") from e


def fork_zygote() -> Zygote:
    """The zygote of a VM of which nothing is known yet; `prepare` must follow.

    Raises:
        VmsupError: there is none to be had.
    """
    filters = None
    if watched := os.environ.get(LEARN):
        from supervisor import recorder  # noqa: PLC0415 - no other start pays for it

        filters = recorder.filters(watched.partition(":")[0])
    with step("fork the zygote"):
        return zygote.fork(filters)


def prepare(nursery: Zygote, config: RunConfig) -> None:
    """Tell the zygote what the VM will have.

    Raises:
        ConfigError: more than a VM can have.
        VmsupError: it is gone.
    """
    from supervisor import machine  # noqa: PLC0415 - the zygote does without

    program = zygote.PROGRAM if config.record is None else "devproc.fuzz.recording"
    with step("prepare the zygote"):
        nursery.prepare(machine.kinds(config), program, jail.Mode(config.jail))
