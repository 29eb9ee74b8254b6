"""What an oracle says.  Python corrupts no memory, so each looks for something; a `Finding` names its kind.

Of a bench (bench.py):

    exception   anything raised out of the model, in whatever it was asked
    value       a read gave what does not fit its size
    busy        a deadline or an input that the model is called for and leaves as it is: the loop would spin
    storm       more edges in one operation than EDGES_MAX
    cause       edges that go on while a register is read again and again and nothing else happens
    growth      the model's containers hold more than they did, by GROWTH_MAX
    restore     what was saved is not what a restored model saves
    fresh       a model that was reset to its first state does not behave as a new one

Of a driver (guest.py):

    used        a chain is used that was not the device's, or twice, or more is written than it has room
    memory      the device has written outside what it was given to write
    reset       a reset device does not read 0, or is not as a new one, or begins where it was
    bar         what BAR 0 says of its size is no size, or less than what the device has in it

Of a process (supervisor/fuzz.py):

    hang        an input takes too long
    died        the process has ended
    violation   a system call that its policy forbids
    disagree    behind the real wire, over its access channel, it does something else than on the bench
    transport   through its mailbox it does something else than over its access channel
"""

from __future__ import annotations


class Finding(Exception):
    """An oracle's word; `kind` is in this module's list, `why` one line."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind
        self.why = why
