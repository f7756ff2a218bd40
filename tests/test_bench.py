import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from interpreter_bf16 import interpreted_bfloat16
from wireframe.bench import attention, fusion, gpu_timing, model, pipeline, timing, transport

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu_check.sh"
STEPS = ["machine", "build", "tests", "kernels", "sanitizer", "attention", "transport", "model", "fusion"]
ROW_KEYS = {
    "op", "provider", "shape", "p20_ms", "p50_ms", "p80_ms", "device", "threads", "torch", "numpy", "commit",
    "date",
}  # fmt: skip

# What a GPU machine without the other dependencies lacks.
REFUSE = """
import importlib.abc, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"hypothesis", "PIL", "pyarrow", "safetensors", "datasets", "hoho2025",
                                  "tqdm", "scipy", "matplotlib", "huggingface_hub", "pycolmap", "pandas"}:
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
"""


@pytest.fixture
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_rivals_take_turns_and_warm_up_rounds_do_not_count():
    calls, clock = [], iter(range(1000))

    def tick(run):
        run()
        return float(next(clock)) * 1000

    rivals = [timing.Case("op", name, "", lambda n=name: calls.append(n)) for name in ("a", "b")]
    times = timing.measure(rivals, repeats=3, clock=tick, warmup=2)
    assert calls == ["a", "b"] * 5
    assert times == [[4000.0, 6000.0, 8000.0], [5000.0, 7000.0, 9000.0]]


def test_short_parts_are_repeated_more_often_but_not_for_ever():
    case = timing.Case("op", "p", "", lambda: None)
    assert [len(t) for t in timing.measure([case], 3, clock=lambda run: 50.0)] == [4]
    assert [len(t) for t in timing.measure([case], 3, clock=lambda run: 0.0)] == [60]
    assert [len(t) for t in timing.measure([case], 3, clock=lambda run: 0.0, least_ms=0)] == [3]


def test_a_row_holds_the_percentiles():
    row = timing.result(
        timing.Case("op", "p", "s", print), [5.0, 1, 2, 3, 4, 100], {"device": "d"}, peak_mib=1.5
    )
    assert (row["p20_ms"], row["p50_ms"], row["p80_ms"], row["calls"]) == (2.0, 3.5, 5.0, 6)
    assert row["device"] == "d" and row["peak_mib"] == 1.5


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
    (here / "file").write_text("2")
    assert timing.commit() == clean + "-dirty"
    # Somebody else's repository around an installed package says nothing about it.
    monkeypatch.setattr(timing, "ROOT", here / "bench")
    assert timing.commit() == "unknown"


def test_times_are_never_written_as_powers_of_ten():
    assert [timing.milliseconds(x) for x in (0.01234, 1.0, 99.96, 1234.5)] == ["0.0123", "1", "100", "1234"]


