"""``bench/gpu_check.sh`` where there is no GPU: what it says, keeps, and how long its steps may take."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "bench" / "gpu_check.sh"
STEPS = ["machine", "build", "tests", "kernels", "sanitizer", "attention", "transport", "model", "fusion"]
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
    assert {name for call in calls for name in call} >= by_name.keys() and len(by_name) == 6
    for call in calls:
        assert sum((always | by_name)[name] for name in {"machine", *call}) < 9 * 60, call
    # What a rival that is begun at the last moment has to be compiled and timed.
    seconds = int(re.search(r"bench step .*--seconds (\d+)", text).group(1))
    assert all(by_name[name] - seconds > 150 for name in ("step-1", "step-3"))
    assert os.access(SCRIPT, os.X_OK)


def test_gpu_check_refuses_steps_that_it_does_not_have_and_empties_nothing(tmp_path):
    summary = tmp_path / "results" / "summary.txt"
    summary.parent.mkdir()
    summary.write_text("of an earlier call\n")
    done = run_check(tmp_path, "step1", OUT=str(summary.parent))
    assert done.returncode == 2 and summary.read_text() == "of an earlier call\n"
    assert done.stderr.startswith("step1 is no step; steps: machine build ") and " step-1 " in done.stderr


def test_gpu_check_adds_to_the_rows_where_steps_are_named(tmp_path):
    rows = tmp_path / "results" / "bench.jsonl"
    rows.parent.mkdir()
    environment = {"OUT": str(rows.parent), "PYTHON": "true"}
    summary = rows.parent / "summary.txt"
    for names, kept in ((["step-1"], True), ([], False)):
        rows.write_text("of an earlier call\n")
        summary.write_text("of an earlier call\n")
        done = run_check(tmp_path, *names, **environment)
        assert done.returncode == 0 and rows.exists() == kept
        assert ("step-1: exit status 0" in done.stdout) == kept
        assert ("of an earlier call" in summary.read_text()) == kept
