"""One bad line per finding, beside a good one that is not found."""

import pytest

from policies.lint import NEVER, SYSCALLS_MAX, lint
from policies.parse import parse
from policies.syscalls import SYSCALLS

FDS = {
    "FD_CONTROL": 4,
    "FD_LOG": 2,
    "FD_KICK_FIRST": 5,
    "FD_KICK_LAST": 7,
    "FD_IRQ_FIRST": 8,
    "FD_IRQ_LAST": 9,
}


def findings(text: str) -> list[str]:
    return [d.message for d in lint(parse(text, constants=FDS))]


@pytest.mark.parametrize(
    "text",
    [
        "brk: 1 # heap",
        "# heap\nbrk: 1",
        "clone3: return ENOSYS # glibc then uses clone",
        "socket: return EPERM # no",
        "mmap: arg2 == PROT_READ|PROT_WRITE && arg3 == MAP_PRIVATE # memory",
        "mmap: arg2 in ~PROT_EXEC && arg3 in ~MAP_FIXED # memory",
        "read: arg0 == FD_CONTROL # commands",
        "read: arg0 >= FD_KICK_FIRST && arg0 <= FD_KICK_LAST # any of an array",
        "ioctl: arg0 == FD_CONTROL && arg1 == FIONBIO # last words",
        "futex: arg1 == FUTEX_WAIT || arg1 == FUTEX_WAKE # threads",
        "lseek: arg0 == FD_LOG && arg1 > 5 # offsets are 64 bits wide",
    ],
)
def test_a_good_rule_has_no_finding(text: str) -> None:
    assert findings(text) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("brk: 1", "no reason"),
        ("# far\n\nbrk: 1", "no reason"),
        ("mmap: 1 # w", "without a condition on arg2, arg3"),
        ("mmap: arg2 == 3 # w", "without a condition on arg3"),
        ("mmap: arg2 == 3 && arg3 == 2 || arg3 == 1 # w", "without a condition on arg2"),
        ("ioctl: arg1 == FIONBIO # w", "without a condition on arg0"),
        ("prctl: 1 # w", "without a condition on arg0"),
        ("mmap: arg2 == PROT_EXEC && arg3 == 1 # w", "executable"),
        ("mprotect: arg2 in PROT_READ|PROT_EXEC # w", "executable"),
        ("mprotect: arg2 != PROT_WRITE # w", "executable"),
        ("mprotect: arg2 < 8 # w", "executable"),
        ("write: 1 # w", "without a condition on arg0"),
        ("write: arg0 == 4 # w", "write the descriptor's name"),
        ("write: arg0 >= FD_KICK_FIRST # w", "compare a descriptor with =="),
        ("write: arg0 <= FD_KICK_LAST # w", "compare a descriptor with =="),
        ("write: arg0 >= FD_KICK_FIRST && arg0 <= FD_IRQ_LAST # w", "compare a descriptor with =="),
        ("write: arg0 >= FD_KICK_LAST && arg0 <= FD_KICK_LAST # w", "compare a descriptor with =="),
        ("write: arg0 <= FD_CONTROL # w", "compare a descriptor with =="),
        ("exit_group: arg0 != 0 # w", "upper half"),
        ("exit_group: arg0 > 3 # w", "upper half"),
        ("clone: arg0 != CLONE_NEWUSER # w", "upper half"),
        ("mmap: arg2 == 3 && arg3 == 1 && arg4 != 5 # w", "upper half"),
        ("exit_group: arg0 == -1 # w", "C library decides"),
        ("exit_group: arg1 == 0 # w", "there is no arg1"),
        ("munmap: arg1 & 3 # w", "any of the 2 bits"),
        ("munmap: arg0 == 1 && arg0 == 2 # w", "never holds"),
        ("munmap: arg0 & 0 # w", "never holds"),
        ("munmap: arg0 >= 0 # w", "always holds"),
        ("munmap: arg0 in ~0 # w", "always holds"),
        ("munmap: arg0 == 1 || arg0 == 1 && arg1 == 2 # w", "adds nothing"),
        ("munmap: arg0 < 9 # w\nmunmap: arg0 == 3 # w", "adds nothing"),
        ("munmap: arg0 == 1 # w\nmunmap: arg0 == 3 # w", "join them"),
        ("munmap: arg0 == 1 # w\nmunmap: 1 # w", "are not needed"),
    ],
)
def test_a_bad_rule_is_found(text: str, message: str) -> None:
    assert any(message in f for f in findings(text)), findings(text)


@pytest.mark.parametrize("name", sorted(NEVER))
def test_some_calls_are_never_allowed(name: str) -> None:
    assert name in SYSCALLS
    for rule in ("1", "arg0 == 1 && arg1 == 2 && arg2 == 3"):
        assert f"{name} is never allowed" in findings(f"{name}: {rule} # w")
    assert findings(f"{name}: return EPERM # w") == []


def test_a_condition_before_an_errno_is_needed() -> None:
    assert findings("munmap: arg0 == 1 # w\nmunmap: return EPERM # w") == []


def test_a_long_policy_is_found() -> None:
    calls = [n for n in SYSCALLS if n not in NEVER][: SYSCALLS_MAX + 1]
    assert not any("at most" in f for f in findings("\n".join(f"{n}: return EPERM # w" for n in calls[:25])))
    assert any(
        f"{SYSCALLS_MAX + 1} system calls" in f
        for f in findings("\n".join(f"{n}: return EPERM # w" for n in calls))
    )


@pytest.mark.parametrize(
    "text",
    ["read: 1 # files", "ioctl: arg1 == FIONBIO # sockets", "fcntl: arg1 == F_SETFL && arg2 == 0 # sockets"],
)
def test_without_fixed_descriptors_only_other_arguments_are_needed(text: str) -> None:
    assert lint(parse(text), slots=False) == []
    assert lint(parse(text)) != []


def test_without_fixed_descriptors_the_other_arguments_are_still_needed() -> None:
    (found,) = lint(parse("ioctl: arg0 == 3 # anything"), slots=False)
    assert "condition on arg1" in found.message
    (found,) = lint(parse("kill: arg1 == SIGKILL # anybody"), slots=False)
    assert "condition on arg0" in found.message
