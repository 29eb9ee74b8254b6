"""A campaign's outcome for other programs (JUnit XML, SARIF 2.1.0) and its coverage as a page (HTML)."""

from __future__ import annotations

import html
import json
from typing import Any

from devproc.fuzz import instrument
from supervisor.findings import Finding
from supervisor.fuzz import Result


def junit(result: Result) -> str:
    """A test suite: one case for the campaign, one that fails for each finding."""
    suite = _quoted(f"vmsup fuzz {result.device}")
    cases = [f'  <testcase classname={suite} name="campaign" time="{result.seconds:.1f}"/>']
    for f in result.findings:
        text = html.escape("\n".join([f.why, *f.frames]))
        cases.append(
            f'  <testcase classname={suite} name={_quoted(f.name)} time="0">'
            f"<failure type={_quoted(f.kind)} message={_quoted(f.why)}>{text}</failure></testcase>"
        )
    head = f'<testsuite name={suite} tests="{len(cases)}" failures="{len(result.findings)}" errors="0">'
    return "\n".join(['<?xml version="1.0" encoding="utf-8"?>', head, *cases, "</testsuite>"]) + "\n"


def _quoted(text: str) -> str:
    return f'"{html.escape(text)}"'


def sarif(result: Result) -> str:
    """One run, a result for each finding, at the innermost frame."""
    kinds = sorted({f.kind for f in result.findings})
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "vmsup fuzz", "rules": [{"id": kind} for kind in kinds]}},
                "results": [_result(result.device, f) for f in result.findings],
            }
        ],
    }
    return json.dumps(log, indent=2) + "\n"


def _result(device: str, f: Finding) -> dict[str, Any]:
    found: dict[str, Any] = {
        "ruleId": f.kind,
        "level": "error",
        "message": {"text": f"{device}: {f.why}"},
        "partialFingerprints": {"vmsup/v1": f.key},
    }
    if f.frames:
        place, _, line = f.frames[0].partition(" ")[0].rpartition(":")
        region = {"startLine": int(line)} if line.isdigit() else {}
        found["locations"] = [
            {"physicalLocation": {"artifactLocation": {"uri": f"devproc/{place}"}, "region": region}}
        ]
    return found


_STYLE = """\
body { font: 14px monospace; margin: 2em } h2 { margin-top: 2em }
.line { white-space: pre } .hit { background: #cfc } .missed { background: #fbb } .partly { background: #ff9 }
"""


def page(device: str, blocks: list[instrument.Block], covered: set[int]) -> str:
    """The sources of a device's modules: lines that were reached, lines that were not, and an `if` that was
    never passed by."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{device}</title><style>{_STYLE}</style>"
        f"<h1>{device}: {len(covered)} of {len(blocks)} blocks</h1>"
    ]
    for module in dict.fromkeys(b.module for b in blocks):
        with open(instrument.source(module), encoding="utf-8") as f:
            lines = f.read().splitlines()
        marks: dict[int, str] = {}
        numbered = [(n, b) for n, b in enumerate(blocks) if b.module == module]
        for n, b in numbered:
            if b.taken:  # a block inside another one comes later
                marks |= dict.fromkeys(range(b.line, b.end + 1), "hit" if n in covered else "missed")
        for n, b in numbered:
            if not b.taken and n not in covered and marks.get(b.line) == "hit":
                marks[b.line] = "partly"
        parts.append(f"<h2>{module}</h2>")
        for number, text in enumerate(lines, 1):
            mark = marks.get(number, "")
            parts.append(f'<div class="line {mark}">{number:5} {html.escape(text)}</div>')
    return "\n".join(parts) + "\n"
