import json
import os
import threading

import pytest

from hash_pool import HashPool
from wireframe import predict_files as module
from wireframe import scene_scores, scene_source
from wireframe.cli import main
from wireframe.errors import Failure
from wireframe.evaluate import evaluate
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.predict import predict_segments
from wireframe.predict_files import predict_file
from wireframe.prepare import PrepareConfig, prepare
from wireframe.scene import read_scene
from wireframe.shards import ShardWriter
from wireframe.synth import SynthConfig, make_scene

TINY = SynthConfig(width=96, height=72, colmap_points=600, views_range=(4, 5))


@pytest.fixture(scope="module")
def model():
    return Perceiver(PerceiverConfig(hidden=32, ff=32, latent_tokens=8, latent_layers=1, num_points=64)).eval()


@pytest.fixture(scope="module")
def cut_tar(tmp_path_factory):
    """Scenes 0 to 5 of which the second is broken and the fifth has no edges, and a seventh that breaks off."""
    path = tmp_path_factory.mktemp("raw") / "a.tar"
    with ShardWriter(path) as writer:
        for index in range(7):
            row = make_scene(0, index, TINY)
            if index == 1:
                row["colmap"] = b"PK broken"
            if index == 4:
                row |= {"wf_edges": [], "wf_classifications": []}
            writer.write(row)
    path.write_bytes(path.read_bytes()[:-12000])
    return path


@pytest.mark.parametrize("workers", [1, 3])
def test_predictions_and_failures_come_in_order(cut_tar, model, tmp_path, workers):
    out = tmp_path / "p.json"
    count, failures = predict_file(cut_tar, out, model, workers=workers, progress=False)
    entries = json.loads(out.read_text())
    assert [entry["order_id"] for entry in entries] == [f"synth-0-{i:06d}" for i in range(6)] and count == 6
    assert [failure.order_id for failure in failures] == ["synth-0-000001", str(cut_tar)]
    assert "truncated" in failures[1].reason


def test_predictions_do_not_depend_on_reading_ahead(cut_tar, model, tmp_path):
    for workers in (1, 3):
        predict_file(cut_tar, tmp_path / str(workers), model, workers=workers, progress=False)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


@pytest.mark.parametrize("workers", [1, 3])
def test_a_limit_looks_at_no_scene_beyond_it(cut_tar, model, tmp_path, workers):
    count, failures = predict_file(cut_tar, tmp_path / "p", model, limit=6, workers=workers, progress=False)
    assert count == 6 and [failure.order_id for failure in failures] == ["synth-0-000001"]


@pytest.fixture
def quick_score(monkeypatch):
    pytest.importorskip("hoho2025")
    monkeypatch.setattr(scene_scores, "ScorePool", HashPool)


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_and_failures_come_in_order(cut_tar, model, quick_score, workers):
    result = evaluate(cut_tar, model, workers=workers, progress=False)
    assert result.order_ids == [f"synth-0-{i:06d}" for i in (0, 2, 3, 5)] and len(result.outcomes) == 4
    assert [failure.order_id for failure in result.failures] == ["synth-0-000001", "synth-0-000004", str(cut_tar)]
    assert result.failures[1] == Failure("synth-0-000004", "no ground truth")
    limited = evaluate(cut_tar, model, limit=5, workers=workers, progress=False)
    assert limited.order_ids == result.order_ids[:3] and limited.failures == result.failures[:2]


def test_sampled_rows_are_read_ahead_too(cut_tar, model, quick_score, tmp_path):
    prepare(cut_tar, tmp_path, PrepareConfig(num_points=64, keep_all=True), progress=False)
    one, three = (evaluate(tmp_path, model, workers=workers, progress=False) for workers in (1, 3))
    assert one.order_ids == three.order_ids == [f"synth-0-{i:06d}" for i in (0, 2, 3, 5)]
    assert one.failures == three.failures == [Failure("synth-0-000004", "no ground truth")]


def test_the_next_scene_is_read_while_the_model_runs(cut_tar, model, tmp_path, monkeypatch):
    begun, later_scene = [], threading.Event()

    def read(row):
        begun.append(row["order_id"])
        if len(begun) == 2:
            # Held back until the model has the first scene.
            assert model_runs.wait(60)
            later_scene.set()
        return read_scene(row)

    def predict(sample, model):
        model_runs.set()
        assert later_scene.wait(60)
        return predict_segments(sample, model)

    model_runs = threading.Event()
    monkeypatch.setattr(scene_source, "read_scene", read)
    monkeypatch.setattr(module, "predict_segments", predict)
    assert predict_file(cut_tar, tmp_path / "p.json", model, limit=3, workers=2, progress=False)[0] == 3


@pytest.mark.parametrize("workers, before, after", [(1, None, None), (2, None, "passive"), (2, "active", "active")])
def test_waiting_threads_of_the_model_sleep_where_scenes_are_read_ahead(
    cut_tar, model, tmp_path, monkeypatch, workers, before, after
):
    model.save_pretrained(tmp_path / "model")
    arguments = ["predict", str(cut_tar), str(tmp_path / "p.json"), "--model", str(tmp_path / "model"), "--limit", "1"]
    # Set before it is deleted, so that monkeypatch cleans up what the command sets.
    monkeypatch.setenv("OMP_WAIT_POLICY", before or "")
    if before is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main([*arguments, "--workers", str(workers), "--quiet"]) == 0
    assert os.environ.get("OMP_WAIT_POLICY") == after


def test_the_model_keeps_all_cores_where_rows_are_sampled(cut_tar, model, quick_score, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    prepare(cut_tar, tmp_path / "rows", PrepareConfig(num_points=64), progress=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    for source, policy in ((tmp_path / "rows", None), (cut_tar, "passive")):
        main(["eval", str(source), "--model", str(tmp_path / "model"), "--workers", "2", "--quiet"])
        assert os.environ.get("OMP_WAIT_POLICY") == policy
