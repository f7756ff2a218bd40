"""What the native fusion does otherwise than the reference: rows of votes, vectors, samples that say where to look."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_cases import assert_same
from scenes import random_scene
from wireframe.kernels import native, native_cpu, ops
from wireframe.scene_batch import SceneBatch
from wireframe.voting import LABEL_TABLES

pytestmark = pytest.mark.native

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def crowd(views, seed=0):
    """A scene whose views differ in their labels alone, all ids among them, and points in and around the house."""
    rng = np.random.default_rng(seed)
    scene = random_scene(1, views=1, points=700)
    few = rng.choice(256, 5)
    seen = tuple(
        dataclasses.replace(
            scene.views[0],
            index=number,
            gestalt=rng.choice(few if number % 2 else 256, scene.views[0].gestalt.shape).astype(np.uint8),
            ade=rng.integers(0, 256, scene.views[0].ade.shape).astype(np.uint8),
        )
        for number in range(views)
    )
    return dataclasses.replace(scene, order_id=f"crowd {views}", views=seen)


def portable_vote(batch, xyz, offsets, zbuffer):
    """ops.vote_labels by the code for processors without AVX2."""
    module = native.module()

    class Portable:
        @staticmethod
        def vote_labels(*arguments):
            module.vote_labels(*arguments, vector=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_cpu.native, "module", lambda: Portable)
        return ops.vote_labels(batch, xyz, offsets, zbuffer=zbuffer, impl="native")


def check_votes(batch, xyz, offsets, zbuffer=None):
    expected = ops.vote_labels(batch, xyz, offsets, zbuffer=zbuffer, impl="reference")
    assert_same(ops.vote_labels(batch, xyz, offsets, zbuffer=zbuffer, impl="native", threads=2), expected)
    assert_same(portable_vote(batch, xyz, offsets, zbuffer), expected)
    return expected


@pytest.mark.parametrize("zbuffer", [None, 0.01])
def test_votes_of_any_number_of_views(zbuffer):
    scenes = [crowd(views) for views in (1, 2, 62, 63, 64, 65, 300)]
    batch = SceneBatch.from_scenes(scenes)
    votes = check_votes(batch, batch.points, batch.point_offsets, zbuffer)
    # 300 views: more than a uint8 counts.
    assert votes.support.max() == 255 and set(votes.visible_src.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("views", [63, 64])
def test_a_unanimous_vote_of_the_largest_ids(views):
    scene = crowd(views)
    for gestalt, ade in ((13, 255), (13, 25), (255, 255)):
        same = tuple(
            dataclasses.replace(v, gestalt=np.full_like(v.gestalt, gestalt), ade=np.full_like(v.ade, ade))
            for v in scene.views
        )
        batch = SceneBatch.from_scenes([dataclasses.replace(scene, views=same)])
        check_votes(batch, batch.points, batch.point_offsets)


ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)
NUMBERS = st.one_of(ANY, st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-6, 1e30, -1e30]), st.floats(-100, 100, width=32))


@QUICK
@given(
    st.lists(NUMBERS, min_size=21, max_size=21),
    st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=40),
    st.sampled_from([None, 0.1]),
)
def test_any_camera_and_any_point(camera, points, zbuffer):
    xyz = torch.from_numpy(np.array(points, dtype=np.float32).reshape(-1, 3))
    batch = SceneBatch.from_scenes([random_scene(1, views=2)])
    K, R, t = (torch.tensor(part) for part in (camera[:9], camera[9:18], camera[18:]))
    batch.K[0], batch.R[0], batch.t[0] = K.reshape(3, 3), R.reshape(3, 3), t
    with np.errstate(all="ignore"):
        check_votes(batch, xyz, torch.tensor([0, len(xyz)]), zbuffer)


def test_pixels_at_the_borders_and_between_two():
    scene = crowd(3)
    height, width = scene.views[0].gestalt.shape
    K, R, t = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32), np.zeros(3, np.float32)
    views = tuple(dataclasses.replace(view, K=K, R=R, t=t) for view in scene.views)
    batch = SceneBatch.from_scenes([dataclasses.replace(scene, views=views)])
    # Halves, which round to even, and the neighbours of the borders.
    u, v = (np.float32([-0.5, -0.0, 0.5, 1.5, 2.5, size - 1.5, size - 0.5, size]) for size in (width, height))
    u, v = (np.concatenate([a, np.nextafter(a, np.float32(-9)), np.nextafter(a, np.float32(9e9))]) for a in (u, v))
    xyz = np.stack([*np.meshgrid(u, v), np.ones((len(v), len(u)))], -1).reshape(-1, 3).astype(np.float32)
    votes = check_votes(batch, torch.from_numpy(xyz), torch.tensor([0, len(xyz)]))
    assert 0 < (votes.support > 0).sum() < len(xyz)


@QUICK
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 20), st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_the_mask_of_patches(width, height, patch, radius, seed):
    rng = np.random.default_rng(seed)
    ids = rng.choice([0, 1, 13, 255], (height, width // patch + 1)).repeat(patch, axis=1)[:, :width].astype(np.uint8)
    scene = random_scene(1, views=1)
    scene = dataclasses.replace(scene, views=(dataclasses.replace(scene.views[0], ade=ids, gestalt=ids, depth=None),))
    batch = SceneBatch.from_scenes([scene])
    how = {"radius": radius}
    assert_same(ops.house_mask(batch, **how, impl="native"), ops.house_mask(batch, **how, impl="reference"))


@pytest.mark.parametrize("far", [1, 97])
@pytest.mark.parametrize("share", [0.0, 0.003, 0.004, 0.006, 0.02, 0.5])
def test_clip_limits_where_a_sample_of_the_depths_misleads(far, share):
    rng = np.random.default_rng(7)
    depth = rng.integers(0, 6000, (160, 200)).astype(np.uint16)
    depth.ravel()[rng.random(depth.size) < share] = 60000
    # Every so many-th pixel is what the native version looks at first.
    depth.ravel()[:: depth.size // 4096 + 1] = 50000 if far == 1 else 0
    batch = with_depth(depth)
    positive = depth[depth > 0].astype(np.float64)
    assert ops.clip_limits(batch, impl="native").tolist() == [np.percentile(positive, 99.5)]


def with_depth(depth, **labels):
    scene = random_scene(1, views=1)
    return SceneBatch.from_scenes([dataclasses.replace(scene, views=(dataclasses.replace(
        scene.views[0], depth=depth, **labels
    ),))])  # fmt: skip


@pytest.mark.parametrize("count", [0, 1, 2, 50, 2999, 3000, 10**6])
def test_any_number_of_depth_points(count):
    rng = np.random.default_rng(8)
    for height, width in ((50, 60), (1, 3000), (3000, 1), (45, 67)):
        depth = (rng.integers(1, 9000, (height, width)) * (rng.random((height, width)) < 0.9)).astype(np.uint16)
        labels = np.full((50, 60), 13, np.uint8)
        batch = with_depth(depth, gestalt=labels, ade=labels)
        mask, limits = ops.house_mask(batch), ops.clip_limits(batch)
        expected = ops.depth_points(batch, mask, limits, count, 5, impl="reference")
        assert_same(ops.depth_points(batch, mask, limits, count, 5, impl="native"), expected)


def clouds():
    rng = np.random.default_rng(9)
    for n in (1, 2, 3, 31, 32, 33, 34, 400, 401, 7999, 8000, 8001, 30000):
        yield rng.normal(size=(n, 3))
        yield rng.integers(0, 2, (n, 3))
        yield np.zeros((n, 3))
        yield np.arange(3 * n).reshape(n, 3)
        yield rng.choice([0.0, -0.0, 3e38, -3e38, 1e-45], (n, 3))


@pytest.mark.parametrize("only_depth", [False, True])
def test_centre_and_scale_of_any_cloud(only_depth):
    keys = torch.tensor([3])
    for cloud in clouds():
        xyz = torch.from_numpy(cloud.astype(np.float32))
        n = len(xyz)
        source = torch.ones(n, dtype=torch.uint8) if only_depth else (torch.arange(n) % 3 == 1).to(torch.uint8)
        rest = (source, torch.arange(n) % 7 != 6, torch.tensor([0, n]), keys, 1)
        with np.errstate(over="ignore"):
            expected = ops.centre_and_scale(xyz, *rest, impl="reference")
        assert_same(ops.centre_and_scale(xyz, *rest, impl="native"), expected)


@QUICK
@given(
    st.lists(st.integers(-128, 127), min_size=1, max_size=6), st.integers(0, 6000), st.integers(1, 3000),
    st.floats(0, 1), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_priority_sample_of_any_tiers(tiers, n, num_points, share, seed):
    rng = np.random.default_rng(seed)
    source = torch.from_numpy((rng.random(n) < share).astype(np.uint8))
    group = torch.from_numpy(rng.choice(np.int8(tiers), n))
    keep = torch.from_numpy(rng.random(n) < 0.9)
    rest = (keep, torch.tensor([0, n // 3, n]), torch.tensor([5, 6]), num_points, seed)
    expected = ops.priority_sample(source, group, *rest, impl="reference")
    assert_same(ops.priority_sample(source, group, *rest, impl="native"), expected)


@pytest.mark.parametrize("wrong", ["c8", ">f8", "i8", "f4", "S8", "f4,f4"])
def test_the_bindings_refuse_numbers_of_another_format(wrong):
    limits, depth, views = np.zeros(1), np.ones(6, np.uint16), np.array([[0, 0, 2, 3, 0, 2, 3, 0]])
    clip = native.module().clip_limits
    clip(depth, views, limits, 1)
    assert limits.tolist() == [1.0]
    with pytest.raises(TypeError, match=r"^out must be float64, got format "):
        clip(depth, views, np.zeros(1, wrong), 1)
    assert limits.tolist() == [1.0]


@pytest.mark.parametrize("wrong", [">i8", "u8", "f8", "c8", "i4"])
def test_the_bindings_refuse_integers_of_another_format(wrong):
    views = np.array([[0, 0, 2, 3, 0, 2, 3, 0]])
    with pytest.raises(TypeError, match=r"^views must be int64, got format "):
        native.module().clip_limits(np.ones(6, np.uint16), views.astype(wrong), np.zeros(1), 1)
    with pytest.raises(TypeError, match=r"^depth must be uint16, got format '>H'"):
        native.module().clip_limits(np.ones(6, ">u2"), views, np.zeros(1), 1)


@pytest.mark.parametrize(
    "column, value, words",
    [
        (4, 0, "does not begin where the maps before it end"),
        (4, 5, "does not begin where the maps before it end"),
        (7, 3, "does not begin where the maps before it end"),
        (7, -1, "does not begin where the maps before it end"),
        (2, 99, "lies outside the maps"),
        (6, 1 << 40, "lies outside the maps"),
        (2, -(1 << 62), "has an impossible size or index"),
    ],
)
def test_the_bindings_refuse_maps_that_overlap_or_leave_gaps(column, value, words):
    # The view between the others has no depth map.
    views = np.array([[0, 0, 2, 3, 0, 2, 3, 0], [0, 1, 2, 3, 6, 0, 0, 6], [0, 2, 2, 3, 12, 2, 3, 6]])
    depth, masks, limits, keys = np.ones(12, np.uint16), np.ones(18, bool), np.ones(3), np.zeros(1, np.int64)
    cameras = (np.stack([np.eye(3, dtype=np.float32)] * 3),) * 2 + (np.zeros((3, 3), np.float32),)
    xyz, counts = np.zeros((3, 9, 3), np.float32), np.zeros(3, np.int64)

    def points():
        native.module().depth_points(depth, masks, limits, views, *cameras, keys, 0, xyz, counts, 2)

    points()
    assert counts.tolist() == [6, 0, 6]
    views[2, column] = value
    with pytest.raises(ValueError, match=rf"^views: row 2 {words}"):
        points()


def test_a_radius_beyond_the_map_needs_no_room_for_itself():
    house = int(np.flatnonzero(LABEL_TABLES[0])[0])
    for height, width in ((1, 1 << 20), (1 << 20, 1)):
        gestalt = np.full(height * width, np.flatnonzero(LABEL_TABLES[0] == 0)[0], np.uint8)
        gestalt[-1] = house
        views, out = np.array([[0, 0, height, width, 0, 0, 0, 0]]), np.zeros(gestalt.size, bool)
        native.module().house_mask(gestalt, views, LABEL_TABLES, 2**62, out, 1)
        assert out.all()
