"""Evaluations by split, at thresholds, with a picture, and killed in the middle."""

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hash_pool import HashPool
from scenes import random_scene
from wireframe import evaluate as module
from wireframe import scene_scores, scene_source
from wireframe.errors import ConfigError, MissingPackageError, ScoreError, ShardError
from wireframe.evaluate import evaluate
from wireframe.fusion import fuse_views
from wireframe.graph import GraphConfig
from wireframe.partial_scores import PartialScores
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.samples import write_parquet, write_sample
from wireframe.sampling import sample_points
from wireframe.score_files import format_summary

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("hoho2025")

SMALL_MODEL = PerceiverConfig(
    hidden=32, ff=48, latent_tokens=8, latent_layers=2, decoder_layers=1, num_heads=2, kv_heads_cross=1,
    kv_heads_self=1, segments=8, dropout=0.5, num_points=64,
)  # fmt: skip
SCENES = 12
WITHOUT_TRUTH = 7
# Of the model below: all segments, some, none.
THRESHOLDS = (0.2, 0.8, 0.9)
CONFIDENCE = 0.78


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads of so small a model mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(seed=1):
    """A model whose segments and confidences depend on the scene: fresh weights do not."""
    model = Perceiver(SMALL_MODEL)
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws))
        # Segments near the scene and some metres long, of confidences on both sides of one half.
        model.segmenter.segment_head.weight.mul_(0.005)
        model.segmenter.segment_head.bias.copy_(torch.tensor([0, 0, 0, 0, 0, 0, 2.0]))
        model.segmenter.conf_head.weight.mul_(0.1)
        model.segmenter.conf_head.bias.zero_()
    return model.eval()


