"""The whole chain for one scene: raw row -> fusion -> sampling -> Perceiver -> segments -> graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wireframe.fusion import fuse_views
from wireframe.graph import GraphConfig, Wireframe, segments_to_wireframe
from wireframe.perceiver import Perceiver
from wireframe.sampling import SampledScene, sample_points
from wireframe.scene import read_scene
from wireframe.segments import denormalise
from wireframe.tokens import MODEL_INPUTS


class SceneSegments(NamedTuple):
    """segments: float32 [S, 2, 3] world metres; probability: float32 [S], the sigmoid of the confidence logits."""

    segments: np.ndarray
    probability: np.ndarray


class PredictedScene(NamedTuple):
    """All that graphs are made of and scored against: segments, points (float32 [P, 3] world metres) with their
    class_id (uint8 [P]), and the truth, without edges where there is none."""

    order_id: str
    found: SceneSegments
    points: np.ndarray
    class_id: np.ndarray
    truth: Wireframe

    def wireframe(self, graph: GraphConfig) -> Wireframe:
        """The graph of the segments whose probability is above ``graph.confidence``."""
        confident = self.found.probability > graph.confidence
        return segments_to_wireframe(self.found.segments[confident], self.points, self.class_id, graph)


def predict_wireframe(
    row: Mapping, model: Perceiver, *, threshold: float | None = None, graph: GraphConfig = GraphConfig()
) -> Wireframe:
    """The wireframe of a raw scene.

    Args:
        row: a raw row, as ``read_scene`` takes it.
        model: in eval mode; the scene is sampled to ``model.config.num_points`` points.
        threshold: segments whose confidence is above it count; default ``graph.confidence``.
        graph: merge and snap settings.

    Returns:
        Wireframe(vertices float32 [V, 3] world metres, edges int64 [E, 2]); the empty solution where nothing is found.

    Raises:
        SceneError: the row cannot be used. ValueError: the threshold is no probability.
    """
    sample = sample_points(fuse_views(read_scene(row)), model.config.num_points)
    return wireframe_of(predict_segments(sample, model), sample, threshold=threshold, graph=graph)


def predict_segments(sample: SampledScene, model: Perceiver) -> SceneSegments:
    """All segments of one sampled scene with their probabilities; none where the scene has no points."""
    if not sample.mask.any():
        return SceneSegments(np.zeros((0, 2, 3), np.float32), np.zeros(0, np.float32))
    device = next(model.parameters()).device
    # One scene at a time: its bits then cannot depend on its neighbours in a batch.
    with torch.inference_mode():
        prediction = model({name: tensor.to(device) for name, tensor in model_inputs([sample]).items()})
    segments = denormalise(
        prediction.segments[0].cpu(), torch.from_numpy(np.array(sample.center)), torch.tensor(float(sample.scale))
    )
    return SceneSegments(segments.numpy(), prediction.conf[0].sigmoid().cpu().numpy())


def wireframe_of(
    found: SceneSegments, sample: SampledScene, *, threshold: float | None = None, graph: GraphConfig = GraphConfig()
) -> Wireframe:
    """The graph of the segments above the threshold (default ``graph.confidence``)."""
    threshold = graph.confidence if threshold is None else threshold
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be a probability from 0 to 1, got {threshold}")
    return with_truth(found, sample).wireframe(dataclasses.replace(graph, confidence=threshold))


def with_truth(found: SceneSegments, sample: SampledScene) -> PredictedScene:
    """Segments beside the points and the truth of the scene that they were found in."""
    truth = Wireframe(sample.gt_vertices, sample.gt_edges.astype("int64"))
    return PredictedScene(sample.order_id, found, *sample.world_points(), truth)


@contextmanager
def eval_mode(model: Perceiver) -> Iterator[None]:
    """The model without dropout while the ``with`` block runs."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def model_inputs(samples: list[SampledScene]) -> dict[str, Tensor]:
    """The model's batch: name -> tensor [B, T, ...] of sampled scenes with one number of points."""
    return {name: torch.from_numpy(np.stack([getattr(s, name) for s in samples])) for name in MODEL_INPUTS}
