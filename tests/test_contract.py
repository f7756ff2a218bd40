"""Clauses A to D of the determinism contract, by the command itself in fresh processes; and that each can be broken.

All of it on the CPU, and on a GPU where there is one; several ranks then share that GPU and speak through gloo, for
NCCL wants a GPU for each. E, fusion and sampling, stands in test_view_fusion_ops.py, test_point_sampling_ops.py and
test_gpu_fusion.py.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scenes import random_scene
from wireframe.fusion import fuse_views
from wireframe.samples import write_parquet, write_sample
from wireframe.sampling import sample_points
from wireframe.train import checkpoints

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parent
# Long enough to be killed twenty times.
LONG = ["--set", "stages.0.steps=150", "--set", "save_every=2"]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def command(device, out, *options, broken="nothing", ranks=1, evaluate=False):
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run = ["train", "--smoke", "--threads", "1", "--device", device, "--quiet", "--out", str(out)]
    run += [] if evaluate else ["--no-eval"]
    return [*start, str(HERE / "sabotaged.py"), broken, *run, *options]


def environment():
    # A thread in every library, and the checkout wherever it is.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def hashes(device, out, *options, **how):
    """Hashes of weights and optimiser after ``wireframe train`` in a process (or some) of its own."""
    done = subprocess.run(
        command(device, out, *options, **how), env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return checkpoints.tensor_hashes(checkpoints.latest(out, pytest.fail))


@pytest.fixture(scope="module")
def expected(device, tmp_path_factory):
    """What an undisturbed run gives."""
    found = hashes(device, tmp_path_factory.mktemp("first"))
    assert len(found["model"]) == len(found["optimizer"]) == 64
    return found


def test_a_another_process_gives_the_same_bits_however_it_logs_saves_and_reads(device, expected, tmp_path):
    other = ["--set", "save_every=7", "--set", "log_every=3", "--stream"]
    assert hashes(device, tmp_path, *other) == expected


@pytest.mark.parametrize("broken", ["unseeded_dropout", "shuffled_sum"])
def test_a_notices_randomness_and_an_order_that_changes(device, expected, tmp_path, broken):
    assert hashes(device, tmp_path, broken=broken)["model"] != expected["model"]


def test_b_stopped_anywhere_and_resumed_is_uninterrupted(device, expected, tmp_path):
    for step in (5, 12, 13, 20):
        hashes(device, tmp_path, "--stop-after", str(step))
    assert hashes(device, tmp_path) == expected


def test_b_notices_state_that_is_forgotten(device, expected, tmp_path):
    hashes(device, tmp_path, "--stop-after", "13")
    assert hashes(device, tmp_path, broken="forgotten_moments")["model"] != expected["model"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_d_any_number_of_ranks_gives_the_same_bits(device, expected, tmp_path, ranks):
    assert hashes(device, tmp_path, ranks=ranks) == expected


def test_d_notices_a_sum_that_depends_on_the_ranks(device, tmp_path):
    alone = hashes(device, tmp_path / "alone", broken="sum_by_rank")
    assert hashes(device, tmp_path / "two", broken="sum_by_rank", ranks=2)["model"] != alone["model"]


def test_d_ranks_that_do_not_begin_alike_are_refused(device, tmp_path):
    hashes(device, tmp_path / "run-0", "--stop-after", "5")
    apart = command(device, tmp_path / "run", broken="own_folders", ranks=2)
    done = subprocess.run(apart, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode and "wireframe train: the ranks do not begin alike" in done.stderr


def test_d_goes_on_with_another_number_of_ranks(device, expected, tmp_path):
    hashes(device, tmp_path, "--stop-after", "13", ranks=2)
    assert hashes(device, tmp_path) == expected


def logged(log):
    """The last step in the log, 0 where there is none."""
    found = log.read_text().splitlines() if log.exists() else []
    return max((json.loads(line)["step"] for line in found if line.endswith("}") and "event" not in line), default=0)


def test_killed_at_random_moments_and_resumed_is_uninterrupted(device, tmp_path):
    undisturbed = hashes(device, tmp_path / "calm", *LONG)
    moments = random.Random(353)
    log = tmp_path / "killed" / "log.jsonl"
    finished = 0
    # A start on a GPU takes ten seconds.
    for kill in range(20 if device == "cpu" else 5):
        before = log.stat().st_ino if log.exists() else None
        process = subprocess.Popen(
            command(device, log.parent, *LONG), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if kill % 4 == 3:
            # While it starts: imports, data, the checkpoint it goes on from.
            time.sleep(moments.uniform(0.0, 3.0))
        else:
            # Some steps and saves after its first step. The log is cut behind the last checkpoint when the run begins.
            while process.poll() is None and (not log.exists() or log.stat().st_ino == before):
                time.sleep(0.002)
            start = logged(log)
            while process.poll() is None and logged(log) == start:
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.6 if device == "cpu" else 2.0))
        finished += process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert finished == 0, "the run was done before it was killed; make it longer"
    reached = checkpoints.latest(log.parent, lambda line: None)
    assert reached is not None, "no step was ever saved; the moments were too early"
    assert hashes(device, log.parent, *LONG) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_finish_saves_and_has_its_own_exit_status(device, tmp_path, number):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(device, out, *LONG), env=environment(), stderr=subprocess.PIPE, text=True
    )
    while not (out / "checkpoints").exists() or not list((out / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 4, said
    line = said.strip().splitlines()[-1]
    folder = checkpoints.latest(out, pytest.fail)
    assert line.startswith("wireframe train: stopped after step") and str(folder) in line
    assert "the same command goes on" in line


def predictions(model, scenes, order):
    """Segments and probabilities of scenes, in an order, by scene."""
    from wireframe.predict import predict_segments

    found = {}
    for i in order:
        one = predict_segments(scenes[i], model)
        found.setdefault(i, []).append((one.segments.tobytes(), one.probability.tobytes()))
    return found


@pytest.fixture(scope="module")
def random_model(device):
    from wireframe.perceiver import Perceiver
    from wireframe.train.config import load_config

    model = Perceiver(load_config("smoke").model, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.to(device)


def depends_on_neighbours(model, scenes):
    alone = {i: predictions(model, scenes, [i])[i] for i in range(5)}
    others = (predictions(model, scenes, order) for order in ((4, 3, 2, 1, 0), (2, 2, 0), (3,)))
    return any(set(values) != set(alone[i]) for found in others for i, values in found.items())


def test_c_a_scene_does_not_depend_on_the_scenes_beside_it(random_model, monkeypatch):
    from wireframe.train.made_rows import made_rows

    scenes = made_rows(128, 5)
    assert not depends_on_neighbours(random_model, scenes)
    # A model that remembers, as one with running statistics would, is noticed.
    seen = []
    forward = type(random_model).forward

    def remember(self, batch):
        seen.append(batch["xyz_norm"].mean())
        return forward(self, {**batch, "xyz_norm": batch["xyz_norm"] - torch.stack(seen).mean()})

    monkeypatch.setattr(type(random_model), "forward", remember)
    assert depends_on_neighbours(random_model, scenes)


def test_a_scoring_the_held_out_rows_changes_nothing(device, tmp_path):
    for points in (64, 128):
        rows = [write_sample(sample_points(fuse_views(random_scene(i), 80), points)) for i in range(14)]
        write_parquet(rows, tmp_path / f"{points}.parquet")
    rows = ["--data", str(tmp_path / "64.parquet"), "--data", str(tmp_path / "128.parquet")]
    scored = hashes(device, tmp_path / "scored", *rows, "--set", "evaluation.thresholds=[0.1]", evaluate=True)
    assert len(list((tmp_path / "scored" / "evaluation").glob("*.json"))) == 3
    assert hashes(device, tmp_path / "not", *rows) == scored
