"""The table and the plot, and what is kept of the figures in both."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from integration.bench import __main__ as bench
from integration.bench import report
from integration.bench.report import Result

FAST = Result.ratio("latency", [1, 2, 4], [4, 4, 4], 0.6, "lower")
SLOW = Result.of("rate", [10, 20, 5], 40, "higher", "MB/s")


def test_a_figure_is_the_median_and_says_whether_it_passes() -> None:
    assert report.table([FAST, SLOW]).splitlines() == [
        "pass  latency  0.5      (0.25-1)  at most 0.6",
        "MISS  rate     10 MB/s  (5-20)    at least 40 MB/s",
    ]


def test_shares_of_the_target_are_above_1_for_a_miss() -> None:
    assert SLOW.shares == (2, 4, 8)
    assert FAST.shares == pytest.approx((0.25 / 0.6, 0.5 / 0.6, 1 / 0.6))


def test_what_is_not_in_pairs_has_no_ratio() -> None:
    with pytest.raises(ValueError):
        Result.ratio("latency", [1, 2], [1], 1, "lower")


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    report.save(tmp_path / "raw.json", "a machine", [FAST, SLOW])
    assert report.load(tmp_path / "raw.json") == [FAST, SLOW]


def test_the_plot_has_a_row_for_each_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="there is no matplotlib")
    report.plot(tmp_path / "plot.svg", "a machine", [FAST, SLOW])
    drawn = (tmp_path / "plot.svg").read_text()
    for text in ("latency", "rate", "a machine"):
        assert f"<!-- {text} -->" in drawn


def test_without_matplotlib_one_line_says_that_there_is_no_plot(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    bench.draw(tmp_path / "plot.svg", [FAST])
    assert capsys.readouterr().out == "no plot: there is no matplotlib (pip install 'vmsup[bench]')\n"
    assert not list(tmp_path.iterdir())
