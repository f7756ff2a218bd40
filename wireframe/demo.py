"""``wireframe demo``: held-out synthetic scenes through the shipped model, its dummies and the handcrafted rival."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wireframe.assets import DEMO_DUMMIES, DEMO_MODEL
from wireframe.errors import WireframeError
from wireframe.files import atomic_write
from wireframe.fusion import fuse_views
from wireframe.graph import GraphConfig, Wireframe
from wireframe.plots import SheetItem, contact_sheet
from wireframe.raw_rows import build_row
from wireframe.sampling import SampledScene, sample_points
from wireframe.scene import read_scene
from wireframe.scoring import Outcome, require_hoho, score_many, summarise
from wireframe.shards import RawSample, iter_samples

# The demo model was trained with seed 1; no scene of this seed was seen in training or tuning.
HELD_OUT_SEED = 20260520
SHEET_SCENES = 8
# As many COLMAP points as the demo model was trained with, so that it sees clouds of the kind it knows.
COLMAP_POINTS = 8000

METHODS = {
    "ours": "ours (shipped model)",
    "handcrafted": "handcrafted (hoho2025)",
    "nearest": "nearest training wireframe",
    "mean": "mean training wireframe",
    "untrained": "ours, untrained weights",
}


class DemoScene(NamedTuple):
    """One scene's truth, points, and a wireframe with its seconds for each method."""

    order_id: str
    points: np.ndarray
    class_id: np.ndarray
    truth: Wireframe
    predicted: dict[str, Wireframe]
    seconds: dict[str, float]


def run_demo(out: str | os.PathLike, scenes: int, *, workers: int = 1, progress: bool = True) -> str:
    """Makes, predicts, scores and draws held-out scenes.

    Writes ``scenes/*.tar``, ``results.json`` and ``contact_sheet.png`` into ``out``.

    Args:
        out: folder; finished tars in it are used again.
        scenes: how many scenes.
        workers: processes.
        progress: whether to show progress bars on stderr.

    Returns:
        The table, as text.

    Raises:
        MissingPackageError: hoho2025 is not installed.
    """
    from tqdm import tqdm

    from wireframe.synth import SynthConfig, write_shards

    require_hoho()
    out = Path(out)
    tars = write_shards(
        out / "scenes", HELD_OUT_SEED, 0, scenes, SynthConfig(colmap_points=COLMAP_POINTS),
        shard_size=50, workers=workers, progress=progress,
    )  # fmt: skip
    with tqdm(total=scenes, disable=not progress, desc="predict", unit="scene") as bar:
        found = list(_predict_all(tars, workers, bar.update))
    outcomes = {}
    with tqdm(total=scenes * len(METHODS), disable=not progress, desc="score", unit="scene") as bar:
        pairs = [(scene.predicted[method], scene.truth) for method in METHODS for scene in found]
        flat = score_many(pairs, workers=workers, progress=lambda done, _: bar.update(done - bar.n))
    for row, method in enumerate(METHODS):
        outcomes[method] = flat[row * len(found) : (row + 1) * len(found)]
    table = format_table(found, outcomes)
    contact_sheet(_sheet(found, outcomes["ours"]), out / "contact_sheet.png")
    with atomic_write(out / "results.json") as file:
        file.write(json.dumps(_as_json(found, outcomes), indent=1).encode())
    return f"{table}\n\npicture: {out / 'contact_sheet.png'}\nscores of every scene: {out / 'results.json'}"


def format_table(found: list[DemoScene], outcomes: dict[str, list[Outcome]]) -> str:
    """HSS with its bootstrap interval, F1, IoU and seconds a scene, one method a line (Markdown)."""
    lines = [
        f"{len(found)} held-out synthetic scenes, 768 x 576, {COLMAP_POINTS} COLMAP points, seed {HELD_OUT_SEED}",
        "",
        "| method | HSS | 95 % interval | F1 | IoU | s / scene |",
        "|---|---|---|---|---|---|",
    ]
    for method, title in METHODS.items():
        s = summarise(outcomes[method])
        seconds = np.median([scene.seconds[method] for scene in found])
        lines.append(
            f"| {title} | {s['hss']:.3f} | {s['hss_low']:.3f}-{s['hss_high']:.3f} | {s['f1']:.3f} | {s['iou']:.3f} "
            f"| {seconds:.2f} |"
        )
        lines += [f"| | scored 0: {count} x {reason} | | | | |" for reason, count in s["failures"].items()]
    return "\n".join(lines)


