"""The score, and workers that crash, hang, raise and print."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import wireframe
from wireframe.errors import MissingPackageError, ScoreError
from wireframe.graph import Wireframe, empty_wireframe
from wireframe.scoring import Outcome, Score, score, score_many, summarise
from wireframe.scoring_pool import ScorePool

pytest.importorskip("hoho2025")

ZERO = Score(0.0, 0.0, 0.0)

# A worker whose metric does what the first vertex's x says. Stubbing hoho2025 spares its import of seconds.
SCRIPTED = """
import json, sys, types
sys.path[:] = json.loads(sys.argv[1])
for name in ("hoho2025", "hoho2025.metric_helper"):
    sys.modules[name] = types.ModuleType(name)
from wireframe import scoring_worker

def scorer(vertices, edges, true_vertices, true_edges):
    import ctypes, os, signal, sys, time
    what = int(vertices[0, 0])
    if what == 1: ctypes.string_at(0)
    if what == 2: os._exit(3)
    if what == 3: time.sleep(60)
    if what == 4: raise ValueError("no volume\\nhere")
    if what == 5: os.write(1, b'{"score": [9, 9, 9]}\\n'); print("noise"); sys.stdin.read()
    if what == 6: os.kill(os.getpid(), signal.SIGKILL)
    return 0.1, 0.2, float(vertices[0, 1])

scoring_worker.main(scorer)
"""


def house(shift: float = 0.0, width: float = 8.0) -> Wireframe:
    x, z = np.array([0, width, width, 0, 0, width]), np.array([0, 0, 6, 6, 3, 3])
    vertices = np.stack([x + shift, np.array([3, 3, 3, 3, 5, 5]), z], axis=1).astype(np.float32)
    edges = np.array([[0, 1], [2, 3], [4, 5], [0, 4], [3, 4], [1, 5], [2, 5]])
    return Wireframe(vertices, edges)


def scripted(what: int, mark: float = 0.5) -> tuple[Wireframe, Wireframe]:
    return Wireframe(np.float32([[what, mark, 0], [9, 9, 9]]), np.array([[0, 1]])), house()


def scripted_pool(workers: int = 1, timeout: float = 20.0) -> ScorePool:
    pool = ScorePool(workers=workers, timeout=timeout)
    pool._command = [sys.executable, "-c", SCRIPTED]
    return pool


def test_a_wireframe_scores_one_against_itself_and_less_when_moved():
    np.testing.assert_allclose(score(house(), house()), (1, 1, 1), atol=1e-6)
    moved = score(house(shift=0.3), house())
    assert moved.f1 == 1.0 and 0.4 < moved.iou < 0.8
    assert moved.hss == pytest.approx(2 * moved.f1 * moved.iou / (moved.f1 + moved.iou))
    assert score(house(shift=0.6), house()).f1 < 1.0


def test_the_score_is_hoho2025s():
    from hoho2025.metric_helper import hss

    predicted, truth = house(shift=0.2, width=7.0), house()
    exact = hss(predicted.vertices.tolist(), predicted.edges, truth.vertices.tolist(), truth.edges)
    assert score(predicted, truth) == tuple(map(float, exact))
    np.testing.assert_allclose(score(predicted, truth), hss(*predicted, *truth), rtol=1e-6)


def test_the_package_offers_the_function_and_not_a_module():
    assert wireframe.score is score and wireframe.Score is Score


@pytest.mark.parametrize(
    "predicted",
    [
        Wireframe(np.zeros((0, 3)), np.zeros((0, 2), int)),
        Wireframe(house().vertices * np.float32(np.nan), house().edges),
        Wireframe(house().vertices, house().edges + 1),
        Wireframe(house().vertices, house().edges - 1),
        Wireframe(house().vertices, house().edges * 1.0),
        Wireframe(house().vertices[:, :2], house().edges),
        Wireframe([[0, 0, 0], [1]], [[0, 1]]),
        None,
    ],
    ids=["empty", "NaN", "id too large", "negative id", "float ids", "2D", "ragged", "None"],
)
def test_an_ill_formed_prediction_scores_zero_and_is_counted(predicted):
    assert score(predicted, house()) == ZERO
    (outcome,) = score_many([(predicted, house())], workers=1)
    assert outcome.score == ZERO and outcome.failure.startswith("bad prediction: ")


def test_predictions_without_any_overlap_or_edge_score_zero():
    assert score(empty_wireframe(), house()).hss == 0.0
    assert score(Wireframe(house().vertices, np.zeros((0, 2), np.int64)), house()).hss == 0.0


@pytest.mark.parametrize(
    "truth",
    [
        Wireframe(np.zeros((0, 3)), np.zeros((0, 2), int)),
        Wireframe(house().vertices, house().edges + 1),
        Wireframe(house().vertices, np.zeros((0, 2), int)),
        Wireframe(house().vertices + np.float32(np.inf), house().edges),
    ],
    ids=["empty", "bad id", "no edges", "not finite"],
)
def test_a_bad_truth_raises_alone_and_is_counted_in_a_run(truth):
    with pytest.raises(ScoreError, match=r"^bad truth"):
        score(house(), truth)
    (outcome,) = score_many([(house(), truth)], workers=1)
    assert outcome.score == ZERO and outcome.failure.startswith("bad truth")


def test_without_hoho2025_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for call in (lambda: score(house(), house()), lambda: score_many([(house(), house())]), ScorePool):
        with pytest.raises(MissingPackageError, match="pip install hoho2025"):
            call()


UNGUARDED = """
import sys
sys.path.insert(0, {root!r})
print("started", flush=True)
import numpy as np
from wireframe.graph import Wireframe
from wireframe.scoring import score_many

