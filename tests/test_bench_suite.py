"""``wireframe bench kernels | pipeline``: what is held as a race, what a row says, what becomes of rivals that fail."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wireframe import cli
from wireframe.bench import clocks, fusion, pipeline, prepare, runner, standings, timing
from wireframe.bench.names import LEFT_OUT
from wireframe.bench.race import BACKWARD, BOTH, FORWARD, MODES, Bar, How, Race, Rival, Work, package
from wireframe.cli import main
from wireframe.errors import WireframeError

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device", "cpu", "--small", "--threads", "1", "--backend", "eager"]
KEYS = {
    "part", "op", "provider", "mode", "shape", "sizes", "dtype", "deterministic", "p20_ms", "p50_ms", "p80_ms", "calls",
    "ratio", "cache", "error", "peak_mib", "first_s", "flops", "bytes", "whole", "device", "threads", "torch", "triton",
    "cuda", "driver", "numpy", "python", "commit", "date", "load", "command",
}  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As in a process of its own: pytest-benchmark times nothing where it takes itself for a worker of pytest-xdist."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bench(tmp_path, part, *more):
    """Exit status and rows of the command."""
    out = tmp_path / "rows.jsonl"
    status = main(["bench", part, *SMALL, "--out", str(out), *more])
    return status, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def test_operations_are_held_against_all_rivals_and_rows_have_all_keys(tmp_path, capsys):
    status, rows = bench(tmp_path, "kernels", "-k", "qk_norm and mask or sinkhorn")
    assert status == 0
    rivals = {"eager", "ours", "eager, deterministic", "torch.compile", "torch.compile, deterministic"}
    for op, more in (
        ("qk_norm_attention", {"SDPA math", "SDPA flash", "FlexAttention"}),
        ("sinkhorn", {"POT solve_batch", "geomloss, annealed, not converged"}),
    ):
        for mode in MODES:
            found = {row["provider"]: row for row in reversed(rows) if (row["op"], row["mode"]) == (op, mode)}
            assert found.keys() == rivals | more
            for provider, row in found.items():
                assert row.keys() - {"failed"} == KEYS
                if "failed" in row:
                    # What may be absent, or has no backward on a CPU, says so.
                    assert provider in ("POT solve_batch", "geomloss, annealed, not converged", "FlexAttention")
                    assert "pip install" in row["failed"] or "does not support backward on CPU" in row["failed"]
                    assert row["p50_ms"] is None and row["calls"] == 0
                else:
                    assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["threads"] == 1
                    assert (row["ratio"] is None) == (provider == "ours")
                    assert (row["error"] is None) == ("annealed" in provider) and (row["error"] or 0) < 1e-4
    printed = capsys.readouterr().out
    assert printed.startswith(rows[0]["device"]) and "sinkhorn, forward + backward, 2 x 6 x 6" in printed


def test_native_operations_are_held_against_their_references_bit_for_bit(tmp_path):
    status, rows = bench(tmp_path, "kernels", "-k", "not qk_norm and not sinkhorn and not matching")
    by_op = {}
    for row in rows:
        by_op.setdefault(row["op"], {})[row["provider"]] = row
    assert status == 0 and {*fusion._arguments(pipeline.SMALL), "colors_to_ids", "parse_points3d"} < by_op.keys()
    for found in by_op.values():
        assert found["ours"]["error"] == 0 and found["NumPy reference"]["p50_ms"] > 0
    assert {"np.loadtxt"} < by_op["parse_points3d"].keys() and {"SciPy"} < by_op["merge_vertices"].keys()
    assert {"fpsample kdline h=7", "Open3D"} < by_op["farthest_point_sample"].keys()


def test_the_pipeline_has_the_wholes_their_parts_and_the_model(tmp_path, monkeypatch, capsys):
    # What a compiler makes of a model is not of interest here.
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)
    status, rows = bench(tmp_path, "pipeline")
    ours = {row["op"]: row for row in rows if row["provider"] == "ours"}
    assert status == 0 and {pipeline.RAW, pipeline.DECODED, pipeline.FUSE, "perceiver"} < ours.keys()
    assert "perceiver with loss" in ours
    assert {row["op"] for row in rows if row["whole"] == pipeline.RAW} == {
        "read_scene", pipeline.FUSE, "predict_segments", "wireframe_of",
    }  # fmt: skip
    half = {row["provider"]: row for row in rows if row["dtype"] == "bfloat16"}
    assert half and all(0 < row["error"] < 0.1 for row in half.values() if "failed" not in row)
    assert "ours, 1 worker" in {row["provider"] for row in rows if row["op"] == "prepare"}
    printed = capsys.readouterr().out
    assert f"{pipeline.RAW}: " in printed and "prepare one scene: " in printed and "PNG decode" in printed
    # Bars are of the full size.
    assert "bar: " not in printed


def test_the_pipeline_measures_the_scene_it_states():
    scene = pipeline.decoded(pipeline.SMALL)
    assert len(scene.views) == 6 and all(view.depth is not None for view in scene.views)
    default = pipeline.Setup()
    assert (default.scene.width, default.scene.height, default.candidates) == (768, 576, 160_000)
    assert len(scene.edges) == 17
    segments = pipeline.noisy_segments(scene, 64)
    truth = scene.vertices[scene.edges]
    assert segments.shape == (64, 2, 3)
    assert 0.05 < abs(segments[:17] - truth).mean() < 0.12 and abs(segments[17] - truth[0]).max() < 0.5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_races_have_names_of_their_own_and_grow_where_asked(device):
    how = How(device, small=False, threads=2, grow=True)
    found = [race for part in runner.PARTS for race in runner.races(part, how)]
    assert all(isinstance(size, int) for race in found for size in race.sizes.values())
    assert {race.cache for race in found} >= ({None} if device == "cpu" else {"cold", "warm"})
    for op, size, least, most in (
        ("perceiver", "points", 1024, 16384), ("perceiver", "batch", 1, 128), ("qk_norm_attention", "batch", 1, 128),
        ("qk_norm_attention", "keys", 256, 16384), ("sinkhorn", "segments", 64, 256), ("sinkhorn", "batch", 1, 128),
    ):  # fmt: skip
        sizes = {race.sizes[size] for race in found if race.op == op and size in race.sizes}
        assert (min(sizes), max(sizes)) == (least, most), op
    plain = [race for part in runner.PARTS for race in runner.races(part, how._replace(grow=False))]
    assert len(plain) < len(found) and len({race.title for race in found}) == len(found)
    # What growth has in common with the base is raced as the base has it, with all rivals and bars.
    assert [race.bars for race in found if race.title in {p.title for p in plain}] == [race.bars for race in plain]


PATHS = {"out", "json"}


def held(monkeypatch, tmp_path, *races, more=()):
    """Exit status and rows of the command on races of one's own."""
    monkeypatch.setattr(runner, "races", lambda part, how: races)
    return bench(tmp_path, "kernels", *more)