def without_truth(sample):
    return dataclasses.replace(
        sample, gt_segments=np.zeros((0, 2, 3), np.float32), gt_edges=np.zeros((0, 2), np.int32),
        gt_edge_classes=np.zeros(0, np.int64),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Sampled rows in the hub's layout: a train split of two shards and a validation split; one has no truth."""
    folder = tmp_path_factory.mktemp("rows")
    samples = [sample_points(fuse_views(random_scene(i), 50), 64) for i in range(SCENES)]
    samples[WITHOUT_TRUTH] = without_truth(samples[WITHOUT_TRUTH])
    made = [write_sample(sample) for sample in samples]
    (folder / "data").mkdir()
    for name, part in (("train-00000-of-00002", made[:5]), ("train-00001-of-00002", made[5:10]),
                       ("validation-00000-of-00001", made[10:])):  # fmt: skip
        write_parquet(part, folder / "data" / f"{name}.parquet")
    return folder


@pytest.fixture
def quick_score(monkeypatch):
    monkeypatch.setattr(scene_scores, "ScorePool", HashPool)


@pytest.fixture
def predicted(monkeypatch):
    """The ids of the scenes that were predicted, in order."""
    calls, original = [], scene_scores.predict_segments

    def predict(sample, model):
        calls.append(sample.order_id)
        return original(sample, model)

    monkeypatch.setattr(scene_scores, "predict_segments", predict)
    return calls


def run(rows, model, out, **changes):
    settings = {"thresholds": THRESHOLDS, "threshold_scenes": 4, "progress": False, "worst": 3} | changes
    return evaluate(rows, model, GraphConfig(confidence=CONFIDENCE), out=out, **settings)


def ids(scenes):
    return [random_scene(i).order_id for i in scenes if i != WITHOUT_TRUTH]


def stop_after(monkeypatch, scenes):
    """The evaluation breaks off, as by a signal, when it comes to the prediction after so many."""
    left, original = [scenes], scene_scores.predict_segments

    def predict(sample, model):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(sample, model)

    monkeypatch.setattr(scene_scores, "predict_segments", predict)


@pytest.mark.parametrize(
    "split, limit, expected",
    [
        (None, None, range(12)), ("train", None, range(10)), ("validation", None, range(10, 12)),
        ("dev-val", None, range(3, 10)), ("dev-val", 3, range(3, 6)),
    ],
)  # fmt: skip
def test_a_split_is_scored_and_nothing_else(rows, model, quick_score, predicted, split, limit, expected):
    result = run(rows, model, None, split=split, dev_val=7, limit=limit)
    assert result.order_ids == ids(expected) == predicted
    assert [failure.order_id for failure in result.failures] == [random_scene(i).order_id for i in expected if i == 7]


def test_a_split_that_is_not_there_is_one_clear_line(rows, model, tmp_path):
    with pytest.raises(ShardError, match="test"):
        run(rows, model, tmp_path / "s.json", split="test")
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ConfigError, match="split"):
        run(tmp_path / "a.tar", model, None, split="dev-val")
    assert [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_the_score_at_a_threshold_is_that_of_the_first_scenes_at_this_confidence(rows, model, quick_score):
    result = run(rows, model, None, threshold_scenes=9)
    for threshold in result.thresholds:
        graph = GraphConfig(confidence=threshold.confidence)
        alone = evaluate(rows, model, graph, limit=9, progress=False)
        assert threshold.scenes == 8 == len(alone.outcomes)
        assert threshold.hss == pytest.approx(np.mean([outcome.score.hss for outcome in alone.outcomes]), abs=1e-12)
    assert len({threshold.hss for threshold in result.thresholds}) == 3
    assert [threshold.confidence for threshold in result.thresholds] == list(THRESHOLDS)
    assert "0.20" in format_summary(result) and f"{result.thresholds[0].hss:.4f}" in format_summary(result)


def test_the_worst_are_named_and_drawn(rows, model, quick_score, tmp_path, monkeypatch):
    read, original = [], scene_source.read_sample
    monkeypatch.setattr(scene_source, "read_sample", lambda row: read.append(row["order_id"]) or original(row))
    out, sheet = tmp_path / "new" / "s.json", tmp_path / "new" / "s.png"
    result = run(rows, model, out, sheet=sheet)
    # In one go, no scene is read a second time for the picture.
    assert len(read) == SCENES
    by_score = sorted(range(11), key=lambda i: result.outcomes[i].score.hss)
    assert list(result.worst) == [result.order_ids[i] for i in by_score[:3]]
    assert json.loads(out.read_text())["worst"] == list(result.worst)
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.parent.iterdir()) == ["s.json", "s.png"]
    assert run(rows, model, out).worst == ()


