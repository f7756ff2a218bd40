import dataclasses
import io
import json

import numpy as np
import pytest

from hash_pool import HashPool
from scenes import random_scene
from wireframe import scene_scores, tuning
from wireframe.cli import main
from wireframe.errors import ConfigError, SampleError, ScoreError
from wireframe.evaluate import evaluate, evaluate_segments
from wireframe.fusion import fuse_views
from wireframe.graph import GraphConfig, Wireframe
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.predict import PredictedScene, SceneSegments
from wireframe.predict_files import predict_segments_file
from wireframe.samples import write_parquet, write_sample
from wireframe.sampling import sample_points
from wireframe.scoring import Score
from wireframe.segment_files import SegmentSource, read_segments, write_segments
from wireframe.tuning import CONFIDENCES, format_trials, tune, widening

pytest.importorskip("hoho2025")
GRAPH = GraphConfig(confidence=0.48)


@pytest.fixture(scope="module")
def model():
    import torch

    torch.manual_seed(0)
    model = Perceiver(PerceiverConfig(hidden=32, ff=32, latent_tokens=8, latent_layers=1, segments=8, num_points=64))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("conf_head.weight", "out_proj.weight", "linear2.weight")):
                weight.normal_(std=0.3)
        # Far enough apart not to be merged.
        model.segmenter.query_offsets.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("rows")
    rows = [write_sample(sample_points(fuse_views(random_scene(i)), 64)) for i in range(6)]
    write_parquet(rows, folder / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def segments(folder, model):
    path = folder / "segments.npz"
    assert predict_segments_file(folder, path, model, GRAPH, progress=False) == (6, [])
    return path


@pytest.fixture
def quick_score(monkeypatch):
    monkeypatch.setattr(scene_scores, "ScorePool", HashPool)
    monkeypatch.setattr(tuning, "ScorePool", HashPool)


def test_scores_of_a_file_are_those_of_the_model(folder, model, segments, quick_score, tmp_path):
    low, high = (float(value) for value in np.quantile(np.load(segments)["probability"], (0.2, 0.8)))
    thresholds = (low, high)
    by_model = evaluate(folder, model, GRAPH, thresholds=thresholds, threshold_scenes=None, progress=False)
    by_file = evaluate_segments(segments, thresholds=thresholds, out=tmp_path / "s.json", progress=False)
    assert by_file == by_model and len({threshold.hss for threshold in by_file.thresholds}) == 2
    other = dataclasses.replace(GRAPH, confidence=low)
    assert evaluate_segments(segments, threshold=low, progress=False) == evaluate(folder, model, other, progress=False)
    assert json.loads((tmp_path / "s.json").read_text())["source"]["segments_of"]["source"] == {"name": str(folder)}


def test_a_split_is_named_in_the_file_and_in_the_summary(folder, model, tmp_path, quick_score, capsys):
    path = tmp_path / "s.npz"
    assert predict_segments_file(folder, path, model, split="dev-val", dev_val=2, progress=False)[0] == 2
    assert main(["eval", str(path), "--quiet"]) == 0
    assert "2 scenes of dev val (the last 2 rows of the train split)" in capsys.readouterr().out


def test_a_file_is_the_same_bytes_again_and_small(folder, model, segments, tmp_path):
    predict_segments_file(folder, tmp_path / "s.npz", model, GRAPH, progress=False)
    again = dict(np.load(tmp_path / "s.npz"))
    assert all(np.array_equal(again[name], array) for name, array in np.load(segments).items())
    assert (tmp_path / "s.npz").read_bytes() == segments.read_bytes()


def changed(path, target, **arrays):
    everything = {**np.load(path), **arrays}
    np.savez(target, **{name: array for name, array in everything.items() if array is not None})
    return target


def head(content):
    return np.frombuffer(json.dumps(content).encode(), dtype=np.uint8)


@pytest.mark.parametrize(
    "arrays",
    [
        {"segments": None}, {"n_edges": np.array([1, 2])}, {"n_edges": -np.ones(6, np.int64)},
        {"gt_vertices": np.full((24, 3), np.nan, np.float32)}, {"class_id": np.zeros(3, np.uint8)},
        {"head": head([])}, {"head": head({"order_ids": ["a"] * 6})}, {"head": head({"order_ids": 6, "about": {}})},
        {"head": head({"order_ids": ["\x1b[2J"] * 6, "about": {}})}, {"head": np.zeros(4, np.uint8)},
        {"gt_edges": np.zeros((0, 2), np.float64)},
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_one_clear_line(segments, tmp_path, arrays, capsys):
    path = changed(segments, tmp_path / "s.npz", **arrays)
    with pytest.raises(SampleError, match="no file of segments") as caught:
        read_segments(path)
    assert str(caught.value).isprintable()
    assert main(["eval", str(path)]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_pickles_and_bombs_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, head=np.array([{"a": 1}], dtype=object))
    (tmp_path / "s.npz").write_bytes(buffer.getvalue())
    with pytest.raises(SampleError):
        read_segments(tmp_path / "s.npz")
    with open(tmp_path / "s.npz", "wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(SampleError, match="larger"):
        read_segments(tmp_path / "s.npz")


def test_settings_that_the_file_cannot_answer_are_refused(segments, tmp_path, capsys):
    with pytest.raises(ConfigError, match="class ridge"):
        evaluate_segments(segments, GraphConfig(snap_classes=("ridge",)))
    path = changed(segments, tmp_path / "s.npz", head=head({"order_ids": ["a"] * 6, "about": {"graph": {"x": 1}}}))
    with pytest.raises(SampleError, match="graph settings"):
        SegmentSource(path)
    for options in (["--model", "m"], ["--split", "train"], ["--pred", "p.json"], ["--worst", "3", "--out", "o"]):
        assert main(["eval", str(segments), *options]) == 2
        assert f"{options[0]} does not count here" in capsys.readouterr().err


def two_roofs(confident: float, shift: float = 0.0):
    """A square of four edges in the truth; found with one probability, and a stray with half of it."""
    corners = np.array([[0, 3, 0], [6, 3, 0], [6, 3, 6], [0, 3, 6]], np.float32)
    edges = np.array([[0, 1], [1, 2], [2, 3], [0, 3]])
    found = np.concatenate([corners[edges] + np.float32(shift), [[[20, 3, 20], [30, 3, 30]]]]).astype(np.float32)
    probability = np.float32([confident] * 4 + [confident / 2])
    points = np.repeat(corners, 3, axis=0)
    return PredictedScene(
        "square", SceneSegments(found, probability), points, np.zeros(12, np.uint8), Wireframe(corners, edges)
    )


def test_tuning_finds_the_confidence_that_leaves_out_the_stray_and_keeps_what_is_best(tmp_path):
    write_segments(tmp_path / "s.npz", [two_roofs(0.38)], {"graph": {"confidence": 0.9, "snap_radius": 0.0}})
    graph, trials = tune(SegmentSource(tmp_path / "s.npz"), progress=False)
    assert graph.confidence in (0.2, 0.3) and graph.snap_radius == 0.0
    best = max(trial.score.hss for trial in trials)
    assert best == pytest.approx(1, abs=1e-6) and trials[0].score.hss == 0.0
    # Equal values do not take the place of what there is.
    assert graph.confidence == min(t.graph.confidence for t in trials if t.score.hss == best)
    assert graph.merge_thresholds == trials[0].graph.merge_thresholds
    assert {trial.graph.confidence for trial in trials} >= set(CONFIDENCES)
    bold = [line for line in format_trials(trials).splitlines() if "**" in line]
    assert len(bold) == 1 and f"**{graph.confidence:g}**" in bold[0]


def test_tuning_finds_the_radius_that_reaches_the_corners(tmp_path):
    write_segments(tmp_path / "s.npz", [two_roofs(0.9, shift=0.35)], {"graph": {"snap_radius": 0.0}})
    graph, trials = tune(SegmentSource(tmp_path / "s.npz"), progress=False)
    assert graph.snap_radius >= 0.7 > 0.35 * 3**0.5 and trials[0].score.hss < 0.9


def test_the_command_puts_the_settings_beside_the_model(model, segments, tmp_path, quick_score, capsys, monkeypatch):
    model.save_pretrained(tmp_path)
    assert main(["tune", str(segments), str(tmp_path), "--quiet", "--workers", "2"]) == 0
    told = capsys.readouterr().out
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert f"**{graph['confidence']:g}**" in told
    assert main(["tune", str(segments), str(tmp_path / "nowhere"), "--quiet"]) == 2
    Perceiver(model.config, seed=5).save_pretrained(tmp_path / "other")
    assert main(["tune", str(segments), str(tmp_path / "other"), "--quiet"]) == 2
    assert "another model" in capsys.readouterr().err and not (tmp_path / "other" / "graph.json").exists()
    before = (tmp_path / "graph.json").read_bytes()
    monkeypatch.setattr(tuning._Scored, "mean", lambda *_: Score(0.0, 0.0, 0.0))
    assert main(["tune", str(segments), str(tmp_path), "--quiet"]) == 1
    assert "no setting scores above 0" in capsys.readouterr().err and (tmp_path / "graph.json").read_bytes() == before


def test_scenes_without_truth_cannot_be_tuned_on(tmp_path):
    scene = two_roofs(0.9)
    empty = Wireframe(np.zeros((0, 3), np.float32), np.zeros((0, 2), np.int64))
    write_segments(tmp_path / "s.npz", [scene._replace(truth=empty)], {})
    with pytest.raises(ScoreError, match="ground truth"):
        tune(SegmentSource(tmp_path / "s.npz"), progress=False)


def test_merging_widens_in_the_published_proportions():
    assert widening(0.6) == GraphConfig().merge_thresholds and widening(1.2)[0] == 0.3


def test_the_command_writes_what_eval_and_tune_read(folder, model, tmp_path, quick_score, capsys):
    model.save_pretrained(tmp_path / "model")
    command = ["predict", str(folder), str(tmp_path / "s.npz"), "--format", "segments", "--quiet"]
    command += ["--model", str(tmp_path / "model"), "--split", "dev-val", "--dev-val", "3"]
    assert main(command) == 0 and "3 scenes" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "s.npz"), "--quiet"]) == 0
    command[2] = str(tmp_path / "s.json")
    assert main(command) == 2 and "ends in .npz" in capsys.readouterr().err
    assert main(["predict", str(folder), str(tmp_path / "s.json"), "--split", "train"]) == 2
