"""What happens when a stage is done: its model is written out, the held-out rows are scored, the report is drawn."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from wireframe.checkpoint import fit_state
from wireframe.errors import WireframeError, one_line
from wireframe.evaluate import evaluate, scored_with
from wireframe.perceiver import Perceiver
from wireframe.pretrained import save_graph
from wireframe.score_files import format_summary
from wireframe.scoring import summarise
from wireframe.scoring_pool import usable_cores
from wireframe.train import checkpoints
from wireframe.train.stopping import Stopped

if TYPE_CHECKING:
    from wireframe.train.loop import Run

_LOGGED = ("scenes", "hss", "f1", "iou")
_MAX_SCORES_BYTES = 64 << 20
# What may pass: a file system that does not answer for a moment, memory that others take.
_NO_REASON_TO_END = (WireframeError, OSError, MemoryError, torch.OutOfMemoryError)


def finish_stage(run: Run, index: int) -> None:
    """Exports, scores and reports stage ``index``, whose last step the model has just finished.

    Scores that are there stay where they are of this model, graph, thresholds and software. A failure to score is
    logged and ends nothing; earlier stages without scores are made up for from their last checkpoints. What later
    stages had left is removed: it belongs to weights that come again only from here.

    Every process comes here; the first one works, and a signal breaks it off with ``Stopped``: the run then goes on
    here, and scenes that were scored are not scored again.
    """
    if run.ranks.is_first:
        end = run.config.stage_start(index + 1)
        saved = f"step {end} is saved in {checkpoints.folder(run.out, end)}"
        line = f"stopped while stage {_name(run, index)} was scored ({saved}); the same command goes on from there"
        with run.request.raising(line):
            _finish(run, index, end)
    try:
        run.ranks.wait()
    except RuntimeError:
        # The first process ended while this one waited for it.
        if run.request.asked:
            raise Stopped("stopped while the first rank scored a stage; the same command goes on from there") from None
        raise


def _name(run: Run, index: int) -> str:
    return f"{index + 1}-{run.config.stages[index].name}"


def _finish(run: Run, index: int, end: int) -> None:
    for later in range(index + 1, len(run.config.stages)):
        _drop(run, _name(run, later))
    stage = run.out / "stages" / _name(run, index)
    checkpoints.export(run.model, stage, run.config, end)
    # What a kill had left: this process alone writes here.
    for stray in run.out.glob(".model.*.tmp"):
        shutil.rmtree(stray, ignore_errors=True)
    run.model.save_pretrained(run.out / "model")
    for folder in (stage, run.out / "model"):
        save_graph(run.config.graph, folder)
    if run.evaluate and run.config.dev_val:
        scored = _score(run, index, run.model)
        for earlier in range(index):
            if scored and not _scores_of(run, earlier).exists():
                scored = _score_checkpoint(run, earlier)
    try:
        from wireframe.train.report import write_report

        write_report(run.out)
    except Exception as problem:
        # A picture of the run is no reason to end it.
        print(f"no report: {one_line(problem)}; `wireframe report {run.out}` tries again", file=sys.stderr)


def _drop(run: Run, name: str) -> None:
    shutil.rmtree(run.out / "stages" / name, ignore_errors=True)
    for kind in ("json", "json.partial", "png"):
        with contextlib.suppress(OSError):
            (run.out / "evaluation" / f"{name}.{kind}").unlink()


def _scores_of(run: Run, index: int) -> Path:
    return run.out / "evaluation" / f"{_name(run, index)}.json"


def _score_checkpoint(run: Run, index: int) -> bool:
    """Like ``_score``, with the weights at the end of a stage that was left unscored, where they were kept."""
    path = checkpoints.folder(run.out, run.config.stage_start(index + 1))
    if not path.is_dir():
        return True
    try:
        weights = checkpoints.read(path).tensors["model"]
        model = Perceiver(run.config.model).to(run.ranks.device)
        model.load_state_dict(fit_state(weights, model.state_dict(), f"checkpoint {path}"))
    except _NO_REASON_TO_END as problem:
        return _not_scored(run, index, problem)
    return _score(run, index, model)


def _score(run: Run, index: int, model: Perceiver) -> bool:
    """Scores the held-out rows, unless such scores are there; says and logs it. False: it could not be done."""
    config, scores = run.config.evaluation, _scores_of(run, index)
    how = {"split": "dev-val", "dev_val": run.config.dev_val}
    how |= {"thresholds": config.thresholds, "threshold_scenes": config.threshold_scenes}
    try:
        source = run.set_of(run.config.stages[index]).source
        if not source:
            return True
        summary = _kept(scores, scored_with(source, model, run.config.graph, **how))
        if summary is None:
            # Scores of other weights must not stand there if these fail.
            scores.unlink(missing_ok=True)
            result = evaluate(
                source, model, run.config.graph, **how, workers=usable_cores(), out=scores, progress=run.progress,
                sheet=scores.with_suffix(".png"), worst=config.worst, whole=True,
            )  # fmt: skip
            print(f"stage {scores.stem}: {format_summary(result)}")
            summary = summarise(result.outcomes)
    except _NO_REASON_TO_END as problem:
        return _not_scored(run, index, problem)
    _log_once(run, run.config.stage_start(index + 1), {name: summary[name] for name in _LOGGED})
    return True


def _not_scored(run: Run, index: int, problem: BaseException) -> bool:
    reason = one_line(problem)
    print(
        f"stage {_name(run, index)} is not scored: {reason}; the next stage's end, or the same command, tries again",
        file=sys.stderr,
    )
    run.log.event(run.config.stage_start(index + 1), "not scored", reason=reason)
    return False


def _kept(scores: Path, about: dict) -> dict | None:
    """The mean scores of the file where it holds scores of what ``about`` says; None to score (again)."""
    try:
        if scores.stat().st_size > _MAX_SCORES_BYTES:
            return None
        content = json.loads(scores.read_bytes())
        if any(content[name] != value for name, value in about.items()):
            return None
        summary = content["summary"]
        return summary if all(math.isfinite(summary[name]) for name in _LOGGED) else None
    except (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError):
        return None


def _log_once(run: Run, step: int, fields: dict) -> None:
    """Logs the event "scored", unless it stands in the log, which a resumed run cuts behind its step."""
    wanted = {"step": step, "event": "scored", **fields}
    with contextlib.suppress(OSError), open(run.out / "log.jsonl", "rb") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                if b'"scored"' in line and json.loads(line) == wanted:
                    return
    run.log.event(step, "scored", **fields)
