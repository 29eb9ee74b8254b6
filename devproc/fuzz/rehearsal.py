"""A device process as in a VM but for its clocks, which stand in the page: the program that replays inputs.

Everything else is real: `child.Server`, the wire, the descriptors, the jail and the policy.  So what it does
can be compared with a bench, or with what was recorded (supervisor/rehearse.py).
"""

from __future__ import annotations

import functools
from typing import Any, Final, NoReturn

from devproc import child, jail
from devproc.catalog import FD_FIRST
from devproc.fuzz.page import Page

EXTRA_FDS: Final = 1  # the page
load = child.load


def main(ctx: jail.Context, model: type[Any], name: str) -> NoReturn:
    """As `child.main`, with the page as one more descriptor."""
    *fds, fd = ctx.fds
    page = Page(fd)
    ctx.fds = fds
    host = {**child.SOURCES, "clock": page.clock, "wall": page.wall}
    child.main(ctx, model, name, functools.partial(child.Server, first=FD_FIRST, host=host))
