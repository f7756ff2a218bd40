"""The operations of fusion and sampling: reference = native = CUDA, bit for bit, for any threads and any batch."""

import dataclasses
import os
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_cases import assert_same, mixed_scenes, run_ops
from scenes import random_scene
from wireframe import fuse_views, label_points, sample_points
from wireframe.batched import sample_scenes
from wireframe.kernels import native, ops
from wireframe.kernels.dispatch import ImplementationError
from wireframe.kernels.point_sampling import _centre_and_scale, _priority_sample
from wireframe.kernels.view_fusion import _clip_limits, _depth_points, _house_mask, _point_tiers, _vote_labels
from wireframe.scene_batch import SceneBatch
from wireframe.voting import LABEL_TABLES

pytestmark = pytest.mark.native

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("zbuffer", [None, 0.05])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_native_gives_the_bits_of_the_reference(threads, zbuffer):
    batch = SceneBatch.from_scenes(mixed_scenes())
    expected = run_ops(batch, "reference", zbuffer=zbuffer)
    assert_same(run_ops(batch, "native", threads, zbuffer=zbuffer), expected)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_fuse_views_and_sample_points_give_the_bits_of_the_reference(threads):
    for scene in [*mixed_scenes()[:2], random_scene(7, views=6, points=9000)]:
        expected = fuse_views(scene, 500, seed=2, impl="reference")
        got = fuse_views(scene, 500, seed=2, impl="native", threads=threads)
        assert_same(got, expected)
        for sampler in ("priority", "fps", "voxel"):
            how = {"num_points": 200, "seed": 4, "sampler": sampler}
            assert_same(
                sample_points(got, impl="native", threads=threads, **how),
                sample_points(expected, impl="reference", **how),
            )


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("zbuffer", [None, 0.02])
def test_a_scene_does_not_depend_on_the_rest_of_the_batch(impl, zbuffer):
    scenes = mixed_scenes()
    how = {"num_points": 96, "seed": 5, "depth_points_per_view": 70, "zbuffer": zbuffer, "impl": impl}
    whole = sample_scenes(SceneBatch.from_scenes(scenes), **how)
    for b, scene in enumerate(scenes):
        alone = sample_scenes(SceneBatch.from_scenes([scene]), **how)
        assert_same({name: tensor[b] for name, tensor in whole.items()}, {name: t[0] for name, t in alone.items()})


@pytest.mark.parametrize("zbuffer", [None, 0.02])
def test_a_batch_gives_the_bits_of_scene_by_scene(zbuffer):
    scenes = mixed_scenes()
    got = sample_scenes(SceneBatch.from_scenes(scenes), 96, 5, depth_points_per_view=70, zbuffer=zbuffer)
    for b, scene in enumerate(scenes):
        expected = sample_points(fuse_views(scene, 70, 5, zbuffer=zbuffer), 96, 5)
        for name, tensor in got.items():
            assert_same(tensor[b].numpy(), np.asarray(getattr(expected, name)))


def test_the_zbuffer_hides_a_point_behind_another_and_nothing_else():
    scene = random_scene(8, views=1, points=0)
    view = dataclasses.replace(
        scene.views[0], R=np.eye(3, dtype=np.float32), t=np.zeros(3, np.float32),
        gestalt=np.full_like(scene.views[0].gestalt, 13), ade=np.full_like(scene.views[0].ade, 25),
    )  # fmt: skip
    scene = dataclasses.replace(scene, views=(view,))
    # One ray: at 10 m, 10.4 m and 12 m; and one far beside it.
    xyz = np.array([[0, 0, 10], [0, 0, 10.4], [0, 0, 12], [2, 2, 12]], np.float32)
    for impl in ("reference", "native"):
        assert label_points(xyz, scene, impl=impl).keep.all()
        assert label_points(xyz, scene, zbuffer=0.05, impl=impl).keep.tolist() == [True, True, False, True]