def _predict_all(tars: list[str], workers: int, report: Callable[[int], None]) -> Iterator[DemoScene]:
    samples = (sample for tar in tars for sample in iter_samples(tar))
    # Spawned, one thread each: predictions and timings then do not depend on the number of workers.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        try:
            for scene in pool.map(predict_scene, samples):
                report(1)
                yield scene
        except BrokenProcessPool:
            raise WireframeError("a worker was killed (out of memory?); run again with fewer --workers") from None


def _one_thread() -> None:
    import torch

    # Ctrl-C is for the parent, which ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def predict_scene(sample: RawSample) -> DemoScene:
    """All methods on one raw sample; seconds count from the raw bytes to the wireframe."""
    methods = _methods()
    predicted, seconds = {}, {}
    start = time.perf_counter()
    row = build_row(sample.key, sample.members)
    scene = read_scene(row)
    sampled = sample_points(fuse_views(scene), methods.num_points)
    shared = time.perf_counter() - start
    for name, predict in methods.by_points.items():
        start = time.perf_counter()
        predicted[name] = predict(sampled)
        seconds[name] = shared + time.perf_counter() - start
    start = time.perf_counter()
    predicted["handcrafted"] = methods.handcrafted(build_row(sample.key, sample.members))
    seconds["handcrafted"] = time.perf_counter() - start
    points, class_id = sampled.world_points()
    return DemoScene(scene.order_id, points, class_id, Wireframe(scene.vertices, scene.edges), predicted, seconds)


class _Methods(NamedTuple):
    num_points: int
    by_points: dict[str, Callable[[SampledScene], Wireframe]]
    handcrafted: Callable[[dict], Wireframe]


_loaded: _Methods | None = None


def _methods() -> _Methods:
    """Models and dummies, loaded once in each worker and warmed up, so that no scene pays for it."""
    global _loaded
    if _loaded is None:
        import hoho2025.example_solutions  # noqa: F401

        from wireframe.perceiver import Perceiver
        from wireframe.rivals import handcrafted, load_dummies
        from wireframe.train.config import DEMO_CONFIG, load_config

        model = Perceiver.from_pretrained(DEMO_MODEL)
        graph = load_config(DEMO_CONFIG).graph
        untrained = Perceiver(model.config).eval()
        dummies = load_dummies(DEMO_DUMMIES)
        by_points = {
            "ours": lambda scene: _ours(scene, model, graph),
            "untrained": lambda scene: _ours(scene, untrained, graph),
            "mean": dummies.mean.predict,
            "nearest": dummies.nearest.predict,
        }
        _loaded = _Methods(model.config.num_points, by_points, handcrafted)
    return _loaded


def _ours(scene: SampledScene, model, graph: GraphConfig) -> Wireframe:
    from wireframe.predict import predict_segments, wireframe_of

    return wireframe_of(predict_segments(scene, model), scene, graph=graph)


def _sheet(found: list[DemoScene], outcomes: list[Outcome]) -> list[SheetItem]:
    """Scenes evenly spread over our scores, best first, so that the picture flatters nobody."""
    order = sorted(range(len(found)), key=lambda i: -outcomes[i].score.hss)
    picked = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(SHEET_SCENES, len(order)))]
    return [
        SheetItem(s.order_id, s.points, s.class_id, s.truth, s.predicted["ours"], outcomes[i].score)
        for i, s in ((i, found[i]) for i in picked)
    ]


def _as_json(found: list[DemoScene], outcomes: dict[str, list[Outcome]]) -> dict:
    return {
        "seed": HELD_OUT_SEED,
        "summary": {method: summarise(outcomes[method]) for method in METHODS},
        "scenes": [
            {
                "order_id": scene.order_id,
                "methods": {
                    method: {**outcomes[method][i].score._asdict(), "failure": outcomes[method][i].failure,
                             "seconds": scene.seconds[method]}
                    for method in METHODS
                },
            }
            for i, scene in enumerate(found)
        ],
    }  # fmt: skip
