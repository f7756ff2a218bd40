"""What happens when a stage is done: its model is written out, the held-out rows are scored, the report is drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wireframe.errors import MissingPackageError, one_line
from wireframe.evaluate import evaluate, format_summary
from wireframe.scoring import summarise
from wireframe.scoring_pool import usable_cores
from wireframe.train import checkpoints

if TYPE_CHECKING:
    from wireframe.train.loop import Run


def finish_stage(run: Run, index: int) -> None:
    """Exports, scores and reports stage ``index``, whose last step the model has just finished; what is there stays.

    Every process comes here; the first one works, and a signal breaks it off with ``Stopped``: the run then goes on
    here, and scenes that were scored are not scored again.
    """
    if run.ranks.is_first:
        with run.request.raising():
            _finish(run, index)
    run.ranks.wait()


def _finish(run: Run, index: int) -> None:
    stage, name = run.config.stages[index], f"{index + 1}-{run.config.stages[index].name}"
    end = run.config.stage_start(index + 1)
    checkpoints.export(run.model, run.out / "stages" / name, run.config, end)
    run.model.save_pretrained(run.out / "model")
    scores = run.out / "evaluation" / f"{name}.json"
    if run.evaluate and run.config.dev_val and not scores.exists():
        source = run.set_of(stage).source
        if source:
            _score(run, source, scores, end)
    try:
        from wireframe.train.report import write_report

        write_report(run.out)
    except Exception as problem:
        # A picture of the run is no reason to end it.
        print(f"no report: {one_line(problem)}; `wireframe report {run.out}` tries again", file=sys.stderr)


def _score(run: Run, source: str, scores: Path, step: int) -> None:
    config = run.config.evaluation
    run.model.eval()
    try:
        result = evaluate(
            source,
            run.model,
            run.config.graph,
            split="dev-val",
            dev_val=run.config.dev_val,
            workers=usable_cores(),
            out=scores,
            progress=run.progress,
            thresholds=config.thresholds,
            threshold_scenes=config.threshold_scenes,
            sheet=scores.with_suffix(".png"),
            worst=config.worst,
        )
    except MissingPackageError as problem:
        print(f"the stage is not scored: {problem}", file=sys.stderr)
        return
    finally:
        run.model.train()
    print(f"stage {scores.stem}: {format_summary(result)}")
    summary = summarise(result.outcomes)
    run.log.event(step, "scored", **{name: summary[name] for name in ("scenes", "hss", "f1", "iou")})
