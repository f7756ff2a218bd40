"""Our model beside its rivals on raw scenes: every scene predicted by every method, scored, and put into tables."""

from __future__ import annotations

import functools
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from wireframe.files import atomic_write
from wireframe.fusion import fuse_views
from wireframe.graph import Wireframe, empty_wireframe
from wireframe.isolated import map_isolated
from wireframe.raw_rows import build_row
from wireframe.sampling import SampledScene, sample_points
from wireframe.scene import read_scene
from wireframe.score_files import compare, group_means
from wireframe.scoring import Outcome, Score, score_many, summarise
from wireframe.shards import RawSample, iter_samples

if TYPE_CHECKING:
    from wireframe.synth import SynthConfig

METHODS = {
    "ours": "ours",
    "handcrafted": "handcrafted (hoho2025)",
    "nearest": "nearest training wireframe",
    "mean": "mean training wireframe",
    "untrained": "ours, untrained weights",
}


class ComparedScene(NamedTuple):
    """One scene's truth, points, and a wireframe with its seconds for each method."""

    order_id: str
    points: np.ndarray
    class_id: np.ndarray
    truth: Wireframe
    predicted: dict[str, Wireframe]
    seconds: dict[str, float]


class Comparison(NamedTuple):
    """scenes, and by method the outcome of each."""

    scenes: list[ComparedScene]
    outcomes: dict[str, list[Outcome]]

    def scores(self, method: str) -> dict[str, Score]:
        return {scene.order_id: found.score for scene, found in zip(self.scenes, self.outcomes[method])}


def compare_methods(
    tars: Iterable[str | os.PathLike], model: str | os.PathLike, *, workers: int = 1, total: int | None = None,
    progress: bool = True,
) -> Comparison:  # fmt: skip
    """Predicts and scores the raw scenes of some tars by every one of ``METHODS``.

    Seconds count from the raw bytes to the wireframe, on one thread. Neither predictions nor scores depend on
    ``workers``. A scene on which the handcrafted rival kills its process is a scene without an answer of the rival.

    Args:
        model: folder of a model as ``wireframe.train.export`` writes it, with what its dummies know.

    Raises:
        MissingPackageError: hoho2025 is not installed. ShardError, SceneError: a tar or a scene cannot be read.
    """
    from tqdm import tqdm

    scenes = []
    with tqdm(total=total, disable=not progress, desc="predict", unit="scene") as bar:
        samples = (sample for tar in tars for sample in iter_samples(tar))
        # One thread each: predictions and timings then do not depend on the number of workers.
        kinds = (_predict, functools.partial(_predict, rival=False))
        for scene in map_isolated(kinds, samples, workers, _begin, (os.fspath(model),)):
            scenes.append(scene)
            bar.update(1)
    with tqdm(total=len(scenes) * len(METHODS), disable=not progress, desc="score", unit="scene") as bar:
        pairs = [(scene.predicted[method], scene.truth) for method in METHODS for scene in scenes]
        flat = score_many(pairs, workers=workers, progress=lambda done, _: bar.update(done - bar.n))
    rows = range(0, len(flat), max(len(scenes), 1))
    return Comparison(scenes, {method: flat[row : row + len(scenes)] for method, row in zip(METHODS, rows)})


def compare_on_made_scenes(
    out: Path, seed: int, count: int, config: SynthConfig, model: str | os.PathLike, *, workers: int = 1,
    progress: bool = True,
) -> Comparison:  # fmt: skip
    """``compare_methods`` on synthetic scenes: writes ``scenes/*.tar`` and ``results.json`` into ``out``.

    Finished tars in it are used again.
    """
    from wireframe.synth import write_shards

    tars = write_shards(out / "scenes", seed, 0, count, config, shard_size=50, workers=workers, progress=progress)
    found = compare_methods(tars, model, workers=workers, total=count, progress=progress)
    with atomic_write(out / "results.json") as file:
        file.write(json.dumps({"seed": seed, **as_json(found)}, indent=1).encode())
    return found


