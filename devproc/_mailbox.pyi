"""The interface of _mailbox.c; what each does is said in mailbox.py, its only user."""

from collections.abc import Callable

class End:
    def __new__(
        cls,
        page: int,
        bell: int,
        sizes: dict[int, int],
        slots: int,
        shadows: tuple[tuple[int, Callable[[], int | None]], ...],
    ) -> End: ...
    def serve(
        self, read: Callable[[int, int, int], int], write: Callable[[int, int, int, int], None], most: int
    ) -> int | None: ...
    def hide(self) -> None: ...
    def wait(self, timeout_ns: int | None) -> bool: ...
    def watch(self, slot: int, fd: int, events: int) -> None: ...
    def ready(self, slot: int) -> int: ...
