"""The CUDA kernels against the NumPy reference, bit for bit, without a GPU.

csrc/cuda is compiled as C++ against an emulation of CUDA (cuda_emulation/): threads and blocks run in several orders,
and every memory access is checked for races, for bounds and for what was never written.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cuda_emulation.build import build
from fusion_cases import assert_same, mixed_scenes
from scenes import random_scene, random_view
from wireframe.kernels import native, native_cuda, numpy_reference
from wireframe.scene_batch import SceneBatch

ORDERS = {"ascending": (0, 0), "descending": (1, 0), "shuffled": (2, 1)}
NO_CHECKS, BOUNDS, ALL_CHECKS = range(3)
COMPILER = os.environ.get("CXX") or "g++"

pytestmark = pytest.mark.skipif(not shutil.which(COMPILER.split()[0]), reason=f"no {COMPILER}")


class Emulation:
    """The emulated module; it hears of the buffers from ``native_cuda``."""

    def __init__(self, folder):
        self.module, self.library = build(folder, COMPILER)
        for name, *types in (
            ("input", ctypes.c_uint64, ctypes.c_int64, ctypes.c_size_t),
            ("output", ctypes.c_uint64, ctypes.c_int64, ctypes.c_size_t),
            ("order", ctypes.c_int, ctypes.c_uint64), ("check", ctypes.c_int), ("forget_buffers",),
            ("toy", ctypes.c_char_p, ctypes.c_uint64, ctypes.c_char_p, ctypes.c_size_t),
        ):  # fmt: skip
            function = getattr(self.library, f"emulation_{name}")
            function.argtypes, function.restype = types, None
            setattr(self, name, function)

    def address(self, tensor):
        self.input(tensor.data_ptr(), tensor.nbytes, tensor.element_size())
        return tensor.data_ptr()

    def empty(self, shape, dtype, device):
        tensor = torch.empty(shape, dtype=dtype, device=device)
        # A place that is never written must not look right by chance.
        tensor.view(torch.uint8).fill_(0xA5)
        self.output(tensor.data_ptr(), tensor.nbytes, tensor.element_size())
        return tensor

    @contextlib.contextmanager
    def queue(self, device):
        try:
            yield 0, 0
        finally:
            self.forget_buffers()

    def run_toy(self, name, order, checks=ALL_CHECKS):
        """What the toy kernel gives, uint32 [128], and the error."""
        out = np.full(128, 99, dtype=np.uint32)
        error = ctypes.create_string_buffer(400)
        self.order(*ORDERS[order])
        self.check(checks)
        self.output(out.ctypes.data, out.nbytes, 4)
        self.toy(name.encode(), out.ctypes.data, error, len(error))
        self.forget_buffers()
        self.check(ALL_CHECKS)
        return out, error.value.decode()


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    return Emulation(tmp_path_factory.mktemp("emulation"))


@pytest.fixture(params=ORDERS)
def order(request):
    return request.param


@pytest.fixture
def kernels(order, emulation, monkeypatch):
    """``native_cuda`` on CPU tensors, with the threads in one of the orders."""
    emulation.order(*ORDERS[order])
    emulation.check(ALL_CHECKS)
    monkeypatch.setattr(native, "module", lambda name: emulation.module)
    for name in ("address", "empty", "queue"):
        monkeypatch.setattr(native_cuda, f"_{name}", getattr(emulation, name))
    return native_cuda


def cameras(batch):
    return batch.K, batch.R, batch.t


def run_views(kernels, batch, count=60, zbuffer=-1.0):
    """The operations on maps, each fed with what the others gave."""
    mask = kernels.house_mask(batch.gestalt, batch.views, 5, 1)
    limits = kernels.clip_limits(batch.depth, batch.views, 1)
    drawn = kernels.depth_points(batch.depth, mask, limits, batch.views, *cameras(batch), batch.keys, count, 3, 1)
    votes = vote(kernels, batch, batch.points, batch.point_offsets, zbuffer)
    return mask, limits, drawn, votes, kernels.point_tiers(*votes[:3], 1)


def vote(kernels, batch, xyz, offsets, zbuffer=-1.0):
    maps = (batch.view_offsets, batch.ade, batch.gestalt, batch.views)
    return kernels.vote_labels(xyz, offsets, *maps, *cameras(batch), zbuffer, 1)


@functools.cache
def large_scenes():
    """Maps and clouds of several blocks; 40 views, so that cameras are loaded more than once."""
    rng = np.random.default_rng(8)
    views = [random_view(rng, i, 150, 110) for i in range(2)]
    other_size = rng.integers(0, 9000, (131, 97)).astype(np.uint16)
    views[1] = dataclasses.replace(views[1], depth=other_size)
    many = random_scene(9, views=40, points=100)
    small = tuple(dataclasses.replace(view, depth=None) for view in many.views)
    return [
        dataclasses.replace(random_scene(7, points=9000), views=tuple(views)),
        dataclasses.replace(many, views=small),
    ]


def random_points(sizes, seed=0, kept=0.7):
    """Arguments of the sampling operations: clouds with ties, scenes of these sizes."""
    rng = np.random.default_rng(seed)
    n = sum(sizes)
    xyz = rng.normal(size=(n, 3)) * [4, 2, 3] + [10, -3, 0.01]
    # Rounded: many coordinates are equal.
    xyz[::3] = np.round(xyz[::3], 1) + 0.05
    xyz[rng.random(n) < 0.02] *= 100
    return {
        "xyz": torch.from_numpy(xyz.astype(np.float32)),
        "source": torch.from_numpy((rng.random(n) < 0.4).astype(np.uint8)),
        "group_id": torch.from_numpy(rng.choice(5, size=n, p=[0.02, 0.1, 0.3, 0.3, 0.28]).astype(np.int8)),
        "keep": torch.from_numpy(rng.random(n) < kept),
        "offsets": torch.tensor([0, *np.cumsum(sizes)]),
        "keys": torch.from_numpy(rng.integers(-(1 << 63), (1 << 63) - 1, size=len(sizes))),
    }


@functools.cache
def sampling_cases():
    """By name: points, and how many are to be sampled."""
    ragged = random_points([0, 1, 700, 2, 40, 500, 3])
    first, last = ragged["offsets"][4:6]
    ragged["keep"][first:last] = False
    one_source = random_points([300, 300], seed=1)
    one_source["source"][:300], one_source["source"][300:] = 0, 1
    tiers = random_points([400], seed=2)
    # Any int8 is a tier, in its order.
    tiers["group_id"] = torch.from_numpy(np.random.default_rng(0).integers(-128, 128, 400).astype(np.int8))
    large = random_points([24000, 800, 3000], seed=3, kept=0.9)
    large["source"][:24000] = 1
    equal = random_points([500], seed=4)
    equal["xyz"][:] = 1.5
    return {
        "ragged": (ragged, 64), "one source": (one_source, 100), "tiers": (tiers, 50), "large": (large, 1000),
        "equal points": (equal, 8), "none": (random_points([]), 4), "no points": (random_points([0, 0]), 4),
    }  # fmt: skip


def centre(kernels, p):
    return kernels.centre_and_scale(p["xyz"], p["source"], p["keep"], p["offsets"], p["keys"], 5, 1)


def sample(kernels, p, num_points):
    return kernels.priority_sample(p["source"], p["group_id"], p["keep"], p["offsets"], p["keys"], num_points, 5, 1)


@pytest.mark.parametrize("zbuffer", [-1.0, 0.05])
def test_maps_of_mixed_scenes_give_the_bits_of_the_reference(kernels, zbuffer):
    batch = SceneBatch.from_scenes(mixed_scenes())
    assert_same(run_views(kernels, batch, zbuffer=zbuffer), run_views(numpy_reference, batch, zbuffer=zbuffer))


def test_maps_and_clouds_of_many_blocks_give_the_bits_of_the_reference(kernels):
    batch = SceneBatch.from_scenes(large_scenes())
    got, expected = (run_views(module, batch, 3000, 0.1) for module in (kernels, numpy_reference))
    assert_same(got, expected)
    # The draw was one: more candidates than places.
    assert int(expected[2][1][0]) == 3000


@pytest.mark.parametrize("count", [0, 1, 37, 5000])
def test_any_count_of_depth_points_gives_the_bits_of_the_reference(kernels, count):
    batch = SceneBatch.from_scenes(mixed_scenes())
    got, expected = (run_views(module, batch, count)[2] for module in (kernels, numpy_reference))
    assert_same(got, expected)


@pytest.mark.parametrize("radius", [0, 1, 7, 1 << 40])
def test_any_radius_gives_the_bits_of_the_reference(kernels, radius):
    batch = SceneBatch.from_scenes(mixed_scenes())
    reach = min(radius, 100)
    expected = numpy_reference.house_mask(batch.gestalt, batch.views, reach, 1)
    assert_same(kernels.house_mask(batch.gestalt, batch.views, radius, 1), expected)


@pytest.mark.parametrize("case", sampling_cases())
def test_sampling_gives_the_bits_of_the_reference(kernels, case):
    points, num_points = sampling_cases()[case]
    assert_same(centre(kernels, points), centre(numpy_reference, points))
    assert_same(sample(kernels, points, num_points), sample(numpy_reference, points, num_points))


@pytest.mark.parametrize("num_points", [1, 2, 255, 700, 3000])
def test_any_sample_size_gives_the_bits_of_the_reference(kernels, num_points):
    points, _ = sampling_cases()["ragged"]
    assert_same(sample(kernels, points, num_points), sample(numpy_reference, points, num_points))


def test_every_label_gets_the_tier_of_the_reference(kernels):
    ids = torch.arange(-1, 256, dtype=torch.int16)
    triples = torch.cartesian_prod(torch.arange(3, dtype=torch.int16), ids, ids[:40])
    labels = (triples[:, 0].to(torch.uint8), triples[:, 1].contiguous(), triples[:, 2].contiguous())
    assert_same(kernels.point_tiers(*labels, 1), numpy_reference.point_tiers(*labels, 1))


def test_points_that_are_not_finite_get_no_vote(kernels):
    batch = SceneBatch.from_scenes([random_scene(1)])
    xyz = batch.points.clone()
    xyz[::4] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    xyz[1::4] = 3e38
    offsets = batch.point_offsets
    for zbuffer in (-1.0, 0.1):
        got, expected = (vote(module, batch, xyz, offsets, zbuffer) for module in (kernels, numpy_reference))
        assert_same(got, expected)


def test_points_of_a_scene_without_views_get_no_vote(kernels):
    batch = SimpleNamespace(**vars(SceneBatch.from_scenes([random_scene(1, views=3)])))
    batch.view_offsets = torch.tensor([0, 0, 3, 3])
    offsets = torch.tensor([0, 150, 300, 400])
    for zbuffer in (-1.0, 0.1):
        got, expected = (vote(module, batch, batch.points, offsets, zbuffer) for module in (kernels, numpy_reference))
        assert_same(got, expected)


def test_no_scenes_give_empty_tensors(kernels):
    batch = SceneBatch.from_scenes([])
    assert_same(run_views(kernels, batch), run_views(numpy_reference, batch))


@pytest.mark.parametrize("order", ["shuffled"])
def test_a_scene_alone_gives_the_bits_it_has_in_a_batch(kernels):
    scenes = mixed_scenes()[:4]
    batch = SceneBatch.from_scenes(scenes)
    _, limits, (drawn, counts), votes, _ = run_views(kernels, batch, zbuffer=0.1)
    for b, scene in enumerate(scenes):
        alone = SceneBatch.from_scenes([scene])
        views, points = slice(*batch.views_of[b : b + 2]), slice(*batch.points_of[b : b + 2])
        _, own_limits, own_drawn, own_votes, _ = run_views(kernels, alone, zbuffer=0.1)
        assert_same((limits[views], drawn[views], counts[views]), (own_limits, *own_drawn))
        assert_same(tuple(x[points] for x in votes), own_votes)


@pytest.mark.parametrize("order", ["shuffled"])
def test_a_scene_alone_is_sampled_as_in_a_batch(kernels):
    points, num_points = sampling_cases()["ragged"]
    center, scale = centre(kernels, points)
    index, count = sample(kernels, points, num_points)
    offsets = points["offsets"].tolist()
    for b, (first, last) in enumerate(zip(offsets[:-1], offsets[1:])):
        alone = {name: points[name][first:last] for name in ("xyz", "source", "group_id", "keep")}
        alone |= {"offsets": torch.tensor([0, last - first]), "keys": points["keys"][b : b + 1]}
        assert_same(centre(kernels, alone), (center[b : b + 1], scale[b : b + 1]))
        own_index, own_count = sample(kernels, alone, num_points)
        own_index[own_index >= 0] += first
        assert_same((own_index, own_count), (index[b : b + 1], count[b : b + 1]))


# The emulation fails an access outside the buffers. Scenes that claim the same points may race for them.
@pytest.mark.parametrize("order", ["shuffled"])
@pytest.mark.parametrize("column", range(8))
@pytest.mark.parametrize("value", [-1, 1 << 31, (1 << 63) - 1, -(1 << 63)])
def test_no_view_table_reaches_beyond_the_buffers(emulation, kernels, column, value):
    emulation.check(BOUNDS)
    batch = SimpleNamespace(**vars(SceneBatch.from_scenes(mixed_scenes()[:2])))
    good = batch.views
    for row in (0, len(good) - 1):
        batch.views = good.clone()
        batch.views[row, column] = value
        run_views(kernels, batch, zbuffer=0.1)


@pytest.mark.parametrize("order", ["shuffled"])
@pytest.mark.parametrize("value", [-1, 5, 1 << 40, -(1 << 63)])
def test_no_offsets_reach_beyond_the_buffers(emulation, kernels, value):
    emulation.check(BOUNDS)
    points, num_points = sampling_cases()["ragged"]
    batch = SceneBatch.from_scenes(mixed_scenes()[:3])
    for place in (0, 2, -1):
        for name in ("view_offsets", "point_offsets"):
            wrong = SimpleNamespace(**vars(batch))
            setattr(wrong, name, getattr(batch, name).clone())
            getattr(wrong, name)[place] = value
            vote(kernels, wrong, batch.points, wrong.point_offsets)
        offsets = points["offsets"].clone()
        offsets[place] = value
        centre(kernels, points | {"offsets": offsets})
        sample(kernels, points | {"offsets": offsets}, num_points)


@pytest.mark.parametrize("order", ["ascending"])
def test_a_workspace_that_is_too_small_is_refused(kernels, monkeypatch):
    monkeypatch.setattr(native_cuda, "_workspace", lambda size, device: torch.empty(size - 1, dtype=torch.uint8))
    batch = SceneBatch.from_scenes([random_scene(1)])
    with pytest.raises(ValueError, match="clip_limits: workspace must have 262400 bytes, got 262399"):
        kernels.clip_limits(batch.depth, batch.views[:1], 1)


@pytest.mark.parametrize("order", ["ascending"])
def test_wrong_tensors_are_refused_by_name(kernels):
    batch = SceneBatch.from_scenes([random_scene(1)])
    with pytest.raises(ValueError, match="clip_limits: depth must be uint16"):
        kernels.clip_limits(batch.gestalt, batch.views, 1)
    with pytest.raises(ValueError, match=r"house_mask: views must be int64 \[5, 8\], got int64 \[5, 7\]"):
        kernels.house_mask(batch.gestalt, batch.views[:, :7], 5, 1)
    with pytest.raises(ValueError, match="vote_labels: xyz must be contiguous"):
        vote(kernels, batch, batch.points.T.contiguous().T, batch.point_offsets)
    with pytest.raises(ValueError, match="vote_labels: offsets must be on cpu, got meta"):
        vote(kernels, batch, batch.points, batch.point_offsets.to("meta"))


MISTAKES = {
    "no_barrier": "race: (reads|writes) shared memory|reads shared memory that nobody has written",
    "no_second_barrier": "race: (reads|writes) shared memory",
    "blocks_race": "race: writes global memory",
    "ended": "barrier divergence",
    "two_barriers": "barrier divergence",
    "outside": r"writes 4 bytes outside the buffers, at 0 bytes behind a buffer of 512",
    "before": r"writes 4 bytes outside the buffers, at 4 bytes before a buffer of 512",
    "shared_index": "indexes an array at 64",
    "shift": "a shift is too wide",
    "unwritten": "reads shared memory that nobody has written",
    "unwritten_output": "reads global memory that nobody has written",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_the_emulation_finds_the_mistake(emulation, name, order):
    _, error = emulation.run_toy(name, order)
    assert error and re.search(MISTAKES[name], error), error


def test_the_emulation_finds_nothing_where_nothing_is_wrong(emulation):
    for order in ORDERS:
        out, error = emulation.run_toy("neighbour", order)
        assert error == ""
        assert out.tolist() == 2 * [((i + 1) % 64) ** 2 for i in range(64)]


@pytest.mark.parametrize("name", ["no_barrier", "no_second_barrier", "blocks_race", "unordered"])
def test_the_orders_alone_tell_what_depends_on_them(emulation, name):
    results = [emulation.run_toy(name, order, checks=NO_CHECKS) for order in ORDERS]
    assert all(error == "" for _, error in results)
    assert len({out.tobytes() for out, _ in results}) > 1
