"""Where tests marked `linux` run, and how many guests booted on which KVM.

Stock kernels need hardware virtualization.  On a machine without it, all `linux` tests of a session run in
testbed machines, by a pytest in each whose reports are replayed here: the same command, summary and exit
status everywhere.  Reports are JSON lines on those pytests' descriptor REPORT_FD.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from integration import kvm
from integration.boot import images
from integration.testbed import cli, debian
from integration.testbed.qemu import die_with

REPORT_FD = 3
TESTBED_TIMEOUT_S = 3600
TESTBEDS = 2  # each has one processor
SILENCE_S = 500  # longer than any boot may take (vm.run)
CRASHES_MAX = 2
_REPORTING = os.environ.pop("VMSUP_REPORTING", "") == "1"  # we are such a pytest
if _REPORTING:
    os.set_inheritable(REPORT_FD, False)

_BOOTED = "booted on"
_RERUN = "rerun"  # the outcome of a report, by pytest-rerunfailures


@pytest.fixture
def booted(record_property: Callable[[str, object], None]) -> Callable[[], None]:
    """To be called once for each guest that has come up; the session's summary counts them."""
    return lambda: record_property(_BOOTED, kvm.name())


class Testbed:
    """A pytest in the testbed that runs `nodeids`; its reports, in whatever order they come.

    An emulated processor makes mistakes.  L1's own kernel may die of one (cli.EXIT_FAILED) or do nothing
    more: what was not run by then runs in another L1.  A guest may, too: a test that fails runs a second
    time.  The summary says both.

    Attributes:
        crashes: how L1 died, each time.
    """

    def __init__(self, config: pytest.Config, nodeids: list[str]) -> None:
        self.crashes: list[str] = []
        self.nodeids = nodeids
        self._config = config
        self._reports: dict[str, list[pytest.TestReport]] = {}
        self._end = ""  # why no more reports come
        self._begin()

    def reports(self, item: pytest.Item) -> list[pytest.TestReport] | None:
        """The reports of `item`'s three phases, if it is over; one failure if it never will be."""
        reports = self._reports.get(item.nodeid, [])
        if self._is_over(item.nodeid):
            return reports
        if self.over:
            return [*reports, _report(item, "failed", f"the testbed {self._end}\nbefore this test was over")]
        return None

    @property
    def over(self) -> bool:
        """Nothing more comes."""
        return bool(self._end)

    def fileno(self) -> int:
        """Readable when there is something to `listen` to."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def listen(self) -> None:
        """Take the reports that have come; without any for SILENCE_S it hangs."""
        if not select.select([self], [], [], 0)[0]:
            if time.monotonic() - self._heard_s > SILENCE_S:
                self._has_ended(f"said nothing for {SILENCE_S} s", again=True)
        elif data := os.read(self.fileno(), 1 << 16):
            self._heard_s = time.monotonic()
            *lines, self._heard = (self._heard + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        else:
            status = self._process.wait()
            self._has_ended(f"ended (exit status {status})", again=status == cli.EXIT_FAILED)

    def _has_ended(self, how: str, again: bool) -> None:
        why = f"{how}\n{self._last_output()}"
        if again and len(self.crashes) < CRASHES_MAX and not all(map(self._is_over, self.nodeids)):
            self.crashes.append(why)
            self.close()
            self._begin()
        else:
            self._end = why

    def _begin(self) -> None:
        """Start the testbed with what has not been run to its end."""
        left = [nodeid for nodeid in self.nodeids if not self._is_over(nodeid)]
        for nodeid in left:
            self._reports.pop(nodeid, None)
        self._heard, self._heard_s = b"", time.monotonic()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        run = Path(__file__).parent / "testbed/run"
        far = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--reruns", "1", *left]
        shell = ["sh", "-c", f'exec {REPORT_FD}>&1 >&2 "$@"', "sh", *far]
        self._process = subprocess.Popen(
            [run, "--timeout", str(TESTBED_TIMEOUT_S), "--", *shell],
            cwd=self._config.rootpath,
            env={**os.environ, "VMSUP_REPORTING": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            bufsize=0,
            stderr=self._output,
            preexec_fn=functools.partial(die_with, os.getpid()),  # noqa: PLW1509  no threads here
        )

    def _is_over(self, nodeid: str) -> bool:
        reports = self._reports.get(nodeid, [])
        reruns = sum(report.outcome == _RERUN for report in reports)
        return any(report.when == "teardown" and report.rerun == reruns for report in reports)

    def _take(self, data: dict[str, object]) -> None:
        report = self._config.hook.pytest_report_from_serializable(config=self._config, data=data)
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)  # a skip's (path, line, reason), before JSON
        self._reports.setdefault(report.nodeid, []).append(report)

    def _last_output(self) -> str:
        self._output.seek(0)
        return "\n".join(self._output.read().decode(errors="replace").splitlines()[-40:])

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._output.close()


class Testbeds:
    """The testbed's machines, which share the tests between them; or why there are none."""

    def __init__(self, config: pytest.Config, nodeids: list[str]) -> None:
        self.reason = _missing()
        count = 0 if self.reason else min(TESTBEDS, len(nodeids))  # a pytest without node ids runs everything
        self._beds = [Testbed(config, nodeids[n::count]) for n in range(count)]

    @property
    def crashes(self) -> list[str]:
        return [why for bed in self._beds for why in bed.crashes]

    def reports(self, item: pytest.Item) -> list[pytest.TestReport]:
        """The reports of `item`, waited for."""
        if self.reason:
            return [_report(item, "skipped", (str(item.path), item.location[1], f"Skipped: {self.reason}"))]
        (mine,) = (bed for bed in self._beds if item.nodeid in bed.nodeids)
        while (reports := mine.reports(item)) is None:
            running = [bed for bed in self._beds if not bed.over]
            select.select(running, [], [], 1)
            for bed in running:
                bed.listen()
        return reports

    def close(self) -> None:
        for bed in self._beds:
            bed.close()