def test_registered_operations_pass_opcheck():
    batch = SceneBatch.from_scenes(mixed_scenes()[:2])
    mask, limits, *_ = run_ops(batch, "reference")
    geometry = (batch.views, batch.K, batch.R, batch.t)
    votes = ops.vote_labels(batch, batch.points, batch.point_offsets)
    ones = torch.ones(len(batch.points), dtype=torch.bool)
    source, group = ones.to(torch.uint8), ones.to(torch.int8)
    ragged = (ones, batch.point_offsets, batch.keys)
    offsets = (batch.point_offsets, batch.view_offsets)
    for impl in ("reference", "native"):
        calls = [
            (_house_mask, (batch.gestalt, batch.views, 5)),
            (_clip_limits, (batch.depth, batch.views)),
            (_depth_points, (batch.depth, mask, limits, *geometry, batch.keys, 20, 0)),
            (_vote_labels, (batch.points, *offsets, batch.ade, batch.gestalt, *geometry, -1.0)),
            (_point_tiers, tuple(votes[:3])),
            (_centre_and_scale, (batch.points, source, *ragged, 0)),
            (_priority_sample, (source, group, *ragged, 30, 0)),
        ]
        for op, arguments in calls:
            torch.library.opcheck(op, (*arguments, impl, 2))


def test_several_python_threads_at_once_give_the_same_bits():
    scenes = [random_scene(seed, views=5, points=3000) for seed in range(3)]
    expected = [fuse_views(scene, 300, impl="reference") for scene in scenes]
    wrong = []

    def work(number):
        for round_ in range(15):
            which = (number + round_) % len(scenes)
            try:
                assert_same(fuse_views(scenes[which], 300, impl="native", threads=1 + round_ % 4), expected[which])
            except BaseException as problem:
                wrong.append(problem)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_native_call_leaves_the_gil_to_others():
    cloud = np.random.default_rng(0).random((300_000, 3), dtype=np.float32)
    module, chosen, ticks, call = native.module(), np.empty(150_000, np.int64), [], []

    def work():
        call.append(time.perf_counter())
        module.farthest_point_sample(cloud, 0, chosen)
        call.append(time.perf_counter())

    worker = threading.Thread(target=work)
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        ticks.append(time.perf_counter())
    # A call that kept it would be one gap as long as the call.
    gaps = np.diff([call[0], *(tick for tick in ticks if call[0] < tick < call[1]), call[1]])
    # Long enough for many ticks.
    assert call[1] - call[0] > 0.01
    assert gaps.max() < 0.5 * gaps.sum()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_helpers():
    scene = random_scene(1, points=5000)
    expected = fuse_views(scene, 100, impl="native", threads=4)
    child = os.fork()
    if child == 0:
        # A child that waits for the parent's helpers would hang here and be killed.
        same = False
        try:
            assert_same(fuse_views(scene, 100, impl="native", threads=4), expected)
            same = True
        finally:
            os._exit(0 if same else 1)
    finished = threading.Event()
    status = []
    waiter = threading.Thread(target=lambda: (status.append(os.waitpid(child, 0)[1]), finished.set()))
    waiter.start()
    if not finished.wait(60):
        os.kill(child, 9)
    waiter.join()
    assert status == [0]


def test_tiers_of_all_labels_even_those_no_view_gives():
    ids = torch.arange(-1, 256, dtype=torch.int16)
    grid = torch.meshgrid(torch.arange(3, dtype=torch.int16), ids, ids, indexing="ij")
    source, visible, behind = grid[0].flatten().to(torch.uint8), grid[1].flatten(), grid[2].flatten()
    expected = ops.point_tiers(source, visible, behind, impl="reference")
    assert set(expected[0].tolist()) == {-1, 0, 1, 2, 3, 4} and set(expected[1].tolist()) == set(range(13))
    assert_same(ops.point_tiers(source, visible, behind, impl="native"), expected)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("big", [2**40, 2**70])
