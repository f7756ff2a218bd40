import dataclasses

import numpy as np
import pytest

from scenes import random_scene
from wireframe.fusion import fuse_views
from wireframe.normalisation import centre_and_scale
from wireframe.sampling import sample_points


def fused(seed=0, colmap=None, depth=None):
    points = fuse_views(random_scene(seed, points=1500), depth_points_per_view=300)
    index = []
    for source, limit in ((0, colmap), (1, depth)):
        index.append(np.flatnonzero(points.source == source)[: len(points) if limit is None else limit])
    return points.select(np.concatenate(index))


def unique_points(sample):
    return {(p.tobytes(), int(s)) for p, s in zip(sample.xyz_norm[sample.mask], sample.source[sample.mask])}


def test_quotas_are_three_quarters_colmap_and_one_quarter_depth():
    sample = sample_points(fused(), num_points=200)
    assert sample.mask.all()
    assert (sample.source[:150] == 0).all() and (sample.source[150:] == 1).all()


@pytest.mark.parametrize("colmap, depth, expected", [(20, None, (20, 180)), (None, 10, (190, 10)), (0, None, (0, 200))])
def test_a_short_source_hands_its_quota_on_before_anything_is_repeated(colmap, depth, expected):
    sample = sample_points(fused(colmap=colmap, depth=depth), num_points=200)
    assert sample.mask.all() and len(unique_points(sample)) == 200
    assert ((sample.source == 0).sum(), (sample.source == 1).sum()) == expected


def test_too_few_points_repeat_the_last_one_with_mask_false():
    sample = sample_points(fused(colmap=7, depth=5), num_points=40)
    assert sample.mask.sum() == 12 and sample.mask[:12].all()
    assert (sample.xyz_norm[12:] == sample.xyz_norm[11]).all()
    assert (sample.behind[12:] == sample.behind[11]).all()


def test_no_points_gives_zeros_and_no_mask():
    sample = sample_points(fused(colmap=0, depth=0), num_points=16)
    assert not sample.mask.any() and not sample.xyz_norm.any() and sample.scale == 1
    assert sample.xyz_norm.shape == (16, 3) and sample.behind.dtype == np.int16


def test_lower_tiers_come_first_and_a_tier_that_does_not_fit_is_a_random_subset():
    points = fused()
    sample = sample_points(points, num_points=100)
    center, scale = sample.center.astype(np.float64), np.float64(sample.scale)
    normalised = ((points.xyz.astype(np.float64) - center) / scale).astype(np.float32)
    tier_of = {(p.tobytes(), int(s)): int(g) for p, s, g in zip(normalised, points.source, points.group_id)}
    for source in (0, 1):
        chosen = [
            tier_of[(p.tobytes(), source)] for p, s in zip(sample.xyz_norm, sample.source) if s == source
        ]
        available = sorted(points.group_id[points.source == source].tolist())
        assert chosen == available[: len(chosen)]
    other = sample_points(points, num_points=100, seed=1)
    assert unique_points(sample) != unique_points(other)


def test_sampling_does_not_depend_on_the_process_and_only_on_seed_and_scene():
    points = fused()
    first, again = sample_points(points, 64, seed=3), sample_points(points, 64, seed=3)
    renamed = sample_points(dataclasses.replace(points, order_id="another"), 64, seed=3)
    assert all(np.array_equal(a, first.arrays()[n]) for n, a in again.arrays().items())
    assert not np.array_equal(renamed.xyz_norm, first.xyz_norm)


def test_centre_and_scale_follow_the_written_rules():
    rng = np.random.default_rng(0)
    xyz = np.concatenate([rng.normal(size=(5000, 3)) * [4, 2, 3] + [10, 3, -5], rng.normal(size=(40, 3)) * 200])
    xyz = xyz.astype(np.float32)
    source = np.ones(len(xyz), np.uint8)
    center, scale = centre_and_scale(xyz, source, seed=0, scene=1)
    cloud = xyz.astype(np.float64)
    distance = np.linalg.norm(cloud - np.median(cloud, axis=0), axis=1)
    mad = np.median(np.abs(distance - np.median(distance)))
    cloud = cloud[distance <= np.median(distance) + 2.5 * mad]
    low, high = (np.sort(cloud, axis=0)[int(f * (len(cloud) - 1))] for f in (0.025, 0.975))
    assert np.allclose(center, (low + high) / 2, rtol=1e-6)
    assert np.allclose(scale, np.linalg.norm(high - low), rtol=1e-6)


def test_centre_and_scale_use_depth_points_where_there_are_any():
    xyz = np.array([[0, 0, 0], [100, 0, 0], [10, 10, 10], [12, 10, 10]], np.float32)
    center, _ = centre_and_scale(xyz, np.array([0, 0, 1, 1], np.uint8), 0, 0)
    assert (center >= 10).all() and (center <= 12).all()
    _, scale = centre_and_scale(xyz[:1], np.zeros(1, np.uint8), 0, 0)
    assert scale == np.float32(1e-6)


def test_ground_truth_segments_are_the_normalised_wireframe():
    sample = sample_points(fused(), 64)
    world = sample.gt_segments * sample.scale + sample.center
    assert np.allclose(world, sample.gt_vertices[sample.gt_edges], atol=1e-5)
    assert sample.gt_edges.dtype == np.int32 and sample.gt_edge_classes.dtype == np.int64


def test_num_points_must_be_positive():
    with pytest.raises(ValueError, match="num_points"):
        sample_points(fused(), 0)
