"""A model beside its rivals on held-out scenes as hard as real ones: ``python -m wireframe.bench.held_out MODEL``.

Makes scenes of the ``real`` preset, predicts and scores them by every method, and prints the tables of the model card:
means with intervals, our difference to the handcrafted rival paired by scene, HSS by roof type and by number of edges.
Such scenes rank methods; they do not predict a score on real data.

    python -m wireframe.bench.held_out wireframe/assets/demo_model --out out/held-out
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wireframe.arguments import add_workers, non_negative, positive, size
from wireframe.bench.timing import describe_machine, heading
from wireframe.comparison import against, compare_on_made_scenes, format_groups, format_table
from wireframe.hashing import SYNTH, generator
from wireframe.scoring import require_hoho
from wireframe.synth import SynthConfig, make_building

# Of no scene that a model was trained, tuned or calibrated on.
SEED = 20270205
_GROUPED = ("ours", "handcrafted", "nearest")
_EDGE_BOUNDS = (12, 18, 24, 32)


def edge_group(edges: int) -> str:
    """The group of a scene by the number of its true edges; groups sort by it as text."""
    low = 0
    for high in _EDGE_BOUNDS:
        if edges <= high:
            return f"{low + 1:2d} to {high}"
        low = high
    return f"{low + 1} and more"


def main(argv: list[str] | None = None) -> int:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m wireframe.bench.held_out", description=__doc__.split(":")[0])
    parser.add_argument("model", type=Path, help="folder of a model, as python -m wireframe.train.export writes it")
    parser.add_argument("--out", type=Path, required=True, help="folder for scenes and scores")
    parser.add_argument("--scenes", type=positive, default=500, help="scenes (default 500)")
    parser.add_argument("--seed", type=non_negative, default=SEED, help=f"of the scenes (default {SEED})")
    parser.add_argument("--size", type=size, help="label maps (default: that of the preset, 768x576)")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", help="a setting of SynthConfig")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_workers(parser)
    arguments = parser.parse_args(argv)
    require_hoho()
    config = SynthConfig.real().changed(arguments.set, **dict(zip(("width", "height"), arguments.size or ())))
    found = compare_on_made_scenes(
        arguments.out, arguments.seed, arguments.scenes, config, arguments.model, workers=arguments.workers,
        progress=not arguments.quiet,
    )  # fmt: skip
    roofs = {}
    for index, scene in enumerate(found.scenes):
        roofs[scene.order_id] = make_building(generator(arguments.seed, index, SYNTH), config).roof_type
    edges = {scene.order_id: edge_group(len(scene.truth.edges)) for scene in found.scenes}
    print(f"{arguments.scenes} scenes of seed {arguments.seed}, {config.width} x {config.height}\n")
    print(format_table(found))
    print(f"\nours less handcrafted: {against(found)}\n")
    print(format_groups(found, roofs, "roof", _GROUPED), format_groups(found, edges, "edges", _GROUPED), sep="\n\n")
    print(f"\nmeasured on {heading(describe_machine())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
