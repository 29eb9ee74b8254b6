"""What a process really has, read from /proc: seccomp mode, no_new_privs, capabilities, namespaces."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

NAMESPACES = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")


@dataclass(frozen=True)
class ProcStatus:
    """One process; `namespaces` are those it does not share with `of` (None: unreadable)."""

    name: str
    pid: int
    seccomp: int
    no_new_privs: int
    capabilities: bool  # any set of the five is not empty
    uid: int
    namespaces: tuple[str, ...] | None

    @classmethod
    def of(cls, name: str, pid: int, relative_to: int) -> ProcStatus | None:
        """None when there is no such process any more."""
        fields: dict[str, str] = {}
        try:
            with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as f:
                for line in f:
                    key, _, value = line.partition(":")
                    fields[key] = value.strip()
        except OSError:
            return None
        caps = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        return cls(
            name=name,
            pid=pid,
            seccomp=int(fields.get("Seccomp", "0")),
            no_new_privs=int(fields.get("NoNewPrivs", "0")),
            capabilities=any(int(fields[c], 16) for c in caps if c in fields),
            uid=int(fields["Uid"].split()[0]),
            namespaces=_own_namespaces(pid, relative_to),
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _own_namespaces(pid: int, relative_to: int) -> tuple[str, ...] | None:
    try:
        return tuple(
            n
            for n in NAMESPACES
            if os.readlink(f"/proc/{pid}/ns/{n}") != os.readlink(f"/proc/{relative_to}/ns/{n}")
        )
    except OSError:  # a non-dumpable process hides them from ordinary users
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of `ProcStatus.as_json` as text for people."""
    lines = [
        f"{'NAME':10} {'PID':>7} {'UID':>10} {'SECCOMP':>7} {'NNP':>3} {'CAPS':>4}  NAMESPACES OF ITS OWN"
    ]
    for r in rows:
        own = "(hidden)" if r["namespaces"] is None else " ".join(r["namespaces"]) or "none"
        caps = "some" if r["capabilities"] else "none"
        ids = f"{r['name']:10} {r['pid']:>7} {r['uid']:>10}"
        lines.append(f"{ids} {r['seccomp']:>7} {r['no_new_privs']:>3} {caps:>4}  {own}")
    return "\n".join(lines)
