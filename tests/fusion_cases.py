"""Batches that reach every branch of fusion and sampling, all operations on a batch, equality to the last bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from scenes import random_scene, random_view
from wireframe.kernels import ops


def mixed_scenes():
    """Views of several sizes, depth maps of another size, no depth at all, hardly any points, no points."""
    rng = np.random.default_rng(5)
    big = random_scene(1, views=4)
    views = tuple(
        dataclasses.replace(random_view(rng, 2 * i, 40 + 7 * i, 30 + 5 * i), depth=depth)
        for i, depth in enumerate([
            rng.integers(0, 9000, (20, 33)).astype(np.uint16), None, np.zeros((9, 9), np.uint16),
            np.full((70, 90), 65535, np.uint16),
        ])
    )  # fmt: skip
    resized = dataclasses.replace(random_scene(2, points=150), views=views)
    no_depth = dataclasses.replace(
        random_scene(3, views=3), views=tuple(dataclasses.replace(v, depth=None) for v in random_scene(3).views[:3])
    )
    nothing = dataclasses.replace(random_scene(4, views=1, points=0), views=no_depth.views[:1])
    far_away = dataclasses.replace(no_depth, order_id="far", points=no_depth.points + 1e6)
    return [big, resized, no_depth, nothing, far_away, random_scene(6, views=1, points=9)]


def assert_same(got, expected):
    """All arrays or tensors of two dataclasses, dicts, tuples or single ones: dtype, shape and every bit."""
    if dataclasses.is_dataclass(got):
        got, expected = vars(got), vars(expected)
    if isinstance(got, dict):
        assert got.keys() == expected.keys()
        got, expected = list(got.values()), list(expected.values())
    if isinstance(got, (tuple, list)):
        assert len(got) == len(expected)
        for one, other in zip(got, expected):
            assert_same(one, other)
    elif isinstance(got, (torch.Tensor, np.ndarray, np.generic)):
        got, expected = (x.cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in (got, expected))
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()
    else:
        assert got == expected


def run_ops(batch, impl, threads=1, count=60, seed=3, zbuffer=None, num_points=100):
    """Every operation on the batch, each fed with what this implementation gave before."""
    how = {"impl": impl, "threads": threads}
    mask, limits = ops.house_mask(batch, **how), ops.clip_limits(batch, **how)
    drawn, counts = ops.depth_points(batch, mask, limits, count, seed, **how)
    votes = ops.vote_labels(batch, batch.points, batch.point_offsets, zbuffer=zbuffer, **how)
    depth_votes = ops.vote_labels(
        batch, drawn.flatten(0, 1), drawn.shape[1] * batch.view_offsets, zbuffer=zbuffer, **how
    )
    tiers = ops.point_tiers(votes.visible_src, votes.visible_id, votes.behind, **how)
    keep = (votes.support >= 1) & (votes.n_views_voted >= 1) & (tiers[0] >= 0)
    source = (torch.arange(len(batch.points), device=batch.device) % 3 == 0).to(torch.uint8)
    ragged = (keep, batch.point_offsets, batch.keys)
    box = ops.centre_and_scale(batch.points, source, *ragged, seed, **how)
    sample = ops.priority_sample(source, tiers[0], *ragged, num_points, seed, **how)
    return mask, limits, drawn, counts, tuple(votes), tuple(depth_votes), tiers, box, sample