def a_race(*rivals, sets=1, **changes):
    inputs = [(torch.tensor([1.0, 2.0, 3.0]) + number,) for number in range(sets)]
    return Race("op", FORWARD, "3", {"points": 3}, "float32", lambda: Work(inputs, rivals))._replace(**changes)


def doubled(name, calls=None, factor=2.0, **more):
    def run(x):
        if calls is not None:
            calls.append((name, float(x[0])))
        return factor * x

    return Rival(name, lambda: run, **more)


def broken(*_):
    raise RuntimeError("does\nnot run")


def test_rivals_take_turns_on_rotating_inputs(monkeypatch, tmp_path):
    calls = []
    race = a_race(doubled("ours", calls), doubled("a", calls), doubled("b", calls, exact=False), sets=3)
    assert held(monkeypatch, tmp_path, race, more=["--repeats", "6"])[0] == 0
    timed = calls[-18:]
    turns = [timed[i : i + 3] for i in range(0, 18, 3)]
    order = [["ours", "a", "b"], ["a", "b", "ours"], ["b", "ours", "a"]]
    assert [[name for name, _ in turn] for turn in turns] == 2 * order
    assert [{first for _, first in turn} for turn in turns] == [{1}, {2}, {3}, {1}, {2}, {3}]


def test_a_wrong_rival_is_not_timed_and_says_so(monkeypatch, tmp_path, capsys):
    calls = []
    race = a_race(doubled("ours"), doubled("wrong", calls, 2.2), doubled("other", None, 2.2, exact=False))
    status, (ours, wrong, other) = held(monkeypatch, tmp_path, race, more=["--repeats", "5"])
    assert status == 0 and wrong["failed"] == "off the reference by 0.1, budget 0.0001"
    assert wrong["p50_ms"] is None and wrong["error"] == pytest.approx(0.1) and len(calls) < 5
    assert ours["error"] is None and other["error"] is None and other["p50_ms"] > 0
    assert "| wrong | not timed: off the reference by 0.1" in capsys.readouterr().out


