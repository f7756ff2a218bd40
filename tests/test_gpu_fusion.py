"""Fusion and sampling on a CUDA device against the reference, bit for bit.

Needs torch, numpy and pytest alone, so that it runs on a GPU machine where nothing else is installed.
"""

import numpy as np
import pytest
import torch

from fusion_cases import assert_same, mixed_scenes, run_ops
from scenes import random_scene
from wireframe.batched import sample_scenes
from wireframe.kernels import ops
from wireframe.scene_batch import SceneBatch

pytestmark = pytest.mark.gpu


def batch_of(*scenes):
    return SceneBatch.from_scenes(scenes)


@pytest.mark.parametrize("zbuffer", [None, 0.05])
def test_every_operation_gives_the_bits_of_the_reference(zbuffer):
    batch = batch_of(*mixed_scenes())
    expected = run_ops(batch, "reference", zbuffer=zbuffer)
    assert_same(run_ops(batch.to("cuda"), "native", zbuffer=zbuffer), expected)


@pytest.mark.parametrize("count", [0, 1, 37, 100_000])
@pytest.mark.parametrize("num_points", [1, 64, 5000])
def test_any_count_gives_the_bits_of_the_cpu(count, num_points):
    batch = batch_of(*mixed_scenes())
    how = {"num_points": num_points, "seed": 9, "depth_points_per_view": count}
    assert_same(sample_scenes(batch.to("cuda"), **how), sample_scenes(batch, **how, impl="native"))


def test_full_sized_scenes_give_the_bits_of_the_cpu():
    rng = np.random.default_rng(0)
    scenes = []
    for seed in range(3):
        scene = random_scene(seed, views=6, points=40_000)
        views = [
            view.__class__(**{**vars(view), "K": view.K * np.array([[19.2], [19.2], [1]], np.float32),
                              "ade": np.kron(view.ade, np.ones((19, 19), np.uint8)),
                              "gestalt": np.kron(view.gestalt, np.ones((19, 19), np.uint8)),
                              "depth": rng.integers(0, 30_000, (576, 768)).astype(np.uint16)})
            for view in scene.views
        ]  # fmt: skip
        scenes.append(scene.__class__(**{**vars(scene), "views": tuple(views)}))
    batch = batch_of(*scenes)
    assert_same(sample_scenes(batch.to("cuda")), sample_scenes(batch, impl="native"))


def test_a_hundred_runs_give_the_same_bits():
    batch = batch_of(*mixed_scenes()).to("cuda")
    first = run_ops(batch, "native", zbuffer=0.1)
    for _ in range(100):
        assert_same(run_ops(batch, "native", zbuffer=0.1), first)


def test_nothing_waits_for_the_device():
    batch = batch_of(*mixed_scenes()).to("cuda")
    expected = sample_scenes(batch, 128)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = sample_scenes(batch, 128)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(got, expected)


def test_a_captured_graph_replays_the_same_bits():
    batch = batch_of(*mixed_scenes()).to("cuda")
    expected = sample_scenes(batch, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = sample_scenes(batch, 128)
    for _ in range(3):
        graph.replay()
        assert_same(got, expected)


def test_another_stream_is_respected():
    batch = batch_of(*mixed_scenes()).to("cuda")
    expected = sample_scenes(batch, 128)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = sample_scenes(batch, 128)
    stream.synchronize()
    assert_same(got, expected)


def test_tensors_on_two_devices_are_refused():
    batch = batch_of(random_scene(1))
    mask, limits = ops.house_mask(batch), ops.clip_limits(batch)
    with pytest.raises(ValueError, match="mask is on cpu"):
        ops.depth_points(batch.to("cuda"), mask, limits, 10)


def test_operations_of_the_cpu_bring_tensors_back_to_their_device():
    points = batch_of(random_scene(1)).points
    chosen = ops.farthest_point_sample(points.to("cuda"), 4)
    assert chosen.device.type == "cuda"
    assert_same(chosen, ops.farthest_point_sample(points, 4))
    assert_same(ops.voxel_sample(points.to("cuda"), 0.5), ops.voxel_sample(points, 0.5))
