"""``python -m wireframe.bench.choices``: a run that was stopped is gone on with."""

import argparse
from pathlib import Path

from wireframe.bench import choices
from wireframe.train.config import load_config


def test_a_run_stopped_after_a_stage_is_gone_on_with(tmp_path, monkeypatch):
    config = load_config("smoke")
    arguments = argparse.Namespace(
        what="precision", config="smoke", data=["rows"], out=tmp_path, init=None, jobs=1, threads=1, device="cpu",
        seeds=[353], set=[],
    )  # fmt: skip
    started = []
    monkeypatch.setattr(choices.subprocess, "run", lambda command, **_: started.append(Path(command[-1])))
    finished, stopped = (choices.run_folder(tmp_path, "precision", name, 353) for name in choices.CHOICES["precision"])
    for index in range(len(config.stages)):
        choices.stage_folder(finished, config, index).mkdir(parents=True)
    # Every stage leaves a model; only the last one's ends the run.
    (stopped / "model").mkdir(parents=True)
    choices.stage_folder(stopped, config, 0).mkdir(parents=True)
    choices.train_all(arguments, config)
    assert started == [stopped]
