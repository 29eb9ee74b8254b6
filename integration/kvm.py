"""Which KVM this machine has, and whether a stock kernel can boot on it."""

from __future__ import annotations

import os
from pathlib import Path


def boots_linux() -> bool:
    """Whether /dev/kvm is usable and the CPU has VMX or SVM (real, or as in the testbed QEMU's).

    Without either, /dev/kvm emulates the guest's kernel mode, and that far too little of it.
    """
    flags = set(Path("/proc/cpuinfo").read_text().split())
    return os.access("/dev/kvm", os.R_OK | os.W_OK) and bool(flags & {"vmx", "svm"})


def name() -> str:
    """What a guest started here runs on, for reports."""
    return os.environ.get("VMSUP_TESTBED") or (
        "the local /dev/kvm" if boots_linux() else "the local /dev/kvm, without hardware virtualization"
    )
