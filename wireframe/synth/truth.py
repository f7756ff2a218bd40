"""The ground truth of a scene as annotators give it: nearly right, and now and then grossly wrong."""

from __future__ import annotations

import numpy as np

from wireframe.synth.building import Building
from wireframe.synth.config import SynthConfig


def ground_truth(rng: np.random.Generator, faults: np.random.Generator, building: Building,
                 config: SynthConfig) -> dict[str, np.ndarray]:
    """wf_vertices float32 [V, 3], wf_edges int64 [E, 2], wf_classifications int64 [E].

    Every coordinate is off by ``truth_sigma``; the whole is scaled about its centre by 1 + ``truth_scale_sigma`` x a
    normal number; with ``truth_gross_prob`` a corner is displaced by a length from ``truth_gross_range``.

    Args:
        rng: draws the errors of the coordinates.
        faults: draws the others.
    """
    vertices = building.vertices + config.truth_sigma * rng.standard_normal(building.vertices.shape)
    if config.truth_scale_sigma:
        vertices = building.centre + (vertices - building.centre) * (
            1 + config.truth_scale_sigma * float(faults.standard_normal()))
    if config.truth_gross_prob:
        direction = faults.standard_normal(vertices.shape)
        direction /= np.sqrt((direction * direction).sum(axis=1, keepdims=True))
        length = faults.uniform(*config.truth_gross_range, len(vertices))
        hit = faults.random(len(vertices)) < config.truth_gross_prob
        vertices = vertices + np.where(hit, length, 0.0)[:, None] * direction
    return {
        "wf_vertices": vertices.astype(np.float32),
        "wf_edges": building.edges,
        "wf_classifications": building.edge_classes,
    }
