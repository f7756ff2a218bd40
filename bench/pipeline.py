"""Times the parts of the inference chain on one synthetic scene: ``python -m wireframe.bench.pipeline``.

Scene: 6 usable views of 768 x 576 with depth in all of them, 40k COLMAP points, 20k depth points a view. The
column of the published code holds what the baseline's own code took on scenes of this size on another machine
(2 CPU cores): it tells the order of magnitude and is no measured rival.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from wireframe import hashing
from wireframe.bench.timing import Case, append_rows, describe_machine, heading, measure, milliseconds, result
from wireframe.colmap import read_points3d
from wireframe.fusion import fuse_views
from wireframe.graph import GraphConfig, merge_vertices, segments_to_wireframe
from wireframe.kernels import dispatch
from wireframe.perceiver import Perceiver, PerceiverConfig
from wireframe.predict import model_inputs, predict_wireframe
from wireframe.sampling import SampledScene, sample_points
from wireframe.scene import Scene, read_scene
from wireframe.synth import SynthConfig, make_scene
from wireframe.synth.write import encoded_scene
from wireframe.train.config import AugmentConfig, LossConfig
from wireframe.train.data import TrainingSet
from wireframe.train.loss import scene_losses

FUSE, MERGE = "fuse_views + sample_points", "merge_vertices"
FORWARD, BACKWARD = "Perceiver forward", "Perceiver forward + backward"

# Milliseconds of the baseline's own code, on other machines than the one that runs this file.
PUBLISHED = {FUSE: "4200", MERGE: "15-77", FORWARD: "94-117", BACKWARD: "857-914"}
BARS = {"make_scene": 1500.0, FUSE: 40.0, MERGE: 0.2}

# A house of 17 edges: most scenes of this seed have fewer, so that merging would be easier.
_SEED, _INDEX = 0, 9


class Setup(NamedTuple):
    """What is measured; the defaults are the published sizes."""

    scene: SynthConfig = SynthConfig(
        views_range=(6, 6), depth_missing_prob=0.0, depth_none_prob=0.0, pose_only_prob=0.0
    )
    model: PerceiverConfig = PerceiverConfig()
    depth_points_per_view: int = 20000
    training_scenes: int = 4
    training_points: int = 2048


SMALL = Setup(
    Setup().scene.changed(width=160, height=120, colmap_points=1000),
    PerceiverConfig(
        hidden=32, ff=48, latent_tokens=8, latent_layers=2, decoder_layers=1, segments=16, num_points=256
    ),
    depth_points_per_view=500, training_scenes=2, training_points=128,
)  # fmt: skip


def cases(setup: Setup, backward: bool) -> Iterator[Case]:
    """The parts in the order of the chain, each on what the part before it gives."""
    row = encoded_scene(_SEED, _INDEX, setup.scene)
    scene = read_scene(row)
    size = f"{len(scene.views)} x {setup.scene.width} x {setup.scene.height}"
    yield Case("make_scene", "numpy", size, lambda: make_scene(_SEED, _INDEX, setup.scene))
    yield Case(
        "read_scene (PNG, ZIP)", f"{provider('colors_to_ids')} + pillow", size, lambda: read_scene(row)
    )
    yield Case(
        "read_points3d",
        provider("parse_points3d"),
        f"{len(scene.points)} points",
        lambda: read_points3d(row["colmap"]),
    )

    def fuse(num_points: int = setup.model.num_points, seed: int = _SEED) -> SampledScene:
        return sample_points(fuse_views(scene, setup.depth_points_per_view, seed), num_points, seed)

    candidates = len(scene.points) + setup.depth_points_per_view * sum(
        v.depth is not None for v in scene.views
    )
    yield Case(FUSE, provider("vote_labels"), f"{candidates} -> {setup.model.num_points} points", fuse)
    sample = fuse()
    yield from _graph_cases(scene, sample, setup.model.segments)
    model = Perceiver(setup.model).eval()
    yield _forward_case(model, sample)
    # Threshold 0: a model without training finds nothing above one half, and the graph would cost nothing.
    yield Case(
        "predict_wireframe",
        f"{provider('vote_labels')} + torch",
        size,
        lambda: predict_wireframe(row, model, threshold=0.0),
    )
    if backward:
        yield _backward_case(
            setup, [fuse(setup.training_points, seed) for seed in range(setup.training_scenes)]
        )


def provider(op: str) -> str:
    """What runs the operation here: native or reference."""
    return dispatch.choose(op, "auto")


def _graph_cases(scene: Scene, sample: SampledScene, count: int) -> Iterator[Case]:
    segments = noisy_segments(scene, count)
    vertices, edges = segments.reshape(-1, 3), np.arange(2 * count).reshape(-1, 2)
    thresholds = GraphConfig().merge_thresholds
    yield Case(
        MERGE,
        provider("merge_vertices"),
        f"{count} segments",
        lambda: merge_vertices(vertices, edges, thresholds),
    )
    points, class_id = sample.world_points()
    shape = f"{count} segments, {len(points)} points"
    yield Case(
        "segments_to_wireframe",
        provider("merge_vertices"),
        shape,
        lambda: segments_to_wireframe(segments, points, class_id),
    )


def noisy_segments(scene: Scene, count: int) -> np.ndarray:
    """float32 [count, 2, 3] world metres: true edges in turn, their ends moved by 0.1 m."""
    truth = scene.vertices[scene.edges[np.arange(count) % len(scene.edges)]]
    noise = hashing.generator(_SEED, _INDEX, hashing.SYNTH).standard_normal(truth.shape)
    return (truth + 0.1 * noise).astype(np.float32)


def _forward_case(model: Perceiver, sample: SampledScene) -> Case:
    batch = model_inputs([sample])

    def forward() -> None:
        with torch.inference_mode():
            model(batch)

    return Case(FORWARD, "torch eager", f"1 x {len(sample.mask)}, fp32", forward)


def _backward_case(setup: Setup, samples: list[SampledScene]) -> Case:
    model = Perceiver(setup.model).train()
    data = TrainingSet.from_scenes(samples, max(setup.model.segments, len(samples[0].gt_segments)))
    batch = data.batch(0, 0, np.arange(len(data)), AugmentConfig(rotate=False, flip=False))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        prediction = model(batch.inputs)
        scene_losses(prediction, batch.target, batch.target_mask, LossConfig(), 0.1).total.mean().backward()

    return Case(
        BACKWARD, "torch eager", f"{len(samples)} x {setup.training_points}, fp32, with the loss", step
    )


def format_table(rows: list[dict], full_size: bool = True) -> str:
    """The rows as a Markdown table, in milliseconds; bars and published figures are for the full size."""
    bars, published = (BARS, PUBLISHED) if full_size else ({}, {})
    lines = [
        "| part | shape | median ms | p20-p80 | bar | published code, other machine |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, middle, high = (milliseconds(row[f"{name}_ms"]) for name in ("p20", "p50", "p80"))
        bar = f"< {bars[row['op']]:g}" if row["op"] in bars else ""
        theirs = published.get(row["op"], "")
        lines.append(f"| {row['op']} | {row['shape']} | {middle} | {low}-{high} | {bar} | {theirs} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the table and appends the rows to ``--out``."""
    parser = argparse.ArgumentParser(
        prog="python -m wireframe.bench.pipeline", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--repeats", type=_positive, default=9, help="rounds of each part (default 9)")
    parser.add_argument("--threads", type=_positive, help="torch's threads (default: torch's own choice)")
    parser.add_argument(
        "--backward", action="store_true", help="also a training step, forward and backward (slow)"
    )
    parser.add_argument("--small", action="store_true", help="a small scene and model, to see that it runs")
    parser.add_argument("--out", metavar="FILE", help="append one JSON line a part to this file")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    machine = describe_machine()
    print(heading(machine), flush=True)
    rows = []
    for case in cases(SMALL if arguments.small else Setup(), arguments.backward):
        (times,) = measure([case], arguments.repeats)
        rows.append(result(case, times, machine))
        if arguments.out:
            append_rows(arguments.out, rows[-1:])
    print(f"\n{format_table(rows, not arguments.small)}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
