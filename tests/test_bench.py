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

from wireframe.bench import fusion, gpu_ops, pipeline, timing

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu_check.sh"
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


def test_gpu_ops_measures_every_built_implementation(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert gpu_ops.main(["--device", "cpu", "--small", "--repeats", "1", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row.keys() >= ROW_KEYS | {"peak_mib", "deterministic"} for row in rows)
    for op in ("qk_norm_attention", "sinkhorn", "segment_matching"):
        for mode in ("forward", "forward + backward"):
            found = [row["provider"] for row in rows if row["op"] == f"{op} {mode}"]
            assert found == list(gpu_ops.dispatch.BUILT[op])
    assert rows[-1]["op"] == "Perceiver forward + backward"
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_gpu_ops_says_that_it_skips_without_a_device(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_ops.main(["--out", str(tmp_path / "rows.jsonl")]) == 0
    assert capsys.readouterr().out == "skipped: no CUDA device\n"
    assert not (tmp_path / "rows.jsonl").exists()


def run_check(cwd, **changes):
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHON": sys.executable,
        "OUT": "results",
        **changes,
    }
    return subprocess.run(
        ["bash", SCRIPT], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
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
    for step in ("machine", "build", "tests", "gpu_ops", "fusion"):
        assert re.search(rf"^{step}: exit status 0, \d+ s", summary, re.MULTILINE), summary
    assert re.search(r"^build: .*wireframe\._C: built with ", summary, re.MULTILINE), summary
    assert len(re.findall("skipped: no CUDA device;", summary)) == 3
    assert "torch " in summary and "device: none" in summary
    assert done.stdout == summary
    files = list((tmp_path / "results").rglob("*"))
    assert all(path.is_file() for path in files) and len(files) <= 8
    assert re.search(r"\d+ skipped", (tmp_path / "results" / "tests.log").read_text())


def test_gpu_check_runs_every_step_when_one_fails(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho it is broken\nexit 3\n")
    broken.chmod(0o755)
    done = run_check(tmp_path, PYTHON=str(broken))
    assert done.returncode == 1
    for step in ("machine", "build", "tests", "gpu_ops", "fusion"):
        line = rf"^{step}: exit status 3, \d+ s; it is broken$"
        assert re.search(line, done.stdout, re.MULTILINE), done.stdout
    assert "skipped" not in done.stdout


def test_gpu_check_fits_into_nine_minutes():
    text = SCRIPT.read_text()
    limits = [int(seconds) for seconds in re.findall(r"^step \w+ (\d+) ", text, re.MULTILINE)]
    after = int(re.search(r"--kill-after=(\d+)", text).group(1))
    assert len(limits) == 5 and sum(limits) + after * len(limits) < 9 * 60
    assert os.access(SCRIPT, os.X_OK)


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
