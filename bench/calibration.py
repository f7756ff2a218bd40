"""How hard the ``real`` preset of synthetic scenes is, beside the challenge's real figures: ``python -m
wireframe.bench.calibration``.

Makes scenes, has the handcrafted rival and two dummies predict them, scores them, and measures what else was found to
matter: depth, votes, holes in the cloud, size of the roofs, whether the ground truth survives the graph step. Prints a
Markdown table. The rival's real figures are those published for the challenge's public test set. A preset that meets
them ranks methods as the real data would; it does not predict anybody's real score.

    python -m wireframe.bench.calibration --scenes 200 --seed 20270201 --workers 2 --out out/calibration.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wireframe.arguments import add_workers, positive, size
from wireframe.bench.calibration_scene import Measured, measure_scene, one_thread
from wireframe.bench.timing import describe_machine, heading
from wireframe.files import atomic_write, check_target
from wireframe.graph import Wireframe, empty_wireframe
from wireframe.hashing import SYNTH, generator
from wireframe.isolated import map_isolated
from wireframe.rivals import Dummies, fit_dummies
from wireframe.scoring import Outcome, require_hoho, score_many
from wireframe.synth import SynthConfig, make_building

# The table of the README is of 20270201, by which the preset was never tuned.
TUNING_SEED = 20270101
DUMMY_SEED = 20270202
_METHODS = ("handcrafted", "nearest", "mean", "truth")


class Bar(NamedTuple):
    """One line of the table: a figure, what it is on real data, the range wanted, and what was measured."""

    name: str
    real: str
    low: float
    high: float
    measured: float

    @property
    def met(self) -> bool:
        return self.low <= self.measured <= self.high


def bars(scenes: Sequence[Measured], scores: dict[str, np.ndarray]) -> list[Bar]:
    """The lines of the table.

    Args:
        scenes: what was measured of the N scenes.
        scores: method -> float [N, 3], HSS, F1 and IoU.
    """
    inf = float("inf")
    rival, truth = scores["handcrafted"], scores["truth"]
    low, middle, high = (float(x) for x in np.percentile(rival[:, 0], (5, 50, 95)))
    scale = np.concatenate([scene.depth_scales for scene in scenes])
    scale_low, scale_high = (float(x) for x in np.percentile(scale, (5, 95))) if len(scale) else (np.nan, np.nan)
    views = np.array([scene.views for scene in scenes])
    share = partial(_share, scenes)
    hss, f1, iou = (float(x) for x in rival.mean(axis=0))
    small = [scene.small_seconds for scene in scenes if scene.small_seconds is not None]
    dummy = max(float(scores[name][:, 0].mean()) for name in ("nearest", "mean"))
    return [
        Bar("rival: mean HSS", "0.356", 0.30, 0.40, hss),
        Bar("rival: F1 of vertices", "0.472", 0.40, 0.52, f1),
        Bar("rival: IoU of edges", "0.297", 0.25, 0.34, iou),
        Bar("rival: HSS, 5 % quantile", "0.00", 0.0, 0.08, low),
        Bar("rival: HSS, median", "0.38", 0.34, 0.42, middle),
        Bar("rival: HSS, 95 % quantile", "0.55", 0.52, 0.64, high),
        Bar("better dummy: mean HSS", "", 0.0, hss - 1e-9, dummy),
        Bar("truth through the graph step: mean HSS", "", 0.95, 1.0, float(truth[:, 0].mean())),
        Bar("views that voted for a sampled point, mean", "2.7", 2.2, 3.2, _mean(scene.votes for scene in scenes)),
        Bar("depth maps missing, share of views", "0.42", 0.36, 0.48, share("depth_missing", "views")),
        Bar("depth scale, 5 % quantile", "0.8", 0.77, 0.87, scale_low),
        Bar("depth scale, 95 % quantile", "1.3", 1.23, 1.33, scale_high),
        Bar("blank gestalt maps, share of views", "0.06 or more", 0.06, 0.15, share("blank", "views")),
        Bar("COLMAP points, mean", "30-40k", 30e3, 40e3, _mean(scene.points for scene in scenes)),
        Bar("cells of 0.6 m along the edges without a point", "0.39", 0.30, 0.48, share("empty_cells", "cells")),
        Bar("vertices, mean", "about 20", 16, 24, _mean(scene.vertices for scene in scenes)),
        Bar("edges, mean", "about 25", 20, 30, _mean(scene.edges for scene in scenes)),
        Bar("edges, most", "64", 36, 64, float(max(scene.edges for scene in scenes))),
        Bar("views, fewest", "4", 4, 4, float(views.min())),
        Bar("views, most", "22", 12, 22, float(views.max())),
        Bar("CPU seconds to make a scene of 320 x 240", "", 0.0, 0.5, _mean(small)),
        Bar("CPU seconds to make a scene of this size", "", 0.0, inf, _mean(s.seconds for s in scenes)),
    ]  # fmt: skip


def _mean(values) -> float:
    return float(np.mean([float(value) for value in values]))


def _share(scenes: Sequence[Measured], part: str, whole: str) -> float:
    return sum(getattr(scene, part) for scene in scenes) / max(1, sum(getattr(scene, whole) for scene in scenes))


def table(found: Sequence[Bar]) -> str:
    """Markdown, one bar a line."""
    lines = ["| figure | real | target | measured | met |", "|---|---|---|---|---|"]
    for bar in found:
        if bar.high == float("inf"):
            target, met = "", ""
        else:
            target, met = f"{_number(bar.low)} to {_number(bar.high)}", "yes" if bar.met else "no"
        lines.append(f"| {bar.name} | {bar.real} | {target} | {_number(bar.measured)} | {met} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".") if abs(value) < 1000 else f"{value:.0f}"


def training_dummies(config: SynthConfig, count: int) -> Dummies:
    """Dummies that know the wireframes of ``count`` other scenes; nothing is rendered for them."""
    from wireframe.bench.calibration_scene import wireframe_sample

    return fit_dummies(wireframe_sample(make_building(generator(DUMMY_SEED, index, SYNTH), config))
                       for index in range(count))


def measure_all(seed: int, indices: Sequence[int], config: SynthConfig, dummies: Dummies, workers: int,
                report: Callable[[int], object] = lambda count: None) -> list[Measured]:
    """Measures scenes in processes; where the rival kills its process, the scene is measured without it."""
    measure = partial(measure_scene, seed, config=config, dummies=dummies)
    found = []
    for scene in map_isolated((measure, partial(measure, rival=False)), indices, workers, one_thread):
        found.append(scene)
        report(1)
    return found


def score_all(scenes: Sequence[Measured], workers: int) -> dict[str, list[Outcome]]:
    """Outcomes by method, of scenes in their order."""
    pairs = [(Wireframe(*scene.predicted.get(method, empty_wireframe())), scene.truth)
             for method in _METHODS for scene in scenes]
    flat = score_many(pairs, workers=workers)
    return {method: flat[k * len(scenes) : (k + 1) * len(scenes)] for k, method in enumerate(_METHODS)}


def main(argv: list[str] | None = None) -> int:
    """Measures and prints the table; 1 where a target is missed."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m wireframe.bench.calibration", description=__doc__.split(":")[0])
    parser.add_argument("--scenes", type=positive, default=200, help="scenes (default 200)")
    parser.add_argument("--seed", type=int, default=TUNING_SEED, help=f"of the scenes (default {TUNING_SEED})")
    parser.add_argument("--size", type=size, help="label maps (default: that of the preset, 768x576)")
    parser.add_argument("--dummy-scenes", type=positive, default=2000, help="that the dummies know (default 2000)")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="a setting of SynthConfig")
    parser.add_argument("--out", type=Path, help="JSON file for the scores of every scene")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_workers(parser)
    arguments = parser.parse_args(argv)
    require_hoho()
    if arguments.out:
        check_target(arguments.out)
    config = SynthConfig.real().changed(arguments.set, **dict(zip(("width", "height"), arguments.size or ())))
    machine = heading(describe_machine())
    dummies = training_dummies(config, arguments.dummy_scenes)
    with tqdm(total=arguments.scenes, disable=arguments.quiet, unit="scene") as bar:
        scenes = measure_all(arguments.seed, range(arguments.scenes), config, dummies, arguments.workers, bar.update)
    outcomes = score_all(scenes, arguments.workers)
    scores = {method: np.array([outcome.score for outcome in some]) for method, some in outcomes.items()}
    found = bars(scenes, scores)
    print(f"{arguments.scenes} scenes of seed {arguments.seed}, {config.width} x {config.height}\n\n{table(found)}\n")
    failed = [f"{scene.order_id}: {scene.failure}" for scene in scenes if scene.failure]
    print(f"the rival failed on {len(failed)} scenes" + "".join(f"\n- {line}" for line in failed[:10]))
    print("These scenes rank methods; they do not predict a score on real data.")
    print(f"measured on {machine}")
    if arguments.out:
        rows = [{**scene.as_json(), **{method: outcomes[method][k].score for method in _METHODS}}
                for k, scene in enumerate(scenes)]
        with atomic_write(arguments.out) as file:
            content = {"bars": [bar._asdict() for bar in found], "scenes": rows}
            # Counts come as NumPy's numbers.
            file.write(json.dumps(content, indent=1, default=lambda number: number.item()).encode())
    return 0 if all(bar.met for bar in found) else 1


if __name__ == "__main__":
    sys.exit(main())