@pytest.mark.usefixtures("same_threads")
def test_the_pipeline_times_every_part_and_keeps_the_rows(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--small", "--repeats", "1", "--threads", "1", "--backward", "--out", str(out)]
    assert pipeline.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ops = [row["op"] for row in rows]
    assert ops[:2] == ["make_scene", "read_scene (PNG, ZIP)"] and ops[-1] == pipeline.BACKWARD
    assert set(pipeline.PUBLISHED) | set(pipeline.BARS) <= set(ops) and len(set(ops)) == len(ops)
    assert all(row.keys() >= ROW_KEYS and 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in rows)
    assert {row["threads"] for row in rows} == {1}
    printed = capsys.readouterr().out
    assert printed.startswith(rows[0]["device"]) and all(f"| {op} |" in printed for op in ops)
    # Published figures are for the full size and would mislead beside a small one.
    assert "4200" not in printed
    assert pipeline.main(arguments) == 0
    assert len(out.read_text().splitlines()) == 2 * len(rows)


def test_the_pipeline_measures_the_scene_it_states():
    scene = pipeline.read_scene(pipeline.encoded_scene(0, pipeline._INDEX, pipeline.SMALL.scene))
    assert len(scene.views) == 6 and all(view.depth is not None for view in scene.views)
    default = pipeline.Setup().scene
    assert (default.width, default.height, default.colmap_points) == (768, 576, 40000)
    assert len(scene.edges) == 17
    segments = pipeline.noisy_segments(scene, 64)
    truth = scene.vertices[scene.edges]
    assert segments.shape == (64, 2, 3)
    assert 0.05 < abs(segments[:17] - truth).mean() < 0.12 and abs(segments[17] - truth[0]).max() < 0.5


def test_the_table_puts_bars_and_published_figures_beside_the_times():
    row = {"op": pipeline.MERGE, "shape": "64 segments", "p20_ms": 0.5, "p50_ms": 0.6, "p80_ms": 1234.0}
    table = pipeline.format_table([row])
    assert table.splitlines()[-1] == "| merge_vertices | 64 segments | 0.6 | 0.5-1234 | < 0.2 | 15-77 |"
    assert "published code, other machine" in table.splitlines()[0]


def test_the_model_bench_measures_inference_and_says_whose_it_is(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert model.main(["--device", "cpu", "--small", "--repeats", "1", "--out", str(out)]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row.keys() >= ROW_KEYS | {"peak_mib", "deterministic"}
    assert (row["op"], row["provider"], row["shape"]) == ("Perceiver forward", "ours, eager, fp32", "1 x 64")
    assert capsys.readouterr().out.splitlines()[1].startswith("Perceiver forward, ours, eager, fp32, 1 x 64: ")


@pytest.mark.parametrize("bench", [attention, model, transport])
def test_gpu_benches_say_that_they_skip_without_a_device(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--out", str(tmp_path / "rows.jsonl")]) == 0
    *goals, last = capsys.readouterr().out.splitlines()
    assert last == "skipped: no CUDA device" and all(line.endswith("not measured yet") for line in goals)
    assert len(goals) == {attention: 14, model: 0, transport: 5}[bench]
    assert not (tmp_path / "rows.jsonl").exists()


@pytest.mark.parametrize("bench, op, rivals", [
    (attention, "qk_norm_attention", {
        "reference", "triton", "flash, no norm, no mask", "cuDNN, no norm, no mask", "torch.compile",
        "torch.compile, keys repeated", "FlexAttention", "deterministic torch.compile", "atomic, 32 x 64",
    }),
    (transport, "sinkhorn", {"reference", "triton", "torch.compile"}),
])
def test_the_benches_of_operations_measure_all_rivals(bench, op, rivals, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a CUDA device")
    out = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--small", "--repeats", "1", "--backend", "eager", "--out", str(out)]
    with interpreted_bfloat16():
        assert bench.main(arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    for mode in gpu_timing.MODES:
        found = {row["provider"]: row for row in reversed(rows) if row["op"] == f"{op} {mode}"}
        assert found.keys() == rivals
        for provider, row in found.items():
            assert row.keys() >= ROW_KEYS
            # What computes the same must agree; what cannot run says why.
            if "failed" in row:
                assert provider.startswith(("FlexAttention", "cuDNN")) and row["p50_ms"] is None and row["failed"]
            elif "no norm" not in provider:
                assert row["error"] < 1e-5, row
    printed = capsys.readouterr().out
    assert printed.count("not measured yet") == len(bench.goals([])) and "x our time" in printed


def gpu_problem(*rivals, modes=gpu_timing.MODES):
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    given = {"double": lambda: lambda: 2 * x, "wrong": lambda: lambda: 2.2 * x, "broken": lambda: broken}
    return gpu_timing.Problem(
        "op", "3", [x], torch.ones(3), [gpu_timing.Rival(name, given[name], **more) for name, more in rivals], modes
    )


def broken():
    raise RuntimeError("does\nnot run")


def test_a_rival_that_fails_has_a_row_with_the_reason_and_stops_nobody():
    problem = gpu_problem(("double", {}), ("broken", {}), ("wrong", {}), ("wrong", {"exact": False}))
    rows = list(gpu_timing.compare(problem, {"device": "d"}, "cpu", 1, quick=True))
    assert [row["op"] for row in rows[::4]] == [f"op {mode}" for mode in gpu_timing.MODES]
    for failed, right, wrong, other in zip(*(rows[i::4] for i in range(4))):
        assert failed["failed"] == "does not run" and failed["provider"] == "broken" and failed["device"] == "d"
        assert right["error"] == 0 and wrong["error"] == pytest.approx(0.1) and other["error"] is None
    assert "broken, 3: not measured: does not run" in gpu_timing.describe(rows[0])


def test_a_rival_that_fails_in_one_mode_is_measured_in_the_others():
    built = []

    def build():
        built.append(None)
        # A forward alone is without gradients.
        return lambda: 2 * problem.inputs[0] if torch.is_grad_enabled() else broken()

    def unbuilt():
        built.append(None)
        raise RuntimeError("not here")

    problem = gpu_problem(("double", {}))
    more = [gpu_timing.Rival("trains", build), gpu_timing.Rival("absent", unbuilt)]
    problem = problem._replace(rivals=[*problem.rivals, *more])
    rows = list(gpu_timing.compare(problem, {}, "cpu", 1, quick=True))
    modes = {name: [row.get("failed") for row in rows if row["provider"] == name] for name in ("trains", "absent")}
    assert modes == {"trains": ["does not run", None, None], "absent": ["not here"] * 3} and len(built) == 2
    assert [row["error"] for row in rows if row["provider"] == "trains" and "failed" not in row] == [0, 0]


def test_a_backward_is_timed_without_its_forward():
    calls = []
    x = torch.ones(2, requires_grad=True)

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            calls.append("backward")
            return gradient

    rivals = [gpu_timing.Rival("a", lambda: lambda: Watched.apply(x))]
    problem = gpu_timing.Problem("op", "2", [x], torch.ones(2), rivals)
    seen = {}
    for mode in gpu_timing.MODES:
        run = gpu_timing._Call(rivals[0].build(), mode, problem, rivals[0])
        run.prepare()
        before = len(calls)
        run()
        seen[mode] = calls[before:]
    assert seen == {
        "forward": ["forward"], "backward": ["backward"], "forward + backward": ["forward", "backward"],
    }  # fmt: skip


def row_of(op, provider, shape, p50):
    return {"op": op, "provider": provider, "shape": shape, "p50_ms": p50}


def test_goals_compare_with_the_fastest_form_of_a_rival():
    shape = "32 x 4/2 x 256 x 2048 x 64, bfloat16"
    masked, both = f"{shape}, key mask", "qk_norm_attention forward + backward"
    rows = [
        row_of(both, "triton", masked, 2.0),
        row_of(both, "torch.compile", masked, 9.0),
        row_of(both, "torch.compile, keys repeated", masked, 2.4),
        row_of(both, "deterministic torch.compile", masked, 1.0),
        row_of(both, "atomic, 32 x 128", masked, None),
        row_of(both, "atomic, 64 x 64", masked, 1.95),
        row_of(both, "flash, no norm, no mask", shape, 1.6),
    ]
    lines = [line for line in attention.goals(rows) if "measured yet" not in line]
    assert [line.rpartition(", ")[2] for line in lines] == [
        "measured 1.2 x: missed", "measured 0.8 x: met", "measured 1.03 x: met",
    ]  # fmt: skip
    sizes = "64 x 64 x 64, 20 iterations, fp32"
    rows = [row_of("sinkhorn forward in a graph", "triton", sizes, 0.0115)]
    assert sum("measured 11.5 us: met" in line for line in transport.goals(rows)) == 1


def test_no_further_rival_is_compiled_when_the_time_is_over(capsys):
    arguments = ["--device", "cpu", "--small", "--seconds", "0", "--repeats", "1"]
    problem = gpu_problem(("double", {}), ("wrong", {"slow": True}), modes=("forward", "backward"))
    assert gpu_timing.main("x", "x", lambda *_: iter([problem]), lambda rows: [], arguments) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    slow, quick = lines[::2], lines[1::2]
    assert [line.partition(": ")[0] for line in quick] == [f"op {mode}, double, 3" for mode in problem.modes]
    assert slow == [f"op {mode}, wrong, 3: not measured: left out, the time is over" for mode in problem.modes]


def test_our_own_failure_is_the_exit_status(monkeypatch):
    arguments = ["--device", "cpu", "--small", "--repeats", "1"]
    for name, status in (("triton", 1), ("rival", 0)):
        problem = gpu_problem(("double", {}), ("broken", {}))
        problem = problem._replace(rivals=[problem.rivals[0], problem.rivals[1]._replace(provider=name)])
        made = iter([problem])
        assert gpu_timing.main("x", "x", lambda *_, made=made: made, lambda rows: [], arguments) == status


def run_check(cwd, *names, **changes):
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHON": sys.executable,
        "OUT": "results",
        **changes,
    }
    return subprocess.run(
        ["bash", SCRIPT, *names], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )  # fmt: skip


def test_gpu_check_ends_well_without_a_device_and_with_the_core_packages_alone(tmp_path):
    (tmp_path / "refuse").mkdir()
    (tmp_path / "refuse" / "sitecustomize.py").write_text(REFUSE)
    environment = {"PYTHONPATH": str(tmp_path / "refuse"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    refused = subprocess.run(
        [sys.executable, "-c", "import PIL"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert "ImportError: PIL" in refused.stderr
    done = run_check(tmp_path, **environment)
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr
    for step in STEPS:
        assert re.search(rf"^{step}: exit status 0, \d+ s", summary, re.MULTILINE), summary
    assert re.search(r"^build: .*wireframe\._C: built with ", summary, re.MULTILINE), summary
    assert len(re.findall("skipped: no CUDA device;", summary)) == len(STEPS) - 2
    assert "torch " in summary and "device: none" in summary
    assert done.stdout == summary
    # Rows are written where something was measured.
    assert sorted(path.name for path in (tmp_path / "results").rglob("*")) == ["steps.log", "summary.txt"]
    log = (tmp_path / "results" / "steps.log").read_text()
    assert re.findall("^== (.*)$", log, re.MULTILINE) == STEPS
    # Two steps, and five parts of a step that are named again at its end.
    assert len(re.findall(r"\d+ skipped", log)) == 2 + 2 * 5 and "passed" not in log
    parts = log.partition("== kernels")[2].partition("== sanitizer")[0].splitlines()[-1]
    assert sum(map(int, re.findall(r"(\d+) skipped", parts))) == count_of_gpu_tests(
        "tests/test_gpu_kernels.py", "tests/test_atomic_attention.py"
    )


def count_of_gpu_tests(*files):
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *files], cwd=ROOT, capture_output=True,
        text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True,
    )  # fmt: skip
    return sum("::" in line for line in collected.stdout.splitlines())


def test_gpu_check_says_what_the_tests_of_kernels_said_until_its_limit(tmp_path):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nprintf 'the first one passed'\nexec sleep 60\n")
    slow.chmod(0o755)
    one_line = re.search(r"^gpu_tests\(\) .*$", SCRIPT.read_text(), re.MULTILINE).group()
    longer = re.findall(r"^(?:parts_said|kernels)\(\) \{$.*?^\}$", SCRIPT.read_text(), re.MULTILINE | re.DOTALL)
    script = "\n".join([one_line, *longer, "kernels"])
    done = subprocess.run(
        ["timeout", "--kill-after=3", "1", "bash", "-c", script], capture_output=True, text=True,
        env={**os.environ, "PYTHON": str(slow)},
    )  # fmt: skip
    assert done.returncode == 124
    *said, last = done.stdout.splitlines()
    assert said == ["the first one passed"] * 5 and last == "|".join(said)


def test_gpu_check_runs_every_step_when_one_fails(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho it is broken\nexit 3\n")
    broken.chmod(0o755)
    done = run_check(tmp_path, PYTHON=str(broken))
    assert done.returncode == 1
    for step in STEPS:
        line = rf"^{step}: exit status 3, \d+ s; it is broken(\|it is broken){{0,4}}$"
        assert re.search(line, done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout


def test_every_call_that_gpu_check_proposes_fits_into_nine_minutes():
    text = SCRIPT.read_text()
    after = int(re.search(r"--kill-after=(\d+)", text).group(1))
    always, by_name = (
        {name: int(seconds) + after for name, seconds in re.findall(rf"^{command} ([\w-]+) (\d+) ", text, re.MULTILINE)}
        for command in ("step", "by-name")
    )
    assert list(always) == STEPS and sum(always.values()) < 9 * 60
    proposed = re.findall(r"^#   bash bench/gpu_check\.sh ((?:[\w-]+ )+) +\w", text, re.MULTILINE)
    calls = [call.split() for call in proposed]
    assert {name for call in calls for name in call} >= by_name.keys() and len(by_name) == 5
    for call in calls:
        assert sum((always | by_name)[name] for name in {"machine", *call}) < 9 * 60, call
    # What a rival that is begun at the last moment has to be compiled and timed.
    seconds = int(re.search(r"bench step .*--seconds (\d+)", text).group(1))
    assert all(by_name[name] - seconds > 150 for name in ("step-1", "step-3"))
    assert os.access(SCRIPT, os.X_OK)


def test_gpu_check_adds_to_the_rows_where_steps_are_named(tmp_path):
    rows = tmp_path / "results" / "bench.jsonl"
    rows.parent.mkdir()
    environment = {"OUT": str(rows.parent), "PYTHON": "true"}
    for names, kept in ((["step-1"], True), ([], False)):
        rows.write_text("of an earlier call\n")
        done = run_check(tmp_path, *names, **environment)
        assert done.returncode == 0 and rows.exists() == kept
        assert ("step-1: exit status 0" in done.stdout) == kept


def test_fusion_measures_native_against_reference_and_rivals(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert fusion.main(["--small", "--repeats", "1", "--threads", "2", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    providers = {}
    for row in rows:
        providers.setdefault(row["op"], set()).add(row["provider"])
    assert {"house_mask", "vote_labels", "priority_sample", "merge_vertices", fusion.FUSE} <= providers.keys()
    for op, names in providers.items():
        # The plain farthest point sampling takes seconds at the full size and is left out.
        assert any("native" in name for name in names)
        assert "reference" in names or op == "farthest_point_sample"
    assert "np.loadtxt" in providers["parse_points3d"]
    printed = capsys.readouterr().out
    assert "extra memory of fuse_views + sample_points:" in printed and "| <= 40 ms |" in printed


def test_extra_memory_is_what_the_call_needs_beyond_what_was_there():
    extra = fusion.extra_memory_mb(lambda: np.ones(30_000_000, np.uint8).sum())
    if extra is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert 25 < extra < 60
