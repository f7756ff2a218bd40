"""Statistics of calls, files of rows and the commit that a row names."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from bench_rows import made

from wireframe.bench import timing
from wireframe.bench.report_rows import read_rows
from wireframe.errors import ConfigError


def test_runs_take_turns_and_warm_up_rounds_do_not_count():
    calls, clock = [], iter(range(1000))

    def tick(run):
        run()
        return float(next(clock)) * 1000

    runs = [lambda name=name: calls.append(name) for name in ("a", "b")]
    times = timing.measure(runs, repeats=3, clock=tick, warmup=2)
    assert calls == ["a", "b"] * 5
    assert times == [[4000.0, 6000.0, 8000.0], [5000.0, 7000.0, 9000.0]]


def test_short_runs_are_repeated_more_often_but_not_for_ever():
    assert [len(t) for t in timing.measure([print], 3, clock=lambda run: 50.0)] == [4]
    assert [len(t) for t in timing.measure([print], 3, clock=lambda run: 0.0)] == [60]


def test_a_row_holds_the_percentiles():
    found = timing.percentiles([5.0, 1, 2, 3, 4, 100])
    assert found == {"p20_ms": 2.0, "p50_ms": 3.5, "p80_ms": 5.0, "calls": 6}
    assert timing.percentiles([]) == {"p20_ms": None, "p50_ms": None, "p80_ms": None, "calls": 0}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_checkout_or_unknown(tmp_path, monkeypatch):
    here = tmp_path.resolve()
    assert re.fullmatch(r"unknown|[0-9a-f]{7,}(-dirty)?", timing.commit())

    def git(*arguments):
        subprocess.run(
            ["git", "-C", here, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false",
             *arguments],
            check=True, capture_output=True,
        )  # fmt: skip

    git("init")
    (here / "file").write_text("1")
    git("add", "file")
    git("commit", "--message", "a")
    monkeypatch.setattr(timing, "ROOT", here)
    clean = timing.commit()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    (here / "bench" / "results").mkdir(parents=True)
    (here / "bench" / "results" / "summary.txt").write_text("of an earlier run")
    assert timing.commit() == clean
    (here / "docs").mkdir()
    (here / "docs" / "plot.png").write_text("of the report")
    (here / "README.md").write_text("tables")
    assert timing.commit() == clean
    (here / "file").write_text("2")
    assert timing.commit() == clean + "-dirty"
    # Somebody else's repository around an installed package says nothing about it.
    monkeypatch.setattr(timing, "ROOT", here / "bench")
    assert timing.commit() == "unknown"


def test_times_are_never_written_as_powers_of_ten():
    assert [timing.milliseconds(x) for x in (0.01234, 1.0, 99.96, 1234.5)] == ["0.0123", "1", "100", "1234"]


def test_rows_behind_a_broken_line_are_lines_of_their_own(tmp_path):
    path, row = tmp_path / "rows.jsonl", made()
    timing.append_rows(path, [row, row])
    assert len(read_rows([path])) == 2
    with path.open("a") as file:
        file.write('{"part": "ker')
    timing.append_rows(path, [row])
    with pytest.raises(ConfigError, match="line 3"):
        read_rows([path])
    kept = path.read_text().splitlines()
    path.write_text("\n".join([*kept[:2], kept[3]]))
    assert len(read_rows([path])) == 3


def test_the_interval_covers_the_ratio_that_is_there_and_pairs_take_out_a_drift():
    generator, covered, widths = np.random.default_rng(1), 0, {"pairs": 0.0, "apart": 0.0}
    for _ in range(100):
        drift = np.linspace(1, 2, 41)
        ours, theirs = (scale * drift * generator.normal(1, 0.02, 41) for scale in (1.0, 1.5))
        found = timing.paired_ratio(theirs, ours)
        assert found["low"] <= found["p50"] <= found["high"]
        covered += found["low"] <= 1.5 <= found["high"]
        apart = timing.paired_ratio(generator.permutation(theirs), ours)
        for name, interval in (("pairs", found), ("apart", apart)):
            widths[name] += interval["high"] - interval["low"]
    assert 85 <= covered <= 100 and 3 * widths["pairs"] < widths["apart"]
    assert timing.paired_ratio(6 * [3.0], 6 * [2.0]) == {"p50": 1.5, "low": 1.5, "high": 1.5}
    # Between the least and the largest of a few is no interval.
    assert timing.paired_ratio(5 * [3.0], 5 * [2.0]) == {"p50": 1.5, "low": None, "high": None}
