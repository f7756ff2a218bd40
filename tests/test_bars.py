"""The bars this project states, each with room for a slow machine."""

import statistics
import time

import numpy as np
import pytest

from wireframe.fusion import fuse_views
from wireframe.graph import Wireframe, merge_vertices, segments_to_wireframe
from wireframe.sampling import sample_points
from wireframe.scene import read_scene
from wireframe.scoring import score_many, summarise
from wireframe.synth import SynthConfig, make_scene


def median_seconds(run, repeats):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@pytest.mark.parametrize(("impl", "seconds"), [("reference", 0.5), ("native", 0.1)])
def test_fusion_and_sampling_of_a_six_view_scene_are_fast(impl, seconds):
    config = SynthConfig(views_range=(6, 6), depth_missing_prob=0.0, depth_none_prob=0.0, pose_only_prob=0.0)
    scene = read_scene(make_scene(0, 0, config))
    assert len(scene.views) == 6 and len(scene.points) == 40000 and scene.views[0].ade.shape == (576, 768)
    assert all(view.depth is not None for view in scene.views)
    assert median_seconds(lambda: sample_points(fuse_views(scene, 20000, impl=impl), impl=impl), 5) < seconds


@pytest.mark.parametrize(("impl", "seconds"), [("reference", 0.002), ("native", 0.0005)])
def test_merging_64_segments_is_fast(impl, seconds):
    vertices = np.random.default_rng(0).normal(size=(128, 3)) * 3
    edges = np.arange(128).reshape(64, 2)
    thresholds = (0.15, 0.2625, 0.375, 0.4875, 0.6)
    assert median_seconds(lambda: merge_vertices(vertices, edges, thresholds, impl=impl), 21) < seconds


def test_ground_truth_segments_through_the_graph_step_score_at_least_095():
    pairs = []
    for index in range(16):
        scene = read_scene(make_scene(11, index, SynthConfig()))
        points, class_id = sample_points(fuse_views(scene)).world_points()
        found = segments_to_wireframe(scene.vertices[scene.edges], points, class_id)
        pairs.append((found, Wireframe(scene.vertices, scene.edges)))
    assert summarise(score_many(pairs, workers=2))["hss"] >= 0.95
