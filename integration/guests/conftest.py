"""Makes guests for the tests, where there is a KVM to run them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest

from integration.guests.harness import Guest
from kvmcore.errors import KvmError
from kvmcore.exitloop import install_kick_signal
from kvmcore.kvm import Kvm


@pytest.fixture(scope="session")
def usable_kvm() -> None:
    if shutil.which("as") is None or shutil.which("ld") is None:
        pytest.skip("no assembler for the guests (Debian: binutils)")
    try:
        with Kvm() as kvm:
            kvm.create_vm().close()
    except KvmError as e:
        pytest.skip(str(e))
    install_kick_signal()


@pytest.fixture
def guest(usable_kvm: None) -> Iterator[Callable[..., Guest]]:
    """Makes guests, and takes them apart at the end."""
    made: list[Guest] = []

    def make(*args: object, **kwargs: object) -> Guest:
        made.append(Guest(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.finish()
