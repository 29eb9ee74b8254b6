"""The interface of _mailbox.c; what each does is said in mailbox.py, its only user."""

from collections.abc import Callable

from devproc.ports import Device, Watched

class End:
    def __new__(
        cls,
        page: int,
        bell: int,
        sizes: dict[int, int],
        channels: tuple[int, ...],
        watched: tuple[tuple[int, Watched, bool, bool], ...],
        device: Device,
        clock: Callable[[], int],
        writes: Callable[[int, int, bytes], None] | None,
        shadows: tuple[tuple[int, Callable[[], int | None]], ...],
    ) -> End: ...
    def serve(self) -> bool | None: ...
    def wait(self, timeout_ns: int | None) -> bool: ...
    def is_readable(self, channel: int) -> bool: ...
    def ready(self) -> list[tuple[Watched, bool, bool]]: ...
