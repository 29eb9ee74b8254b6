"""Which KVM this machine has, and whether a stock kernel can boot on it."""

from __future__ import annotations

import functools
import os

from kvmcore import probe


@functools.cache
def no_linux() -> str | None:
    """Why no stock kernel boots on /dev/kvm, as its probe guest found out; None when one does."""
    return probe.runs_stock_kernel()


def name() -> str:
    """What a guest started here runs on, for reports."""
    return os.environ.get("VMSUP_TESTBED") or (
        "the local /dev/kvm, which boots no stock kernel" if no_linux() else "the local /dev/kvm"
    )