def test_ours_is_not_timed_where_there_is_nothing_to_hold_it_against(monkeypatch, tmp_path):
    def broken(*_):
        raise ValueError("no memory")

    reference = Rival("eager", lambda: broken)
    status, (eager, ours) = held(monkeypatch, tmp_path, a_race(reference, doubled("ours")))
    assert status == 1 and eager["failed"] == "no memory"
    assert ours["failed"] == "there is nothing to hold it against, eager: no memory" and ours["p50_ms"] is None
    (tmp_path / "rows.jsonl").unlink()
    race = a_race(doubled("ours"))
    race = race._replace(make=lambda: Work(a_race(doubled("ours")).make().inputs, [doubled("ours")], reference=broken))
    _, (ours,) = held(monkeypatch, tmp_path, race)
    assert ours["failed"] == "there is nothing to hold it against, the reference: no memory"


def test_a_part_of_prepare_is_of_the_scene_that_its_whole_runs_beside_it():
    part = prepare.PARTS["prepare: npz"]
    work = prepare._part(part, "small", 3, prepare.SCENE)
    ours, whole = (rival.build() for rival in work.rivals)
    for inputs in work.inputs:
        assert all(np.array_equal(ours(*inputs)[key], value) for key, value in whole(*inputs).items())


def test_what_is_too_slow_to_be_a_rival_is_still_what_ours_is_held_against(monkeypatch, tmp_path):
    calls = []

    def reference(x):
        calls.append(float(x[0]))
        return 2 * x

    for factor, failed in ((2.0, None), (2.2, "off the reference by 0.1, budget 0.0001")):
        race = a_race(doubled("ours", None, factor))
        work = Work(race.make().inputs, race.make().rivals, reference=reference)
        _, (ours,) = held(monkeypatch, tmp_path, race._replace(make=lambda work=work: work), more=["--repeats", "5"])
        assert ours.get("failed") == failed and ours["error"] == pytest.approx(factor / 2 - 1)
        (tmp_path / "rows.jsonl").unlink()
    # Once a race, and never in turns.
    assert calls == [1.0, 1.0]


def test_farthest_points_of_the_full_size_are_held_against_the_reference(monkeypatch, tmp_path):
    real = fusion.ops.farthest_point_sample

    def one_wrong(*inputs, impl, **how):
        return real(*inputs, impl=impl, **how) + (torch.arange(32) == 31 if impl == "native" else 0)

    for run, status in ((real, 0), (one_wrong, 1)):
        monkeypatch.setattr(fusion.ops, "farthest_point_sample", run)
        race = a_race(op="farthest_point_sample", make=lambda: fusion._farthest(pipeline.SMALL, 32, small=False))
        found, rows = held(monkeypatch, tmp_path, race)
        ours = {row["provider"]: row for row in rows[-3:]}["ours"]
        assert found == status and (ours["error"] == 0) == (ours["p50_ms"] is not None) == (status == 0)
        assert "NumPy reference" not in {row["provider"] for row in rows}


@pytest.mark.parametrize("ours", [doubled("ours", None, 2.2), Rival("ours, 1 thread", lambda: broken)])
def test_a_failure_of_ours_is_the_exit_status(monkeypatch, tmp_path, ours):
    status, rows = held(monkeypatch, tmp_path, a_race(doubled("eager"), ours), a_race(doubled("ours"), shape="4"))
    assert status == 1 and "failed" in rows[1]
    # The next race is held nevertheless.
    assert rows[2]["p50_ms"] > 0


def test_an_absent_package_and_a_rival_that_raises_are_lines(monkeypatch, tmp_path):
    absent = Rival("absent", lambda: package("no_such_package", "no-such-package"))
    late = Rival("late", lambda: lambda x: 2 * x if len(timed) < 4 and timed.append(0) is None else broken())
    timed = []
    race = a_race(doubled("ours"), absent, Rival("broken", lambda: broken), late)
    status, (_, missing, raises, later) = held(monkeypatch, tmp_path, race, more=["--repeats", "4"])
    assert status == 0 and "pip install no-such-package" in missing["failed"]
    assert raises["failed"] == later["failed"] == "does not run" and later["p50_ms"] is None