def _missing() -> str:
    """Why there is no testbed, if there is none."""
    try:
        debian.tool("qemu-system-x86_64", "qemu-system-x86")
        debian.tool("busybox", "busybox-static")
        for package in (images.GENERIC, images.CLOUD):  # L1 has no network
            images.kernel(package)
    except images.TestbedError as e:
        return f"no stock kernel boots on /dev/kvm ({kvm.no_linux()}), and there is no testbed: {e}"
    return ""


def _report(item: pytest.Item, outcome: str, longrepr: object) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, {}, outcome, longrepr, "call")  # type: ignore[arg-type]


_testbeds = pytest.StashKey[Testbeds]()


def _runs_elsewhere(item: pytest.Item) -> bool:
    return item.get_closest_marker("linux") is not None and kvm.no_linux() is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    if not _runs_elsewhere(item):
        return None
    stash = item.config.stash
    if _testbeds not in stash:
        nodeids = [other.nodeid for other in item.session.items if _runs_elsewhere(other)]
        stash[_testbeds] = Testbeds(item.config, nodeids)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in stash[_testbeds].reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionstart(session: pytest.Session) -> None:
    if _REPORTING:
        session.config.pluginmanager.register(Reporter(session.config))


def pytest_unconfigure(config: pytest.Config) -> None:
    if testbeds := config.stash.get(_testbeds, None):
        testbeds.close()


class Reporter:
    """The second pytest's half: every report, as it comes, to REPORT_FD."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        line = json.dumps(data).encode() + b"\n"
        while line:
            line = line[os.write(REPORT_FD, line) :]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    reports = [
        r for kind in terminalreporter.stats.values() for r in kind if isinstance(r, pytest.TestReport)
    ]
    kvms = [
        value for r in reports if r.when == "call" for name, value in r.user_properties if name == _BOOTED
    ]
    terminalreporter.section("guests booted")
    for where, count in Counter(kvms).items():
        terminalreporter.write_line(f"{count} on {where}")
    if not kvms:
        terminalreporter.write_line("none")
    for report in terminalreporter.stats.get(_RERUN, []):
        terminalreporter.write_line(f"{report.nodeid} ran again: {report.longreprtext}")
    if (testbeds := config.stash.get(_testbeds, None)) is not None:
        for why in testbeds.crashes:
            terminalreporter.write_line(f"L1 {why}\nand was started again")
