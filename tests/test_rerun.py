import json
import shlex
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_cases import SMALL_MODEL, STAGES, advance, small_run

from wireframe import cli
from wireframe.errors import ConfigError, WireframeError
from wireframe.samples import iter_sample_rows
from wireframe.train import checkpoints
from wireframe.train import rerun as module
from wireframe.train.config import load_config
from wireframe.train.rerun import format_rerun, rerun, train_command


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.json"
    # The made rows have up to 20 edges.
    path.write_text(json.dumps({"model": {**SMALL_MODEL, "segments": 20}, "stages": STAGES, "dev_val": 1024}))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where temporary folders are made."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def left(place):
    return list(place.glob("wireframe-rerun-*"))


class Pretended:
    """In place of the processes: takes their arguments by the command's own parser and writes what they would."""

    def __init__(self, seeds):
        self.seeds, self.asked = iter(seeds), []

    def __call__(self, command, number):
        assert command[:3] == [sys.executable, "-m", "wireframe"]
        asked = cli._parser().parse_args(command[3:])
        self.asked.append(asked)
        config = load_config(asked.config, asked.set)
        optimizer = small_run(next(self.seeds), segments=20)
        data = {}
        for source in asked.data:
            rows = list(iter_sample_rows(source))
            assert len(rows) == 24
            data[str(Path(source).stem.removeprefix("made-"))] = "ab" * 32
        for step in range(1, config.steps + 1):
            advance(optimizer, step)
            checkpoints.save(asked.out, checkpoints.State(step, 0, None), optimizer, config, data)


def test_two_equal_runs_give_a_fingerprint_with_all_it_depends_on(config, place, monkeypatch):
    runs = Pretended([0, 0])
    monkeypatch.setattr(module, "_run", runs)
    said = []
    overrides = ["seed=5", "stages.1.lr=0.5"]
    result = rerun(config, overrides, 3, device="cpu", threads=2, say=said.append)
    assert result.equal and [stage.name for stage in result.stages] == ["a", "b"]
    assert len(said) == 2 and not left(place)
    for asked in runs.asked:
        settings = load_config(asked.config, asked.set)
        assert [stage.steps for stage in settings.stages] == [3, 3] and settings.dev_val == 0 and settings.seed == 5
        assert asked.no_eval and asked.quiet and (asked.device, asked.threads) == ("cpu", 2)
    assert runs.asked[0].out != runs.asked[1].out and runs.asked[0].data == runs.asked[1].data
    text = format_rerun(result)
    # After step 3 and after step 6.
    optimizer = small_run(0, segments=20)
    for step in range(1, 7):
        advance(optimizer, step)
        if step in (3, 6):
            digest = checkpoints.tensor_sha256(optimizer.model.state_dict())
            assert text.count(digest) == 1 and f"`{digest[:16]}`" in text.splitlines()[-1]
    row = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert row[1] == torch.__version__ and row[3] == str(torch.get_num_threads())
    assert row[4:7] == ["tiny seed=5 stages.1.lr=0.5", "made rows", "3"]
    assert len(row) == text.splitlines()[-2].count("|") - 1 == text.splitlines()[-3].count("|") - 1


def test_runs_that_part_are_shown_and_get_no_fingerprint(config, place, monkeypatch):
    monkeypatch.setattr(module, "_run", Pretended([0, 1]))
    result = rerun(config, [], 1, say=lambda line: None)
    text = format_rerun(result)
    assert not result.equal and "DIFFER" in text and "first: model" in text and "steps a stage" not in text
    assert not left(place)


def test_given_data_are_passed_on_and_named(config, place, tmp_path, monkeypatch):
    paths = module._write_rows(load_config(config), tmp_path)
    runs = Pretended([0, 0])
    monkeypatch.setattr(module, "_run", runs)
    result = rerun(config, ["dev_val=2"], 1, data=paths, say=lambda line: None)
    assert runs.asked[0].data == paths and load_config(config, runs.asked[0].set).dev_val == 2
    assert result.data == f"rows 32: {'ab' * 8}, 64: {'ab' * 8}"


def test_a_process_that_fails_is_one_line_and_nothing_stays(config, place, monkeypatch):
    script = "import sys; print('loading', file=sys.stderr); print('wireframe train: no\\x1b[2J', file=sys.stderr);"
    script += "print('torchrun: a rank failed', file=sys.stderr); sys.exit(5)"
    monkeypatch.setattr(module, "train_command", lambda *_: [sys.executable, "-c", script])
    with pytest.raises(WireframeError, match=r"run 1 ended with status 5: wireframe train: no\\x1b\[2J$"):
        rerun(config, [], 1, say=lambda line: None)
    assert not left(place)
    with pytest.raises(ConfigError, match="unknown key sead"):
        rerun(config, ["sead=1"], 1, say=lambda line: None)


def test_several_ranks_are_started_by_torchrun(config, tmp_path):
    command = train_command(config, ["seed=1"], ["a", "b"], tmp_path, "cuda", None, 4)
    assert " ".join(command[1:7]) == "-m torch.distributed.run --standalone --nproc-per-node 4 -m"
    asked = cli._parser().parse_args(command[8:])
    assert command[7] == "wireframe" and (asked.data, asked.device, asked.set) == (["a", "b"], "cuda", ["seed=1"])


@pytest.mark.slow
def test_the_command_trains_twice_in_fresh_processes_and_agrees_with_this_one(config, place, capfd):
    from wireframe.train.loop import train
    from wireframe.train.made_rows import MadeRows

    threads = torch.get_num_threads()
    arguments = ["verify", "--rerun", str(config), "--steps", "2", "--device", "cpu", "--threads", str(threads)]
    assert cli.main([*arguments, "--set", "save_every=7"]) == 0
    told = capfd.readouterr()
    assert "run 2 of 2" in told.err and not left(place)
    settings = load_config(config, ["stages.0.steps=2", "stages.1.steps=2", "dev_val=0"])
    rows = [MadeRows(points, 24) for points in (32, 64)]
    train(settings, rows, place / "ours", device="cpu", evaluate=False, progress=False)
    for step in (2, 4):
        hashes = checkpoints.tensor_hashes(checkpoints.folder(place / "ours", step))
        assert hashes["model"] in told.out and hashes["optimizer"] in told.out, shlex.join(arguments)