def format_table(found: Comparison) -> str:
    """HSS with its bootstrap interval, F1, IoU and seconds a scene, one method a line (Markdown)."""
    lines = ["| method | HSS | 95 % interval | F1 | IoU | s / scene |", "|---|---|---|---|---|---|"]
    for method, title in METHODS.items():
        s = summarise(found.outcomes[method])
        seconds = np.nanmedian([scene.seconds[method] for scene in found.scenes])
        lines.append(
            f"| {title} | {s['hss']:.3f} | {s['hss_low']:.3f}-{s['hss_high']:.3f} | {s['f1']:.3f} | {s['iou']:.3f} "
            f"| {seconds:.2f} |"
        )
        lines += [f"| | scored 0: {count} x {reason} | | | | |" for reason, count in s["failures"].items()]
    return "\n".join(lines)


def format_groups(found: Comparison, groups: Mapping[str, str], heading: str, methods: Sequence[str]) -> str:
    """Mean HSS by group of scenes, one group a line (Markdown); ``groups``: order_id -> group."""
    means = {method: group_means(found.scores(method), groups) for method in methods}
    lines = [f"| {heading} | scenes | {' | '.join(METHODS[m] for m in methods)} |", "|---" * (2 + len(methods)) + "|"]
    for group, (count, _) in means[methods[0]].items():
        lines.append(f"| {group} | {count} | {' | '.join(f'{means[m][group][1].hss:.3f}' for m in methods)} |")
    return "\n".join(lines)


def against(found: Comparison, method: str = "handcrafted") -> str:
    """Our scores less those of a rival, paired by scene, in words."""
    return compare(found.scores("ours"), found.scores(method))


def as_json(found: Comparison) -> dict:
    """Plain values: the summary of every method, the scores and seconds of every scene."""
    scenes = []
    for k, scene in enumerate(found.scenes):
        methods = {}
        for method in METHODS:
            outcome, seconds = found.outcomes[method][k], scene.seconds[method]
            seconds = None if math.isnan(seconds) else seconds
            methods[method] = {**outcome.score._asdict(), "failure": outcome.failure, "seconds": seconds}
        scenes.append({"order_id": scene.order_id, "edges": len(scene.truth.edges), "methods": methods})
    return {"summary": {method: summarise(found.outcomes[method]) for method in METHODS}, "scenes": scenes}


class _Loaded(NamedTuple):
    num_points: int
    by_points: dict[str, Callable[[SampledScene], Wireframe]]
    handcrafted: Callable[[dict], Wireframe]


_loaded: _Loaded | None = None


def _begin(folder: str) -> None:
    """Models and dummies, loaded once in each process, so that no scene pays for it."""
    import hoho2025.example_solutions  # noqa: F401
    import torch

    from wireframe.assets import DUMMIES
    from wireframe.perceiver import Perceiver
    from wireframe.predict import predict_segments, wireframe_of
    from wireframe.pretrained import load_model
    from wireframe.rivals import handcrafted, load_dummies

    global _loaded
    # Ctrl-C is for the parent, which ends its processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    model, graph = load_model(folder)
    untrained = Perceiver(model.config).eval()
    dummies = load_dummies(Path(folder) / DUMMIES)

    def by_model(weights: Perceiver) -> Callable[[SampledScene], Wireframe]:
        return lambda scene: wireframe_of(predict_segments(scene, weights), scene, graph=graph)

    by_points = {"ours": by_model(model), "untrained": by_model(untrained)}
    by_points |= {"mean": dummies.mean.predict, "nearest": dummies.nearest.predict}
    _loaded = _Loaded(model.config.num_points, by_points, handcrafted)


def _predict(sample: RawSample, rival: bool = True) -> ComparedScene:
    """All methods on one raw sample."""
    predicted, seconds = {"handcrafted": empty_wireframe()}, {"handcrafted": math.nan}
    start = time.perf_counter()
    row = build_row(sample.key, sample.members)
    scene = read_scene(row)
    sampled = sample_points(fuse_views(scene), _loaded.num_points)
    shared = time.perf_counter() - start
    for name, predict in _loaded.by_points.items():
        start = time.perf_counter()
        predicted[name] = predict(sampled)
        seconds[name] = shared + time.perf_counter() - start
    if rival:
        start = time.perf_counter()
        predicted["handcrafted"] = _loaded.handcrafted(build_row(sample.key, sample.members))
        seconds["handcrafted"] = time.perf_counter() - start
    points, class_id = sampled.world_points()
    return ComparedScene(scene.order_id, points, class_id, Wireframe(scene.vertices, scene.edges), predicted, seconds)