def test_no_further_rival_is_compiled_when_the_time_is_over(monkeypatch, tmp_path):
    race = a_race(doubled("ours"), doubled("slow", slow=True), doubled("quick"))
    status, rows = held(monkeypatch, tmp_path, race, more=["--seconds", "0"])
    assert status == 0 and [row.get("failed") for row in rows] == [None, "left out, the time is over", None]


def test_pytest_benchmark_holds_the_race_and_its_report_has_it(monkeypatch, tmp_path):
    report = tmp_path / "report.json"
    race = a_race(doubled("ours"), doubled("a"))
    _, rows = held(monkeypatch, tmp_path, race, more=["--repeats", "4", "--json", str(report)])
    (found,) = json.loads(report.read_text())["benchmarks"]
    assert found["group"] == "op" and found["extra_info"]["rows"] == rows
    data = found["stats"]["data"]
    assert len(data) == 8
    # The order within a turn goes round.
    ours, other = [data[i] for i in (0, 3, 4, 7)], [data[i] for i in (1, 2, 5, 6)]
    for row, own in zip(rows, (ours, other)):
        assert row["p50_ms"] == pytest.approx(1e3 * float(np.median(own)), abs=1e-5)


def test_a_rival_takes_part_in_its_modes_alone(monkeypatch, tmp_path):
    race = a_race(doubled("ours"), doubled("a", modes=(BACKWARD, BOTH)), doubled("b", modes=(FORWARD,)))
    assert [row["provider"] for row in held(monkeypatch, tmp_path, race)[1]] == ["ours", "b"]


def test_compiled_rivals_may_all_run_their_backward_again():
    from torch._functorch import config

    assert config.donated_buffer
    for slow in (True, False):
        with doubled("a", slow=slow).context():
            assert config.donated_buffer != slow


def test_an_error_in_the_races_is_no_interruption(monkeypatch, capsys):
    def broken_races(part, how):
        raise WireframeError("there is no such race")
        yield

    monkeypatch.setattr(runner, "races", broken_races)
    assert main(["bench", "kernels", *SMALL]) == 2
    assert "there is no such race" in capsys.readouterr().err


def test_a_race_has_an_odd_number_of_sets_so_that_slow_rivals_see_all_of_them():
    with pytest.raises(ValueError, match="odd number of sets, and this one has 2"):
        Work([(1,), (2,)], [])


def test_native_code_that_is_absent_is_no_reference_in_its_place():
    asked = []
    rivals = pipeline.own_rivals(lambda **how: asked.append(how))
    for rival in rivals:
        rival.build()()
    assert [(rival.provider, how["impl"]) for rival, how in zip(rivals, asked)] == [
        ("NumPy reference", "reference"), ("ours", "native"), ("ours, 1 thread", "native"),
    ]  # fmt: skip


def test_on_a_gpu_nothing_of_the_cpu_is_raced_in_its_name():
    ops = [race.op for race in runner.races("pipeline", How("cuda", small=False, threads=2, grow=True))]
    assert set(ops) == {pipeline.RAW, pipeline.DECODED, "predict_segments", "perceiver"}
    on_cpu = {race.title for race in runner.races("pipeline", How(small=False)) if "prepare" in race.title}
    assert len(on_cpu) == 1 + len(prepare.PARTS)


def test_rows_name_the_command_and_rivals_have_its_threads(monkeypatch, tmp_path):
    import cv2

    monkeypatch.setattr(cv2, "setNumThreads", lambda count: seen.append(count))
    seen = []
    reads = Rival("a", lambda: seen.append(os.environ["OMP_NUM_THREADS"]) or (lambda x: 2 * x))
    more = ["--repeats", "4", "--grow", "-k", "op and not graph", "--seconds", "0"]
    _, rows = held(monkeypatch, tmp_path, a_race(doubled("ours"), reads), more=more)
    assert seen == [1, "1"]
    (command,) = {row["command"] for row in rows}
    assert command == (
        "wireframe bench kernels --device cpu --threads 1 --grow --small --repeats 4 --backend eager "
        "-k 'op and not graph' --seconds 0"
    )
    # Said again it is the same, but for where the rows go, and of what could be said nothing is missing.
    given = cli._parser().parse_args(["bench", "kernels", *SMALL, *more])
    assert cli._parser().parse_args(shlex.split(command)[1:]) == given
    assert {name for name, value in vars(given).items() if not value} - {"seconds"} == PATHS | {"debug", "quiet"}