def test_numbers_beyond_any_array_are_taken_for_all_there_is(impl, big):
    batch = SceneBatch.from_scenes([random_scene(1, views=2)])
    assert_same(ops.house_mask(batch, radius=big, impl=impl), ops.house_mask(batch, radius=100, impl=impl))
    everything = (ops.house_mask(batch, threads=big, impl=impl), ops.clip_limits(batch, threads=big, impl=impl))
    pixels = batch.most_depth_pixels
    assert_same(ops.depth_points(batch, *everything, big, impl=impl), ops.depth_points(batch, *everything, pixels))
    for wrong in (1.5, "2", None):
        with pytest.raises(TypeError, match="house_mask: radius must be an integer"):
            ops.house_mask(batch, radius=wrong, impl=impl)
    with pytest.raises(ValueError, match="house_mask: radius must be at least 0"):
        ops.house_mask(batch, radius=-1, impl=impl)
    with pytest.raises(TypeError, match="threads must be an integer"):
        ops.house_mask(batch, threads=1.5, impl=impl)


@pytest.mark.parametrize("seed", [np.int64(-5), np.uint64(2**63), np.int32(7), torch.tensor(3), True, 2**70 + 1])
def test_any_integer_is_a_seed(seed):
    scene = random_scene(1)
    for impl in ("reference", "native"):
        points = fuse_views(scene, 40, seed, impl=impl)
        assert_same(points, fuse_views(scene, 40, int(seed), impl=impl))
        for sampler in ("priority", "fps"):
            got = sample_points(points, 32, seed, sampler=sampler, impl=impl)
            assert_same(got, sample_points(points, 32, int(seed), sampler=sampler, impl=impl))
    with pytest.raises(TypeError, match="seed must be an integer"):
        fuse_views(scene, 40, 1.5)


def test_an_explicit_choice_that_cannot_run_is_refused(monkeypatch):
    batch = SceneBatch.from_scenes(mixed_scenes()[:1])
    with pytest.raises(ImplementationError, match="house_mask: impl 'triton'"):
        ops.house_mask(batch, impl="triton")
    with pytest.raises(ValueError, match="unknown impl 'fast'"):
        ops.house_mask(batch, impl="fast")
    monkeypatch.setattr(native, "problem", lambda name="_C": "it was not compiled")
    with pytest.raises(ImplementationError, match="house_mask: impl 'native' cannot run: it was not compiled"):
        ops.house_mask(batch, impl="native")
    assert_same(ops.house_mask(batch), ops.house_mask(batch, impl="reference"))


# ---- What hostile callers hand over ----

VIEWS = st.lists(st.integers(-(2**62), 2**62) | st.integers(-3, 40), min_size=8, max_size=8)


@QUICK
@given(VIEWS, st.integers(0, 2))
def test_a_wild_view_table_is_refused_by_the_native_module(row, which):
    batch = SceneBatch.from_scenes([random_scene(1, views=3)])
    table = batch.views.clone()
    table[which] = torch.tensor(row)
    out = np.zeros(len(batch.gestalt), bool)
    try:
        native.module().house_mask(batch.gestalt.numpy(), table.numpy(), LABEL_TABLES, 2, out, 2)
    except ValueError as problem:
        assert "views" in str(problem)
    else:
        _, index, height, width, labels, *_ = row
        assert index >= 0 and height * width + labels <= len(batch.gestalt) and labels >= 0


COORDINATES = st.floats(width=32, allow_nan=True, allow_infinity=True)