@pytest.mark.parametrize("stop", [0, 1, 6, 10])
@pytest.mark.parametrize("workers", [1, 2])
def test_what_was_scored_is_not_done_again_and_the_result_is_the_same(
    rows, model, quick_score, tmp_path, monkeypatch, stop, workers
):
    run(rows, model, tmp_path / "whole.json", sheet=tmp_path / "whole.png")
    out, sheet = tmp_path / "s.json", tmp_path / "s.png"
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        with pytest.raises(KeyboardInterrupt):
            run(rows, model, out, sheet=sheet, workers=workers)
    assert not out.exists() and not sheet.exists()
    stands = len((tmp_path / "s.json.partial").read_text().splitlines()) - 1
    # Some scenes are awaited when the model is interrupted.
    assert max(0, stop - 4 * workers) <= stands <= stop
    calls, original = [], scene_scores.predict_segments
    monkeypatch.setattr(scene_scores, "predict_segments", lambda s, m: calls.append(s.order_id) or original(s, m))
    run(rows, model, out, sheet=sheet, workers=3 - workers)
    assert calls == ids(range(12))[stands:]
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert sheet.read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert not (tmp_path / "s.json.partial").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: b"\n".join(lines)[:-9],
        lambda lines: b"\n".join(lines),
        lambda lines: b"\n".join([*lines[:-1], b"null", b'{"index": 3}', b"[" * 100_000, b"\xff", b""]),
        lambda lines: b"\n".join([*lines[:-1], lines[-1].replace(b'"score": [', b'"score": [NaN, '), b""]),
    ],
    ids=["cut", "no line end", "garbage", "NaN"],
)
def test_a_damaged_line_is_dropped_and_its_scene_done_again(
    rows, model, quick_score, predicted, tmp_path, monkeypatch, damage
):
    run(rows, model, tmp_path / "whole.json")
    out, partial = tmp_path / "s.json", tmp_path / "s.json.partial"
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run(rows, model, out)
    lines = partial.read_bytes().splitlines()
    partial.write_bytes(damage(lines))
    lost = 0 if partial.read_bytes() == b"\n".join(lines) else 1
    del predicted[:]
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run(rows, model, out)
    # A line that was dropped is written anew, and every line stands alone.
    again = [json.loads(line)["order_id"] for line in partial.read_bytes().splitlines()[1:]]
    assert again == ids(range(12))[: len(again)] and len(again) > len(lines) - 1
    assert predicted == ids(range(12))[len(lines) - 1 - lost :][:6]
    run(rows, model, out)
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_scores_of_something_else_are_not_taken(rows, model, quick_score, predicted, tmp_path, monkeypatch):
    out = tmp_path / "s.json"
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            run(rows, model, out)
    kept = (tmp_path / "s.json.partial").read_bytes()

    def predicts(model, source=rows, **changes):
        (tmp_path / "s.json.partial").write_bytes(kept)
        del predicted[:]
        run(source, model, out, **changes)
        return len(predicted)

    assert predicts(model) == predicts(make_model()) == 11 - 7
    assert predicts(model, limit=5) == 0
    assert predicts(make_model(seed=0)) == 11
    assert predicts(model, thresholds=(0.3,)) == predicts(model, threshold_scenes=3) == 11
    assert predicts(model, split="dev-val", dev_val=7) == 6
    shard = rows / "data" / "train-00000-of-00002.parquet"
    before = shard.stat()
    try:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert predicts(model) == 11
    finally:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(module, "_versions", lambda: {"hoho2025": "another"})
    assert predicts(model) == 11


KILLED = """
import sys, time
import torch
from wireframe import scene_scores
from wireframe.evaluate import evaluate
from wireframe.graph import GraphConfig
from wireframe.perceiver import Perceiver

calls, original = [], scene_scores.predict_segments

def predict(sample, model):
    calls.append(sample.order_id)
    if len(calls) == 9:
        print("waiting", flush=True)
        time.sleep(600)
    return original(sample, model)

torch.set_num_threads(1)
scene_scores.predict_segments = predict
source, model, out = sys.argv[1:]
evaluate(source, Perceiver.from_pretrained(model), GraphConfig(confidence=0.78), out=out, progress=False,
         thresholds=(0.2, 0.8, 0.9), threshold_scenes=4, worst=3)
"""