def test_bars_are_held_against_the_fastest_form_of_a_rival():
    bars = (Bar(1.0), Bar(3.0), Bar(1.3, "torch.compile"), Bar(0.75, "flash"), Bar(40.0, memory=True), Bar(1, "no"))
    race = a_race(bars=bars)
    row = {"dtype": "float32", "peak_mib": 12.0, "p50_ms": 2.0, "provider": "ours", "ratio": None}
    rows = [row] + [
        {**row, "provider": name, "ratio": {"p50": ratio}, "dtype": dtype}
        for name, ratio, dtype in (
            ("torch.compile", 4.5, "float32"), ("torch.compile, keys repeated", 1.2, "float32"),
            ("torch.compile, bfloat16", 0.1, "bfloat16"), ("flash, no norm", 0.8, "float32"),
        )
    ]  # fmt: skip
    assert [line.rpartition(", ")[2] for line in standings.bar_lines(race, rows)] == [
        "measured 2: missed", "measured 2: met", "measured 1.2: missed", "measured 0.8: met", "measured 12: met",
        "not measured yet",
    ]  # fmt: skip
    assert all(line.endswith("not measured yet") for line in standings.bar_lines(race, []))
    # Met, for all that is known.
    late = {**row, "provider": "flash, norm", "p50_ms": None, "failed": LEFT_OUT}
    assert standings.bar_lines(race, [*rows, late])[3].endswith(
        "measured 0.8: met, without flash, norm, for which the time was over"
    )


def test_a_disabled_fixture_and_rows_that_nobody_keeps_are_said(monkeypatch, tmp_path, capsys):
    assert "pytest-benchmark is disabled" in standings.table_line({"provider": "ours", **timing.percentiles([])})
    monkeypatch.setattr(timing, "commit", lambda: "unknown")
    monkeypatch.setattr(runner, "races", lambda part, how: [a_race(doubled("ours"))])
    assert main(["bench", "kernels", "--device", "cpu", "--threads", "1", "--repeats", "1"]) == 0
    assert "rows are not kept: this is no checkout; give a file by --out" in capsys.readouterr().out


def test_a_gpu_that_is_absent_is_said_with_the_bars_that_wait_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "rows.jsonl"
    assert main(["bench", "kernels", "--device", "cuda", "--out", str(out)]) == 0
    *bars, last = capsys.readouterr().out.splitlines()
    assert last == "skipped: no CUDA device" and all(line.endswith("not measured yet") for line in bars)
    # Attention on four shapes, three of them with atomics or without; transport in five modes.
    assert len([line for line in bars if "qk_norm" in line]) == 14 and len(bars) == 19 and not out.exists()


def test_an_absent_pytest_benchmark_is_one_line(monkeypatch, capsys):
    find = runner.importlib.util.find_spec
    monkeypatch.setattr(runner.importlib.util, "find_spec", lambda n: None if n == "pytest_benchmark" else find(n))
    assert main(["bench", "kernels", *SMALL]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("under pytest-benchmark, which is not installed; run: pip install pytest-benchmark")


def test_an_expression_that_matches_no_race_is_wrong_input(monkeypatch, tmp_path, capsys):
    status, rows = held(monkeypatch, tmp_path, a_race(doubled("ours")), more=["-k", "nothing"])
    assert status == 2 and not rows and "no race of kernels matches -k 'nothing'" in capsys.readouterr().err


def test_by_hand_the_suite_runs_small_and_an_ordinary_pytest_does_not_collect_it():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "bench/suite", "-k", "clip_limits"], cwd=ROOT, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "testpaths = [\"tests\"]" in (ROOT / "pyproject.toml").read_text()


def test_the_memory_of_a_call_is_what_it_needs_beyond_what_was_there():
    peak = clocks.peak_mib(lambda: np.ones(30 << 20, np.uint8).sum(), "cpu")
    if peak is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 25 < peak < 60