@QUICK
@given(st.lists(st.tuples(COORDINATES, COORDINATES, COORDINATES), max_size=30), st.sampled_from([None, 0.1]))
def test_any_point_is_labelled_alike_and_never_with_nan(points, zbuffer):
    xyz = np.array(points, dtype=np.float32).reshape(-1, 3)
    scene = random_scene(1, views=3)
    expected = label_points(xyz, scene, impl="reference", zbuffer=zbuffer)
    got = label_points(xyz, scene, impl="native", zbuffer=zbuffer)
    assert_same(got, expected)
    assert not np.isnan(got.vote_frac).any()
    assert not got.keep[~np.isfinite(xyz).all(axis=1)].any()


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@QUICK
@given(st.lists(NUMBERS, min_size=16, max_size=16), st.integers(0, 50))
def test_a_degenerate_camera_gives_the_same_bits_and_no_nan(numbers, count):
    scene = random_scene(1, views=2)
    K = np.array([[numbers[0], 0, numbers[1]], [0, numbers[2], numbers[3]], [0, 0, 1]], np.float32)
    R, t = np.array(numbers[4:13], np.float32).reshape(3, 3), np.array(numbers[13:], np.float32)
    views = (dataclasses.replace(scene.views[0], K=K, R=R, t=t), scene.views[1])
    scene = dataclasses.replace(scene, views=views)
    with np.errstate(all="ignore"):
        expected = fuse_views(scene, count, impl="reference")
    got = fuse_views(scene, count, impl="native")
    assert_same(got, expected)
    assert np.isfinite(got.xyz).all() and np.isfinite(got.vote_frac).all()
    with np.errstate(all="ignore"):
        sample = sample_points(got, 32, impl="native")
        assert_same(sample, sample_points(expected, 32, impl="reference"))
    # A point at 1e38 divided by a small scale is no longer a float32, but a number it remains.
    assert not np.isnan(sample.xyz_norm).any()


@QUICK
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_the_mask_is_the_same_for_any_size_and_radius(height, width, radius, seed):
    rng = np.random.default_rng(seed)
    scene = random_scene(1, views=1)
    ids = np.where(rng.random((height, width)) < 0.9, 0, 13).astype(np.uint8)
    scene = dataclasses.replace(scene, views=(dataclasses.replace(scene.views[0], ade=ids, gestalt=ids, depth=None),))
    batch = SceneBatch.from_scenes([scene])
    got = ops.house_mask(batch, radius=radius, impl="native")
    assert_same(got, ops.house_mask(batch, radius=radius, impl="reference"))
    ys, xs = np.nonzero(ids == 13)
    grid = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1)
    near = (np.abs(grid[:, :, None] - np.stack([ys, xs], -1)).max(-1) <= radius).any(-1)
    assert np.array_equal(got.numpy().reshape(height, width), near)


@QUICK
@given(st.lists(st.integers(0, 65535), min_size=1, max_size=60))
def test_clip_limits_are_numpy_percentiles(values):
    depth = np.array([values], np.uint16)
    scene = random_scene(1, views=1)
    scene = dataclasses.replace(scene, views=(dataclasses.replace(scene.views[0], depth=depth),))
    batch = SceneBatch.from_scenes([scene])
    positive = depth[depth > 0].astype(np.float64)
    expected = np.percentile(positive, 99.5) if positive.size else 0.0
    for impl in ("reference", "native"):
        assert ops.clip_limits(batch, impl=impl).tolist() == [expected]


def test_the_native_module_refuses_what_is_not_a_fitting_buffer():
    module = native.module()
    batch = SceneBatch.from_scenes([random_scene(1)])
    good = (batch.depth.numpy(), batch.views.numpy(), np.zeros(len(batch.views)), 1)
    module.clip_limits(*good)
    readonly = good[2].copy()
    readonly.flags.writeable = False
    for place, bad, message in [
        (0, good[0].astype(np.int32), "depth must be uint16"),
        (0, good[0][::2], "depth must be contiguous"),
        (0, [1, 2], "depth is not a buffer"),
        (1, good[1][:, :7].copy(), "views must have shape"),
        (2, np.zeros(len(batch.views) + 1), "out must have shape"),
        (2, readonly, "read-only|writable"),
    ]:
        with pytest.raises((ValueError, TypeError, BufferError), match=message):
            module.clip_limits(*good[:place], bad, *good[place + 1 :])
