"""Policy text to tree: the strict subset of minijail's language that both of its readers take the same way.

minijail0(5), as read by libminijail's syscall_filter.c and by tools/compile_seccomp_policy.py.  A file holds

    # comment                         a line may be continued with a final \\
    @include ./NAME.policy            beside this file; an included file includes nothing
    CALL: 1                           allow
    CALL: return ERRNO                fail with this error
    CALL: arg0 == FD && arg1 in A|B || arg1 & C        allow if; == != < <= > >= & in

Values are decimal or hexadecimal numbers and constants, joined by | without spaces, negated by ~, grouped by
parentheses.  The rules of one call are tried in order, an unconditional one comes last.  A rule's reason is
the comment at its end, or else the comment lines right above it.

Left out, because the two readers disagree, or because no page of ours should say it: `condition; return X`,
@default, @frequency, @denylist, groups and [arch=...], octal numbers, comments that end in \\, and every
action other than 1 and return.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from policies import bpf
from policies.constants import CONSTANTS, ERRNO_MAX, ERRNOS
from policies.errors import Diagnostic, Place, PolicyError
from policies.policy import OPS, U64_MAX, Atom, Clause, Policy, Rule
from policies.syscalls import SYSCALLS

DIRECTORY: Final = Path(__file__).parent

_TOKEN: Final = re.compile(
    r"(?P<space>[ \t]+)|(?P<comment>\#.*)|(?P<or>\|\|)|(?P<and>&&)|(?P<op>[=!<>]=|[<>&])|(?P<colon>:)"
    r"|(?P<semicolon>;)|(?P<word>(?:[\w~()@./-]|\|(?!\|))+)|(?P<other>.)",
    re.ASCII,
)
_VALUE: Final = re.compile(r"(?P<number>-?\d\w*)|(?P<name>[A-Za-z_]\w*)|.", re.ASCII)
_INCLUDE: Final = re.compile(r"\./[\w-]+\.policy", re.ASCII)

_REFUSED_ACTIONS: Final = {
    "allow": "write 1: libminijail knows no other word for it",
    "kill": "nothing needs this rule: what no rule allows kills the process",
    "kill-process": "nothing needs this rule: what no rule allows kills the process",
    "kill-thread": "a killed Python thread leaves its process deadlocked",
    "log": "this action lets the call through",
    "trace": "this action lets a tracer decide",
    "trap": "this action lets the process handle its own violation",
    "user-notify": "the supervisor's filter asks for this itself, no rule does",
}
_REFUSED_STATEMENTS: Final = {
    "@default": "a policy has no default to choose: what no rule allows kills the process",
    "@denylist": "a policy lists what is allowed",
    "@frequency": "the compiler needs no frequencies",
}


class _Token(NamedTuple):
    kind: str
    text: str
    place: Place


class _Statement(NamedTuple):
    tokens: list[_Token]
    reason: str


def load(name_or_path: str, constants: Mapping[str, int] | None = None) -> Policy:
    """The policy in a file: a path, or the NAME of policies/NAME.policy.

    `constants` are names beyond `CONSTANTS`: the descriptor slots of the process.

    Raises:
        PolicyError: the file cannot be read, or is not a policy.
    """
    is_path = "/" in name_or_path or name_or_path.endswith(".policy")
    path = Path(name_or_path) if is_path else DIRECTORY / f"{name_or_path}.policy"
    return parse(_read(path, Place(str(path), 1)), str(path), constants)


def parse(text: str, file: str = "<policy>", constants: Mapping[str, int] | None = None) -> Policy:
    """The policy in `text`; `file` names it in diagnostics and is what includes are relative to.

    Raises:
        PolicyError: with every diagnostic that could be found.
    """
    reader = _Reader({**CONSTANTS, **(constants or {})})
    reader.file(text, file, included=False)
    if reader.found:
        raise PolicyError(reader.found)
    return Policy(Path(file).stem, tuple(reader.rules))


def _read(path: Path, at: Place) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise PolicyError([Diagnostic(at, f"cannot read {path}: {why}")]) from None


def _fail(place: Place, message: str) -> NoReturn:
    raise PolicyError([Diagnostic(place, message)])


@lru_cache(maxsize=4)
def _statements(text: str, file: str) -> tuple[tuple[_Statement, ...], tuple[Diagnostic, ...]]:
    """What a file says, and what is wrong with its lines; kept, as all policies include the same."""
    statements: list[_Statement] = []
    found: list[Diagnostic] = []
    tokens: list[_Token] = []
    above: list[str] = []
    lines = text.split("\n")
    for at, line in enumerate(lines, 1):
        comment = ""
        continued = line.endswith("\\")
        for m in _TOKEN.finditer(line.removesuffix("\\")):
            kind = m.lastgroup
            if kind == "space":
                continue
            place = Place(file, at, m.start() + 1, len(m[0]), line)
            if kind == "comment":
                comment = m[0].lstrip("#").strip()
                if continued:
                    message = "the line below is a rule to minijail's compiler, a comment to its library"
                    found.append(Diagnostic(place, f"a comment may not end in \\: {message}"))
            else:
                tokens.append(_Token(str(kind), m[0], place))
        if continued and at < len(lines):
            continue
        if continued:
            found.append(Diagnostic(Place(file, at, len(line), 1, line), "nothing follows this \\"))
        if tokens:
            statements.append(_Statement(tokens, comment or " ".join(above)))
            tokens, above = [], []
        elif comment:
            above.append(comment)
        else:
            above = []
    return tuple(statements), tuple(found)


class _Reader:
    """Collects rules and findings; one bad statement does not hide the next."""

    def __init__(self, constants: Mapping[str, int]) -> None:
        self.rules: list[Rule] = []
        self.found: list[Diagnostic] = []
        self._constants = constants
        self._final: dict[str, Rule] = {}

    def file(self, text: str, file: str, included: bool) -> None:
        statements, found = _statements(text, file)
        self.found += found
        for statement in statements:
            try:
                self._statement(statement, included)
            except PolicyError as e:
                self.found += e.diagnostics

    def _statement(self, statement: _Statement, included: bool) -> None:
        cursor = _Cursor(statement.tokens)
        head = cursor.take("word", "a system call or @include")
        if head.text == "@include":
            self._include(cursor, head.place, included)
        elif head.text in _REFUSED_STATEMENTS:
            _fail(head.place, f"{head.text} is refused: {_REFUSED_STATEMENTS[head.text]}")
        else:
            self._rule(cursor, head, statement.reason)

    def _include(self, cursor: _Cursor, at: Place, included: bool) -> None:
        path = cursor.take("word", "./NAME.policy")
        cursor.end()
        if included:
            _fail(at, "an included file includes nothing: libminijail refuses it")
        if not _INCLUDE.fullmatch(path.text):
            _fail(path.place, "expected ./NAME.policy, a file beside this one")
        target = Path(at.file).parent / path.text
        self.file(_read(target, path.place), str(target), included=True)

    def _rule(self, cursor: _Cursor, head: _Token, reason: str) -> None:
        name = head.text
        if name not in SYSCALLS:
            _fail(head.place, f"no system call {name!r} on x86-64" + _suggestion(name, SYSCALLS))
        if (final := self._final.get(name)) is not None:
            _fail(head.place, f"no call comes this far: {final.place} decides every {name}")
        cursor.take("colon", "a colon")
        first = cursor.take("word", "1, return ERRNO or argN OP VALUE")
        clauses: tuple[Clause, ...] = ()
        errno = 0
        if first.text == "return":
            errno = self._errno(cursor.take("word", "an error name or number"))
        elif first.text in _REFUSED_ACTIONS:
            _fail(first.place, f"{first.text} is refused: {_REFUSED_ACTIONS[first.text]}")
        elif first.text != "1":
            cursor.back()
            clauses = self._condition(cursor)
        if (extra := cursor.peek()) is not None and extra.kind == "semicolon":
            _fail(extra.place, _two_readings(name, clauses))
        cursor.end()
        rule = Rule(name, clauses, errno, reason, head.place)
        self.rules.append(rule)
        if not clauses:
            self._final[name] = rule

    def _errno(self, word: _Token) -> int:
        text = word.text
        number = int(text) if re.fullmatch(r"[1-9]\d*", text, re.ASCII) else ERRNOS.get(text, 0)
        if not 1 <= number <= ERRNO_MAX:
            expected = f"expected an error name or a number from 1 to {ERRNO_MAX}"
            _fail(word.place, expected + _suggestion(text, ERRNOS))
        return number

    def _condition(self, cursor: _Cursor) -> tuple[Clause, ...]:
        clauses: list[Clause] = []
        atoms = [self._atom(cursor)]
        while (joint := cursor.peek()) is not None and joint.kind in ("and", "or"):
            cursor.take(joint.kind, "")
            if joint.kind == "or":
                clauses.append(tuple(atoms))
                atoms = []
            atoms.append(self._atom(cursor))
        return (*clauses, tuple(atoms))

    def _atom(self, cursor: _Cursor) -> Atom:
        argument = cursor.take("word", "argN")
        if not re.fullmatch(f"arg[0-{bpf.ARGS - 1}]", argument.text):
            _fail(argument.place, f"expected arg0 to arg{bpf.ARGS - 1}")
        operator = cursor.peek()
        op = next((op for op in OPS if operator is not None and operator.text == op), None)
        if operator is None or op is None:
            cursor.fail("one of " + " ".join(OPS))
        cursor.take(operator.kind, "")
        value = cursor.take("word", "a value")
        for left, right in ((argument.place, operator.place), (operator.place, value.place)):
            if left.line == right.line and left.column + left.width == right.column:
                _fail(right, "a space is missing: libminijail splits a comparison at its spaces")
        return Atom(int(argument.text[3:]), op, self._value(value), value.text)

    def _value(self, word: _Token) -> int:
        parts = list(_VALUE.finditer(word.text))
        value, used = self._union(word, parts, 0)
        if used != len(parts):
            _fail(_part(word, parts[used]), "expected | or the end of the value")
        return value

    def _union(self, word: _Token, parts: list[re.Match[str]], at: int) -> tuple[int, int]:
        value, at = self._term(word, parts, at)
        while at < len(parts) and parts[at][0] == "|":
            term, at = self._term(word, parts, at + 1)
            value |= term
        return value, at

    def _term(self, word: _Token, parts: list[re.Match[str]], at: int) -> tuple[int, int]:
        inverted = at < len(parts) and parts[at][0] == "~"
        at += inverted
        if at >= len(parts):
            _fail(word.place, "the value ends too early (it takes no spaces)")
        part = parts[at]
        if part[0] == "(":
            value, at = self._union(word, parts, at + 1)
            if at >= len(parts) or parts[at][0] != ")":
                _fail(_part(word, part), "this parenthesis is not closed (a value takes no spaces)")
        elif part["number"]:
            value = _number(part[0], _part(word, part))
        elif part["name"]:
            name = part[0]
            if name not in self._constants:
                _fail(_part(word, part), f"unknown constant {name}" + _suggestion(name, self._constants))
            value = self._constants[name] & U64_MAX
        else:
            _fail(_part(word, part), "expected a number, a constant, ~ or (")
        return (~value & U64_MAX if inverted else value), at + 1


class _Cursor:
    """The tokens of one statement, from left to right."""

    def __init__(self, tokens: list[_Token]) -> None:
        self._tokens = tokens
        self._at = 0

    def peek(self) -> _Token | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def take(self, kind: str, expected: str) -> _Token:
        token = self.peek()
        if token is None or token.kind != kind:
            self.fail(expected)
        self._at += 1
        return token

    def back(self) -> None:
        self._at -= 1

    def end(self) -> None:
        if self.peek() is not None:
            self.fail("the end of the rule")

    def fail(self, expected: str) -> NoReturn:
        token = self.peek()
        if token is not None:
            _fail(token.place, f"expected {expected}")
        last = self._tokens[-1].place
        _fail(Place(last.file, last.line, last.column + last.width, 1, last.text), f"expected {expected}")


def _part(word: _Token, part: re.Match[str]) -> Place:
    p = word.place
    return Place(p.file, p.line, p.column + part.start(), len(part[0]), p.text)


def _number(text: str, place: Place) -> int:
    if re.fullmatch(r"-?0\d+", text, re.ASCII):
        _fail(place, "octal numbers are refused: write it in hexadecimal")
    try:
        value = int(text, 16 if text.removeprefix("-").lower().startswith("0x") else 10)
    except ValueError:
        _fail(place, "expected a decimal or hexadecimal number")
    if not -(1 << 63) <= value <= U64_MAX or "_" in text:
        _fail(place, "expected a number of 64 bits")
    return value & U64_MAX


def _suggestion(word: str, known: Mapping[str, int]) -> str:
    import difflib  # noqa: PLC0415  (only an error pays for it)

    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


def _two_readings(name: str, clauses: tuple[Clause, ...]) -> str:
    if not clauses:
        return "expected the end of the rule"
    condition = Rule(name, clauses, 0, "", Place("", 0)).condition()
    return (
        "`condition; return X` has two opposite readings: minijail's library allows the call if the "
        "condition holds and returns X if not, its compiler returns X if it holds and kills if not; "
        f"write two rules, `{name}: {condition}` and `{name}: return X`"
    )
