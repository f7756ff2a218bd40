"""Farthest point and voxel sampling: the native code picks exactly the points of plain definitions."""

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wireframe.kernels import native
from wireframe.kernels.dispatch import ImplementationError
from wireframe.kernels.point_subsets import farthest_point_sample, voxel_sample

pytestmark = pytest.mark.native

IMPLS = ("reference", "native")
quick = settings(max_examples=120, deadline=None, derandomize=True)


def lattice(side: int) -> np.ndarray:
    axis = np.arange(side)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


def house(rng: np.random.Generator, n: int) -> np.ndarray:
    """Walls, a roof, and a few points far away."""
    u, v = rng.random((2, n))
    wall = np.stack([10 * u, 6 * v, np.where(u > 0.5, 8.0, 0.0)], 1)
    roof = np.stack([10 * u, 6 + 4 * np.minimum(v, 1 - v), 8 * v], 1)
    points = np.where((np.arange(n) % 3 == 0)[:, None], roof, wall) + rng.normal(0, 0.02, (n, 3))
    points[::500] *= 300.0
    return points


def unlucky(n: int) -> np.ndarray:
    """The evenly spaced points, whose median the tree splits at, all lie at one end of the cloud."""
    points = np.arange(3 * n).reshape(n, 3) % 1009 + 2000.0
    points[[i * n // 31 for i in range(31)]] = np.arange(93).reshape(31, 3) * 0.5
    return points


def mirrored(rng: np.random.Generator, n: int) -> np.ndarray:
    """The origin and triples in every order: equal distances but for the rounding of each sum."""
    triples = rng.random((n, 3)) * 2.0 ** np.array([0, -7, -14])
    return np.concatenate([np.zeros((1, 3)), *(triples[:, order] for order in itertools.permutations(range(3)))])


def clouds() -> dict[str, tuple[np.ndarray, int]]:
    """Clouds float [P, 3] that reach each kind of tree and tie, and how many points to take."""
    rng = np.random.default_rng(0)
    huge = rng.uniform(-3.4e38, 3.4e38, (700, 3))
    return {
        "uniform": (rng.random((9000, 3)), 500),
        "house": (house(rng, 9000), 500),
        "plane": (rng.random((3000, 3)) * [1, 0, 1], 400),
        "line": (np.outer(rng.random(2000), [1, 2, 3]), 300),
        "lattice": (rng.permutation(lattice(14)), 1500),
        "lattice in order": (lattice(13), 1000),
        "all equal": (np.full((1000, 3), 0.1), 700),
        "few distinct": (rng.integers(0, 3, (2000, 3)), 1000),
        "1e30": (rng.normal(size=(700, 3)) * 1e30, 700),
        "3e38": (np.where(rng.random((700, 1)) < 0.5, np.sign(huge) * 3.4e38, huge), 700),
        "tiny": (rng.integers(-4, 5, (700, 3)) * 1e-45, 700),
        "rounding": (mirrored(rng, 400), 1500),
        "geometric": (np.outer(2.0 ** np.linspace(-120, 120, 2000), [1, 1, 0]), 2000),
        "unlucky": (unlucky(5000), 300),
        "all of them": (rng.random((700, 3)), 700),
        "more than there are": (rng.random((300, 3)), 1000),
        "one leaf": (rng.random((128, 3)), 100),
        "one leaf and a point": (rng.random((129, 3)), 129),
        "two points": (rng.random((2, 3)), 2),
        "one point": (rng.random((1, 3)), 5),
        "none": (np.zeros((0, 3)), 3),
    }


CLOUDS = clouds()


@pytest.mark.parametrize("name", CLOUDS)
def test_native_takes_the_points_of_the_reference(name):
    xyz, count = CLOUDS[name]
    xyz = torch.from_numpy(np.ascontiguousarray(xyz, dtype=np.float32))
    for start in sorted({0, len(xyz) // 2, max(len(xyz) - 1, 0)}):
        expected = farthest_point_sample(xyz, count, start=start, impl="reference")
        assert expected.dtype == torch.int64 and expected.shape == (min(count, len(xyz)),)
        assert len(expected.unique()) == len(expected)
        assert torch.equal(farthest_point_sample(xyz, count, start=start, impl="native"), expected)
        portable = np.full(expected.shape, -1)
        native.module().farthest_point_sample(xyz.numpy(), start, portable, vector=False)
        assert (portable == expected.numpy()).all()


def test_the_reference_is_the_definition():
    xyz = lattice(4).astype(np.float64)
    chosen, left = [5], set(range(64)) - {5}
    while left:
        distance = {i: min(((xyz[i] - xyz[j]) ** 2).sum() for j in chosen) for i in left}
        chosen.append(min(i for i in left if distance[i] == max(distance.values())))
        left.remove(chosen[-1])
    for impl in IMPLS:
        assert farthest_point_sample(torch.tensor(lattice(4)).float(), 64, start=5, impl=impl).tolist() == chosen


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lowest_index_and_repeated_points_come_last_in_order(impl):
    square = [[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]]
    xyz = torch.tensor([*square, *square[::-1]], dtype=torch.float32)
    assert farthest_point_sample(xyz, 8, impl=impl).tolist() == [0, 3, 1, 2, 4, 5, 6, 7]
    assert farthest_point_sample(xyz, 8, start=7, impl=impl).tolist() == [7, 3, 1, 2, 0, 4, 5, 6]


@quick
@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=1, min_side=0, max_side=400), elements=st.floats(
        width=32, allow_nan=False, allow_infinity=False)),
    st.integers(1, 200), st.integers(0, 200),
)  # fmt: skip
def test_any_finite_cloud_gives_the_points_of_the_reference(numbers, count, start):
    xyz = torch.from_numpy(numbers[: len(numbers) // 3 * 3].reshape(-1, 3))
    # Every third repeats another, so that ties and zeros are met too.
    xyz = torch.cat([xyz, xyz[::2]])
    start = min(start, max(len(xyz) - 1, 0))
    expected = farthest_point_sample(xyz, count, start=start, impl="reference")
    assert torch.equal(farthest_point_sample(xyz, count, start=start, impl="native"), expected)


def voxels_by_definition(xyz: np.ndarray, size: float, priority: np.ndarray | None) -> list[int]:
    best: dict[tuple, tuple[int, int]] = {}
    for i, point in enumerate(xyz.astype(np.float64)):
        cell = tuple(int(np.floor(x / size)) for x in point)
        mine = (0 if priority is None else int(priority[i]), i)
        best[cell] = min(best.get(cell, mine), mine)
    return sorted(i for _, i in best.values())


VOXEL_CLOUDS = {
    "uniform": (np.random.default_rng(1).random((4000, 3)), 0.1),
    "around zero": (np.random.default_rng(2).normal(size=(2000, 3)), 0.7),
    "on the faces": (lattice(9) - 4.0, 2.0),
    "signed zeros": (np.array([[0.0, -0.0, 0], [-0.0, 0.0, 0], [-1e-45, 0, 0]]), 1.0),
    "all in one": (np.random.default_rng(3).random((50, 3)), 10.0),
    "far apart": (lattice(3) * 1e18 - 1e18, 0.25),
    # Cells of one axis in the place of another's.
    "same numbers": (np.array(list(itertools.permutations([1.0, 2.0, 3.0]))), 1.0),
    "many chunks": (np.random.default_rng(4).random((40000, 3)), 0.05),
    "one point": (np.ones((1, 3)), 0.3),
    "none": (np.zeros((0, 3)), 0.3),
}


@pytest.mark.parametrize("name", VOXEL_CLOUDS)
@pytest.mark.parametrize("with_priority", [False, True])
def test_voxels_hold_one_point_each(name, with_priority):
    xyz, size = VOXEL_CLOUDS[name]
    xyz = torch.from_numpy(xyz.astype(np.float32))
    # Few values, so that many priorities tie.
    values = torch.tensor([-(2**63), -1, 0, 2**63 - 1])
    priority = values[torch.arange(len(xyz)) * 7919 % 13 % 4] if with_priority else None
    expected = voxels_by_definition(xyz.numpy(), size, None if priority is None else priority.numpy())
    reference = voxel_sample(xyz, size, priority, impl="reference")
    assert reference.dtype == torch.int64 and reference.tolist() == expected
    for threads in (1, 2, 4, 10**30):
        assert voxel_sample(xyz, size, priority, impl="native", threads=threads).tolist() == expected


@quick
@given(
    hnp.arrays(np.float32, st.tuples(st.integers(0, 60), st.just(3)), elements=st.floats(width=32)),
    st.floats(),
)
def test_both_implementations_take_or_refuse_the_same_clouds(xyz, size):
    outcomes = []
    for impl in IMPLS:
        try:
            outcomes.append(voxel_sample(torch.from_numpy(xyz), size, impl=impl).tolist())
        except ValueError as problem:
            outcomes.append(str(problem))
    assert outcomes[0] == outcomes[1]
    if isinstance(outcomes[0], str):
        assert outcomes[0].startswith(("voxel_sample: xyz must be finite", "voxel_sample: size "))
    else:
        assert np.isfinite(xyz).all() and 0 < size < np.inf


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_coordinate_that_is_not_finite_is_refused(impl, value):
    for at in (0, 700, 2099):
        xyz = torch.rand(700, 3)
        xyz.view(-1)[at - 1] = value
        with pytest.raises(ValueError, match=r"^farthest_point_sample: xyz must be finite$"):
            farthest_point_sample(xyz, 5, impl=impl)
        with pytest.raises(ValueError, match=r"^voxel_sample: xyz must be finite$"):
            voxel_sample(xyz, 0.1, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "size, said",
    [(0.0, "size must be positive"), (-1, "size must be positive"), (np.nan, "size must be positive"),
     (np.inf, "size must be positive"), (10**400, "size must be positive"), (5e-324, "size is too small"),
     (2.0**-62, "size is too small")],
)  # fmt: skip
def test_a_size_without_voxels_is_refused(impl, size, said):
    with pytest.raises(ValueError, match=rf"^voxel_sample: {said}"):
        voxel_sample(torch.ones(5, 3), size, impl=impl)


def test_the_smallest_size_that_fits():
    xyz = torch.tensor([[1, 0, 0], [-1, 0, 0], [0.9999999, 0, 0]])
    for impl in IMPLS:
        assert voxel_sample(xyz, 2.0**-61, impl=impl).tolist() == [0, 1, 2]


XYZ = torch.arange(30.0).reshape(10, 3)
WRONG = [
    (TypeError, "xyz must be a tensor", lambda f: f(np.zeros((4, 3), np.float32), 1)),
    (ValueError, "xyz must be float32", lambda f: f(XYZ.double(), 1)),
    (ValueError, "xyz must be float32", lambda f: f(XYZ.half(), 1)),
    (ValueError, "xyz must be float32", lambda f: f(XYZ.int(), 1)),
    (ValueError, "xyz must be float32", lambda f: f(XYZ[:, :2], 1)),
    (ValueError, "xyz must be float32", lambda f: f(XYZ[None], 1)),
    (ValueError, "xyz must be float32", lambda f: f(XYZ.reshape(-1), 1)),
    (ValueError, "threads must be at least 1", lambda f: f(XYZ, 1, threads=0)),
    (ValueError, "unknown impl 'fast'", lambda f: f(XYZ, 1, impl="fast")),
    (ImplementationError, "impl 'triton' is not built", lambda f: f(XYZ, 1, impl="triton")),
]


@pytest.mark.parametrize("op", [farthest_point_sample, voxel_sample])
@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_arguments_are_named(op, case):
    error, said, call = WRONG[case]
    with pytest.raises(error, match=said):
        call(op)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "error, said, arguments",
    [(ValueError, "count must be at least 1, got 0", {"count": 0}),
     (ValueError, "count must be at least 1, got -3", {"count": -3}),
     (TypeError, "count must be an integer, not float", {"count": 2.0}),
     (ValueError, "start must be the index of one of 10 points, got 10", {"count": 2, "start": 10}),
     (ValueError, "start must be at least 0, got -1", {"count": 2, "start": -1}),
     (ValueError, "start must be the index", {"count": 2, "start": 10**30}),
     (TypeError, "start must be an integer, not str", {"count": 2, "start": "0"})],
)  # fmt: skip
def test_wrong_counts_and_starts_are_named(impl, error, said, arguments):
    with pytest.raises(error, match=rf"^farthest_point_sample: {said}"):
        farthest_point_sample(XYZ, **arguments, impl=impl)


@pytest.mark.parametrize(
    "error, said, priority",
    [(TypeError, "priority must be a tensor", [1] * 10),
     (ValueError, r"priority must be int64 \[10\], got int32 \[10\]", torch.zeros(10, dtype=torch.int32)),
     (ValueError, r"priority must be int64 \[10\], got int64 \[9\]", torch.zeros(9, dtype=torch.int64)),
     (ValueError, r"priority must be int64 \[10\], got int64 \[10, 1\]", torch.zeros(10, 1, dtype=torch.int64))],
)  # fmt: skip
def test_wrong_priorities_are_named(error, said, priority):
    with pytest.raises(error, match=rf"^voxel_sample: {said}"):
        voxel_sample(XYZ, 1.0, priority)


def test_a_size_that_is_no_number_is_named():
    with pytest.raises(TypeError, match=r"^voxel_sample: size must be a number, not str"):
        voxel_sample(XYZ, "0.1")


def test_an_enormous_count_means_all_points():
    for impl in IMPLS:
        assert len(farthest_point_sample(XYZ, 10**30, impl=impl)) == 10


@pytest.mark.parametrize("impl", IMPLS)
def test_strides_do_not_matter(impl):
    base = torch.rand(600, 8, generator=torch.Generator().manual_seed(0))
    order = torch.arange(1200) % 5
    views = [base[:, 1:7:2], base[::2, :3], base[:, :3].t().contiguous().t(), base[:1, :3].expand(600, 3)]
    for xyz in views:
        priority = order[::2][: len(xyz)]
        assert not xyz.is_contiguous() and not priority.is_contiguous()
        copy = xyz.clone(memory_format=torch.contiguous_format)
        expected = farthest_point_sample(copy, 100, impl=impl)
        assert torch.equal(farthest_point_sample(xyz, 100, impl=impl), expected)
        expected = voxel_sample(copy, 0.2, priority.clone(), impl=impl)
        assert torch.equal(voxel_sample(xyz, 0.2, priority, impl=impl), expected)


def test_inputs_stay_as_they_are():
    xyz, priority = torch.rand(500, 3), torch.arange(500).flip(0)
    before = xyz.clone(), priority.clone()
    for impl in IMPLS:
        farthest_point_sample(xyz, 50, impl=impl)
        voxel_sample(xyz, 0.3, priority, impl=impl)
    assert torch.equal(xyz, before[0]) and torch.equal(priority, before[1])


def test_registered_with_torch():
    xyz = torch.rand(300, 3)
    farthest = torch.ops.wireframe.farthest_point_sample.default
    voxel = torch.ops.wireframe.voxel_sample.default
    for impl in IMPLS:
        for cloud in (xyz, xyz[::2], xyz[:0], xyz.clone().requires_grad_()):
            torch.library.opcheck(farthest, (cloud, 20, 0, impl))
            torch.library.opcheck(voxel, (cloud, 0.1, None, impl, 2))
        torch.library.opcheck(voxel, (xyz, 0.1, torch.arange(300), impl, 1))


def test_the_fake_knows_the_number_of_farthest_points():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        for points in (0, 7, 40):
            assert farthest_point_sample(torch.empty(points, 3), 20).shape == (min(points, 20),)


def test_the_native_module_refuses_what_is_not_a_fitting_buffer():
    module = native.module()
    xyz, out = np.zeros((10, 3), np.float32), np.zeros(10, np.int64)
    with pytest.raises(ValueError, match=r"^out is longer than xyz"):
        module.farthest_point_sample(xyz, 0, np.zeros(11, np.int64))
    for start in (-1, 10, 2**62):
        with pytest.raises(ValueError, match=r"^start is not the index of a point"):
            module.farthest_point_sample(xyz, start, out)
    with pytest.raises(ValueError, match=r"^xyz must be finite"):
        module.farthest_point_sample(np.full((10, 3), np.nan, np.float32), 0, out)
    with pytest.raises(ValueError, match=r"^xyz must have shape"):
        module.farthest_point_sample(xyz.T, 0, out)
    with pytest.raises(TypeError, match=r"^xyz must be float32"):
        module.voxel_sample(xyz.astype(np.float64), 1.0, None, out, 1)
    with pytest.raises(ValueError, match=r"^out must have shape"):
        module.voxel_sample(xyz, 1.0, None, out[:9], 1)
    with pytest.raises(ValueError, match=r"^priority must have shape"):
        module.voxel_sample(xyz, 1.0, out[:9], out, 1)
    for size in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"^size must be positive and finite"):
            module.voxel_sample(xyz, size, None, out, 1)
    assert module.voxel_sample(xyz, 1.0, None, out, -5) == 1
