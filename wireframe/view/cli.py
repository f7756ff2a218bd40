"""The command ``wireframe view``: its arguments, and what it calls."""

from __future__ import annotations

import argparse
import os

from wireframe import sharing
from wireframe.arguments import add_workers, model_arguments, path, positive, share_cores, split_arguments
from wireframe.errors import print_failures
from wireframe.model_cli import broke_off, refuse_with_predictions


def view_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="raw tars, or sampled Parquet shards (which have no cameras)")
    command.add_argument("out", type=path, help="HTML file, which needs nothing beside it")
    model_arguments(command)
    command.add_argument("--pred", type=path, help="show the predictions in this JSON file instead of a model's")
    command.add_argument("--points", type=positive, default=4096, help="at most so many points a scene (default 4096)")
    split_arguments(command)
    command.add_argument("--worst", type=positive, help="only so many scenes, those of the lowest scores")
    add_workers(command, "threads that read ahead, and processes that score")


def view(arguments: argparse.Namespace) -> int:
    if arguments.pred:
        refuse_with_predictions(arguments)
    share_cores(arguments)
    from wireframe.view.write import view_model, view_submission

    names = ("points", "split", "dev_val", "limit", "worst", "workers")
    options = {name: getattr(arguments, name) for name in names} | {"progress": not arguments.quiet}
    if arguments.pred:
        from wireframe.submissions import read_submission

        predictions, options["label"] = read_submission(arguments.pred), f"predictions of {arguments.pred.name}"
        found = view_submission(arguments.source, arguments.out, predictions, **options)
    else:
        from wireframe.pretrained import load_model

        model = load_model(arguments.model, arguments.config, arguments.threshold)
        options["label"] = f"predicted by {os.path.basename(os.path.abspath(arguments.model or 'the shipped model'))}"
        found = view_model(arguments.source, arguments.out, *model, **options)
    scored = f"mean HSS {found.hss:.3f}" if found.hss is not None else found.unscored
    those = f"the {found.scenes} worst of {found.read}" if found.scenes < found.read else found.scenes
    print(f"{those} scenes, {scored}: {arguments.out} ({found.size / 1e6:.1f} MB)")
    sharing.warn(arguments.out, found.guarded)
    print_failures("not shown:", found.failures)
    return 1 if broke_off(found.failures, arguments.source) else 0