def test_killed_by_sigkill_and_started_again_with_the_metric_itself(rows, model, predicted, tmp_path):
    run(rows, model, tmp_path / "whole.json", workers=2)
    model.save_pretrained(tmp_path / "model")
    out = tmp_path / "s.json"
    command = [sys.executable, "-c", KILLED, rows, tmp_path / "model", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        assert process.stdout.readline() == b"waiting\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert not out.exists()
    stands = len((tmp_path / "s.json.partial").read_text().splitlines()) - 1
    assert stands == 5
    del predicted[:]
    result = run(rows, Perceiver.from_pretrained(tmp_path / "model"), out)
    assert predicted == ids(range(12))[5:]
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert all(outcome.failure is None for outcome in result.outcomes)


def global_states():
    numbers = np.random.get_state()
    return random.getstate(), numbers[1].tolist(), numbers[2:], torch.get_rng_state().tolist()


def test_no_global_random_generator_is_touched(rows, model, quick_score, tmp_path):
    before = global_states()
    run(rows, model, tmp_path / "s.json", sheet=tmp_path / "s.png", workers=2)
    assert global_states() == before


def test_a_model_in_training_mode_is_scored_without_dropout_and_trains_on(rows, quick_score):
    model = make_model()
    expected = run(rows, model, None)
    model.train()
    model.segmenter.conf_head.eval()
    modes = [module.training for module in model.modules()]
    assert run(rows, model, None) == expected
    assert [module.training for module in model.modules()] == modes and modes.count(False) == 1
    model.tokenizer.features = None
    with pytest.raises(TypeError):
        run(rows, model, None)
    assert [module.training for module in model.modules()] == modes


def test_the_bar_does_not_change_the_result(rows, model, quick_score, tmp_path, capsys):
    run(rows, model, tmp_path / "a", split="dev-val", dev_val=7)
    assert capsys.readouterr().err == ""
    run(rows, model, tmp_path / "b", split="dev-val", dev_val=7, progress=True)
    assert "7/7" in capsys.readouterr().err
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_to_score_leaves_no_file(rows, model, quick_score, tmp_path):
    sample = without_truth(sample_points(fuse_views(random_scene(0), 50), 64))
    write_parquet([write_sample(sample)], tmp_path / "a.parquet")
    with pytest.raises(ScoreError, match="no ground truth"):
        run(tmp_path / "a.parquet", model, tmp_path / "s.json", sheet=tmp_path / "s.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_wrong_requests_are_refused_before_anything_is_read(model, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="probability"):
        run("nowhere", model, None, thresholds=(0.5, 1.5))
    with pytest.raises(OSError):
        run("nowhere", model, tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="matplotlib"):
        run("nowhere", model, None, sheet=tmp_path / "s.png")


def test_a_full_disk_is_one_line_that_names_the_file_and_the_rest_can_be_done_later(
    rows, model, quick_score, tmp_path
):
    out = tmp_path / "s.json"
    run(rows, model, tmp_path / "whole.json")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(OSError) as caught:
            run(rows, model, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == f"{out}.partial" and not out.exists()
    run(rows, model, out)
    assert out.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_the_file_of_scenes_reads_back_every_bit(tmp_path, rows, model, quick_score):
    about, path = {"model": "m"}, tmp_path / "p"
    scored = scene_scores.score_scenes(
        scene_source.SceneSource(rows, 64), scene_scores.by_model(model, GraphConfig(confidence=CONFIDENCE)),
        (0.2,), None, PartialScores(None, {}), progress=False,
    ).scenes  # fmt: skip
    with PartialScores(path, about) as partial:
        for scene in scored:
            partial.add(scene)
    with PartialScores(path, about) as partial:
        assert list(partial.scenes) == [scene.index for scene in scored]
        for scene, back in zip(scored, partial.scenes.values()):
            assert back[:3] == scene[:3] and back.at == scene.at
            assert back.predicted.vertices.tobytes() == scene.predicted.vertices.tobytes()
            assert back.predicted.edges.tobytes() == scene.predicted.edges.tobytes()


@pytest.mark.gpu
def test_a_model_on_a_gpu_is_scored_there(rows, model, tmp_path):
    on_gpu = make_model().cuda()
    before = torch.cuda.get_rng_state().tolist()
    started = time.perf_counter()
    result = run(rows, on_gpu, tmp_path / "s.json", sheet=tmp_path / "s.png")
    assert torch.cuda.get_rng_state().tolist() == before
    assert result.order_ids == ids(range(12)) and time.perf_counter() - started < 300
    assert run(rows, on_gpu, None).outcomes == result.outcomes
    evaluate(rows, model, limit=1, out=tmp_path / "cpu.json", progress=False)
    scores = [json.loads((tmp_path / name).read_text()) for name in ("s.json", "cpu.json")]
    assert scores[0]["model"] == scores[1]["model"] and scores[0]["software"] != scores[1]["software"]
