"""The end of a stage: broken off by a signal, scored anew where the scores are of something else, or not at all."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from hash_pool import HashPool
from scenes import random_scene
from wireframe import scene_scores, scene_source
from wireframe.assets import MODEL
from wireframe.errors import ConfigError, ShardError
from wireframe.fusion import fuse_views
from wireframe.perceiver import Perceiver
from wireframe.pretrained import graph_settings, read_graph
from wireframe.samples import write_parquet, write_sample
from wireframe.sampling import sample_points
from wireframe.train import report, stage_end
from wireframe.train.config import BASE_CONFIG, load_config, parse_config
from wireframe.train.loop import train
from wireframe.train.stopping import Stopped

pytest.importorskip("hoho2025")

SETTINGS = {
    "model": {
        "hidden": 32, "ff": 48, "latent_tokens": 8, "latent_layers": 2, "decoder_layers": 1, "num_heads": 2,
        "kv_heads_cross": 1, "kv_heads_self": 1, "segments": 8,
    },
    "stages": [
        {"name": "a", "points": 32, "steps": 2, "batch_size": 2, "lr": 1e-3},
        {"name": "b", "points": 32, "steps": 2, "batch_size": 2, "lr": 1e-3},
    ],
    "save_every": 1, "log_every": 1, "dev_val": 3, "graph": {"confidence": 0.05, "snap_min_points": 3},
    "evaluation": {"thresholds": [0.0], "threshold_scenes": 2, "worst": 1},
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(scene_scores, "ScorePool", HashPool)
    monkeypatch.setattr(stage_end, "usable_cores", lambda: 1)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    made = [write_sample(sample_points(fuse_views(random_scene(i), 50), 32)) for i in range(7)]
    write_parquet(made, folder / "train-0.parquet")
    return folder


def go(rows, out, **how):
    return train(parse_config(SETTINGS), [rows], out, device="cpu", progress=False, **how)


def go_again(rows, out):
    """From before the end of the last stage, which comes out the same."""
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    go(rows, out)


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scene_scores, "ScorePool", HashPool)
        patch.setattr(stage_end, "usable_cores", lambda: 1)
        go(rows, out)
    return out


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def predicted(monkeypatch):
    calls, original = [], scene_scores.predict_segments
    monkeypatch.setattr(scene_scores, "predict_segments", lambda *given: calls.append(1) or original(*given))
    return calls


def scores(out):
    """By name, all files of an evaluation."""
    return {path.name: path.read_bytes() for path in (out / "evaluation").iterdir()}


def events(out, name):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("event") == name]


def send_term():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_while_a_sample_is_read_is_no_score(rows, finished, tmp_path, monkeypatch, workers):
    read, original = [], scene_source.read_sample

    def signalled(row):
        read.append(row)
        if len(read) == 2:
            send_term()
        return original(row)

    with monkeypatch.context() as patch:
        patch.setattr(stage_end, "usable_cores", lambda: workers)
        patch.setattr(scene_source, "read_sample", signalled)
        with pytest.raises(Stopped) as stopped:
            go(rows, tmp_path)
    saved = tmp_path / "checkpoints" / "step-00000002"
    assert str(stopped.value) == (
        f"stopped while stage 1-a was scored (step 2 is saved in {saved}); the same command goes on from there"
    )
    assert stopped.value.exit_status == 4 and saved.is_dir()
    assert scores(tmp_path).keys() <= {"1-a.json.partial"} and not events(tmp_path, "scored")
    go(rows, tmp_path)
    assert scores(tmp_path) == scores(finished) and events(tmp_path, "scored") == events(finished, "scored")


def test_a_signal_while_the_report_is_written_stops_the_run(rows, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_report", lambda out: send_term())
        with pytest.raises(Stopped, match="stage 1-a"):
            go(rows, tmp_path)
    go(rows, tmp_path)
    assert (tmp_path / "report.html").exists() and len(events(tmp_path, "scored")) == 2


def test_a_report_that_fails_ends_nothing(rows, tmp_path, monkeypatch, capsys):
    def fail(out):
        raise RuntimeError("no ink")

    monkeypatch.setattr(report, "write_report", fail)
    go(rows, tmp_path, evaluate=False)
    assert capsys.readouterr().err.count("no report: no ink") == 2


def test_scores_of_this_model_stay_and_stand_in_the_log_once(rows, finished, run, predicted):
    go(rows, run)
    assert events(run, "scored") == events(finished, "scored")
    # The log is cut behind the checkpoint.
    go_again(rows, run)
    assert scores(run) == scores(finished) and not predicted
    assert events(run, "scored") == events(finished, "scored")


@pytest.mark.parametrize(
    "name, value",
    [
        ("model", "0" * 64), ("graph", {}), ("thresholds", [0.5]), ("threshold_scenes", 1), ("software", {}),
        ("source", {}), ("summary", {"hss": 1.0}), ("summary", None),
    ],
)  # fmt: skip
def test_scores_of_something_else_are_made_anew(rows, finished, run, predicted, name, value):
    path = run / "evaluation" / "2-b.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    go_again(rows, run)
    assert scores(run) == scores(finished) and len(predicted) == 3


@pytest.mark.parametrize("content", [b"", b"[", b"[" * 100_000, b"null", b"[]", b"\xff"])
def test_a_damaged_file_of_scores_is_written_anew(rows, finished, run, content):
    (run / "evaluation" / "2-b.json").write_bytes(content)
    go_again(rows, run)
    assert scores(run) == scores(finished)


def test_what_later_stages_had_left_goes(rows, run):
    for step in (3, 4):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}", ignore_errors=True)
    (run / "evaluation" / "2-b.json.partial").touch()
    go(rows, run, stop_after=2)
    assert set(scores(run)) == {"1-a.json", "1-a.png"}
    assert [path.name for path in (run / "stages").iterdir()] == ["1-a"]


@pytest.mark.parametrize("fault", [OSError(116, "Stale file handle"), ShardError("torn"), torch.OutOfMemoryError("o")])
def test_a_failure_to_score_ends_nothing_and_is_made_up_for(
    rows, finished, tmp_path, monkeypatch, capsys, fault
):
    left, original = [fault], stage_end.evaluate

    def fail_once(*given, **how):
        if left:
            raise left.pop()
        return original(*given, **how)

    monkeypatch.setattr(stage_end, "evaluate", fail_once)
    go(rows, tmp_path)
    assert scores(tmp_path) == scores(finished)
    (event,) = events(tmp_path, "not scored")
    assert event["step"] == 2 and str(fault) in event["reason"]
    said = [line for line in capsys.readouterr().err.splitlines() if "not scored" in line]
    assert len(said) == 1 and said[0].startswith(f"stage 1-a is not scored: {fault}")
    assert sorted(line["step"] for line in events(tmp_path, "scored")) == [2, 4]


def test_scores_of_other_weights_do_not_stay_where_new_ones_fail(rows, run, monkeypatch):
    def fail(*given, **how):
        raise OSError(28, "No space left on device")

    path = run / "evaluation" / "2-b.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model": "0" * 64}))
    monkeypatch.setattr(stage_end, "evaluate", fail)
    go_again(rows, run)
    assert not path.exists() and events(run, "not scored")[0]["step"] == 4


def test_a_source_that_breaks_off_leaves_its_part_and_no_scores(rows, finished, tmp_path, monkeypatch):
    original = scene_source.iter_split_rows

    def torn(*given):
        for at, row in enumerate(original(*given)):
            if at == 2:
                raise ShardError("train-0.parquet is truncated")
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(scene_scores, "_AWAITED_PER_WORKER", 0)
        patch.setattr(scene_source, "iter_split_rows", torn)
        go(rows, tmp_path)
    assert set(scores(tmp_path)) == {"1-a.json.partial", "2-b.json.partial"}
    assert len(scores(tmp_path)["2-b.json.partial"].splitlines()) == 1 + 2
    assert [event["reason"] for event in events(tmp_path, "not scored")] == ["train-0.parquet is truncated"] * 2
    go_again(rows, tmp_path)
    assert scores(tmp_path) == scores(finished)


def test_stages_left_unscored_are_scored_by_the_same_command_later(rows, finished, tmp_path):
    go(rows, tmp_path, evaluate=False)
    assert not (tmp_path / "evaluation").exists()
    go_again(rows, tmp_path)
    assert scores(tmp_path) == scores(finished)
    # Where the checkpoint is gone, nothing is said to be the stage's scores.
    (tmp_path / "evaluation" / "1-a.json").unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000002")
    go_again(rows, tmp_path)
    assert "1-a.json" not in scores(tmp_path)


def test_the_graph_of_a_trained_model_is_its_own(finished, tmp_path):
    wanted = parse_config(SETTINGS).graph
    for folder in (finished / "model", finished / "stages" / "1-a", finished / "stages" / "2-b"):
        assert graph_settings(folder) == wanted
        Perceiver.from_pretrained(folder)
    assert graph_settings(finished / "stages" / "1-a" / "checkpoint.pt") == wanted
    changed = graph_settings(finished / "model", threshold=0.25)
    assert changed.confidence == 0.25 and changed.snap_min_points == 3
    assert graph_settings(finished / "model", config="small") == load_config("small").graph
    other = shutil.copytree(finished / "model", tmp_path / "model")
    (other / "graph.json").unlink()
    assert graph_settings(other) == load_config(BASE_CONFIG).graph != wanted
    assert graph_settings(None) == read_graph(MODEL) != load_config(BASE_CONFIG).graph


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"null", b"[" * 100_000, b"\xff", b'{"confidence": 2}', b'{"confidence": NaN}', b'{"x": 1}',
        b'{"snap_classes": [[]]}', b'{"merge_thresholds": [1e999]}', b'{"snap_radius": "1"}', b" " * (1 << 20) + b"{}",
    ],
)  # fmt: skip
def test_a_graph_that_is_nonsense_is_one_clear_line(finished, tmp_path, content):
    model = shutil.copytree(finished / "model", tmp_path / "model")
    (model / "graph.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"graph\.json cannot be used: .*--config") as problem:
        graph_settings(model)
    assert "\n" not in str(problem.value) and len(str(problem.value)) < 700
    assert graph_settings(model, config="small") == load_config("small").graph


@pytest.mark.parametrize("put", [lambda path: path.mkdir(), lambda path: path.symlink_to("nowhere"), os.mkfifo])
def test_a_graph_that_is_no_file_is_not_waited_for(finished, tmp_path, put):
    model = shutil.copytree(finished / "model", tmp_path / "model")
    (model / "graph.json").unlink()
    put(model / "graph.json")
    with pytest.raises(ConfigError, match="regular file"):
        graph_settings(model)


def test_a_last_stage_left_unscored_is_scored_by_the_same_command(rows, finished, tmp_path):
    go(rows, tmp_path, evaluate=False)
    go(rows, tmp_path)
    assert scores(tmp_path) == scores(finished)