truth = Wireframe(np.array({vertices}), np.array({edges}))
pairs = [(Wireframe(truth.vertices + [shift, 0, 0], truth.edges), truth) for shift in (0.0, 0.25, 0.5)]
done = []
for outcome in score_many(pairs, workers=1, progress=lambda *counts: done.append(counts)):
    print(repr(tuple(outcome.score)), outcome.failure)
print(done, "torch" in sys.modules)
"""


def test_a_script_without_a_main_guard_scores_like_this_process(tmp_path):
    truth = house()
    script = tmp_path / "unguarded.py"
    root = str(Path(__file__).resolve().parent.parent)
    values = {"vertices": truth.vertices.tolist(), "edges": truth.edges.tolist()}
    script.write_text(UNGUARDED.format(root=root, **values))
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    expected = [f"{tuple(score(house(shift=shift), truth))!r} None" for shift in (0.0, 0.25, 0.5)]
    assert run.stdout.splitlines() == ["started", *expected, "[(1, 3), (2, 3), (3, 3)] False"], run.stderr


def test_every_failure_is_counted_by_its_reason_and_the_rest_scored_in_order():
    with scripted_pool(workers=2) as pool:
        outcomes = pool.score_many([scripted(what, mark=what / 8) for what in (0, 1, 0, 2, 4, 7, 6, 0)])
    assert [outcome.failure for outcome in outcomes] == [
        None, "crashed (signal 11)", None, "crashed (exit code 3)", "raised ValueError: no volume here", None,
        "crashed (signal 9)", None,
    ]
    assert [outcome.score.iou for outcome in outcomes] == [0, 0, 0, 0, 0, 7 / 8, 0, 0]
    assert outcomes[0].score == (0.1, 0.2, 0.0)


def test_a_hanging_scene_times_out_and_its_worker_is_replaced():
    with scripted_pool(timeout=1.0) as pool:
        start = time.monotonic()
        outcomes = pool.score_many([scripted(3), scripted(0)])
        assert time.monotonic() - start < 20
    assert outcomes == [Outcome(ZERO, "timed out"), Outcome(Score(0.1, 0.2, 0.5), None)]


def test_what_a_library_prints_or_reads_does_not_disturb_the_scores():
    with scripted_pool() as pool:
        assert pool.score_many([scripted(5), scripted(0)]) == [Outcome(Score(0.1, 0.2, 0.5), None)] * 2


def test_a_pool_is_reusable_and_keeps_its_worker():
    with scripted_pool() as pool:
        pool.start()
        first = pool.score_many([scripted(0)])
        process = pool._slots[0]._worker._child.process
        assert pool.score_many([scripted(0)]) == first and pool._slots[0]._worker._child.process is process
        assert pool.score_many([]) == []
    assert process.returncode is not None
    with pytest.raises(ScoreError, match="closed"):
        pool.submit(*scripted(0))


def test_a_worker_that_died_while_idle_does_not_cost_the_next_scene_its_score():
    with scripted_pool() as pool:
        pool.score_many([scripted(0)])
        process = pool._slots[0]._worker._child.process
        process.kill()
        process.wait()
        assert pool.score_many([scripted(0)]) == [Outcome(Score(0.1, 0.2, 0.5), None)]


def test_closing_a_pool_ends_a_scene_that_hangs():
    pool = scripted_pool(timeout=60.0)
    future = pool.submit(*scripted(3))
    later = pool.submit(*scripted(0))
    time.sleep(1.0)
    pool.close()
    assert future.done() and future.result().failure is not None
    assert later.cancelled()


def test_a_worker_that_cannot_start_stops_the_run_with_its_reason():
    pool = scripted_pool()
    pool._command = [sys.executable, "-c", "import os; os._exit(7)"]
    with pool, pytest.raises(ScoreError, match=r"cannot be started: crashed \(exit code 7\)"):
        pool.score_many([scripted(0), scripted(0)])


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"timeout": 0.0}, {"timeout": float("nan")}])
def test_impossible_pools_are_refused(arguments):
    with pytest.raises(ScoreError, match="score pool"):
        ScorePool(**arguments)


def test_a_summary_counts_failures_as_zero_and_brackets_the_mean():
    rng = np.random.default_rng(0)
    outcomes = [Outcome(Score(h, 0.5, 0.25), None) for h in rng.uniform(0.2, 0.6, 98)]
    outcomes += [Outcome(ZERO, "timed out"), Outcome(ZERO, "crashed (signal 11)")]
    summary = summarise(outcomes)
    mean = np.mean([outcome.score.hss for outcome in outcomes])
    assert summary["scenes"] == 100
    assert summary["f1"] == pytest.approx(0.49) and summary["iou"] == pytest.approx(0.245)
    assert summary["hss"] == pytest.approx(mean)
    spread = 1.96 * np.std([outcome.score.hss for outcome in outcomes]) / 10
    assert summary["hss_low"] == pytest.approx(mean - spread, abs=0.01)
    assert summary["hss_high"] == pytest.approx(mean + spread, abs=0.01)
    assert summary["failures"] == {"crashed (signal 11)": 1, "timed out": 1}
    assert summarise(outcomes) == summary
    with pytest.raises(ScoreError):
        summarise([])
