"""Vertex merging: native code and reference give the same bits, and both refuse what they cannot merge."""

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wireframe.graph import GraphConfig, segments_to_wireframe
from wireframe.kernels import dispatch, native
from wireframe.kernels import merge_vertices as tensors
from wireframe.kernels.dispatch import ImplementationError
from wireframe.merging import MAX_COORDINATE, merge_vertices

pytestmark = pytest.mark.native

quick = settings(max_examples=300, deadline=None, derandomize=True)
IMPLS = ("reference", "native")
THRESHOLDS = GraphConfig().merge_thresholds


def bits(merged):
    vertices, edges = (np.asarray(array) for array in merged)
    assert vertices.dtype == np.float64 and edges.dtype == np.int64
    assert vertices.shape[1:] == (3,) and edges.shape[1:] == (2,)
    return vertices.tobytes(), edges.tobytes()


def assert_same(vertices, edges, thresholds=THRESHOLDS):
    """Reference, native code and both operators; returns what they give."""
    expected = merge_vertices(vertices, edges, thresholds, impl="reference")
    assert bits(merge_vertices(vertices, edges, thresholds, impl="native")) == bits(expected)
    pair = [torch.from_numpy(np.array(array, order="C")) for array in (vertices, edges)]
    for impl in ("reference", "native", "auto"):
        assert bits(tensors.merge_vertices(*pair, thresholds, impl=impl)) == bits(expected)
    return expected


def noisy(seed: int, corners: int, count: int, spread: float):
    """Vertices [count, 3] around a few corners, and edges that pair them."""
    rng = np.random.default_rng(seed)
    around = rng.uniform(-5, 5, (corners, 3))
    vertices = around[rng.integers(0, corners, count)] + rng.normal(0, spread, (count, 3))
    return vertices, rng.integers(0, count, (count // 2, 2))


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1, 0.4, 2.0])
@pytest.mark.parametrize("count", [2, 16, 128, 700])
def test_merged_houses_have_the_bits_of_the_reference(count, spread):
    sizes = {len(assert_same(*noisy(seed, max(1, count // 8), count, spread))[0]) for seed in range(6)}
    assert spread > 0.1 or max(sizes) < count


def test_pairs_exactly_at_the_threshold_are_linked_alike():
    # Thirds of a tenth: the squared distance of every pair rounds in its own way, near the squared threshold.
    rng = np.random.default_rng(0)
    linked = set()
    for radius in (0.1, 0.15, 0.3, 0.7):
        directions = rng.normal(size=(400, 3))
        directions *= radius / np.sqrt((directions**2).sum(axis=1, keepdims=True))
        for direction in directions:
            start = rng.uniform(-9, 9, 3) if rng.random() < 0.5 else np.zeros(3)
            pair = np.array([start, start + direction])
            expected = merge_vertices(pair, [[0, 1]], (radius,), impl="reference")
            assert bits(merge_vertices(pair, [[0, 1]], (radius,), impl="native")) == bits(expected)
            linked.add(len(expected[0]))
    assert linked == {1, 2}


@pytest.mark.parametrize(
    "vertices",
    [
        np.zeros((0, 3)),
        np.zeros((1, 3)),
        np.zeros((50, 3)),
        -np.zeros((4, 3)),
        np.array([[-0.0, -0.0, -0.0], [5, 5, 5], [5, 5, 5], [-0.0, 9, 9]]),
        np.stack([np.arange(300) * 0.59, np.zeros(300), np.zeros(300)], axis=1)[::-1],
        np.stack([np.zeros(300), np.random.default_rng(0).permutation(300) * 0.59, np.ones(300)], axis=1),
        np.random.default_rng(0).permutation(np.stack(np.meshgrid(*[np.arange(6) * 0.6] * 3), -1).reshape(-1, 3)),
        np.array([[1e150, -1e150, 1e150], [-1e150, 1e150, -1e150], [1e150, 1e150, 1e150]]),
        np.array([[5e-324, 0, 0], [0, -5e-324, 0], [1e-160, 0, 0]]),
    ],
    ids=["none", "one", "equal", "minus zeros", "some minus zeros", "row", "column", "lattice", "huge", "tiny"],
)
@pytest.mark.parametrize("thresholds", [(), (0.0,), THRESHOLDS, (0.6, 0.1), (1e200, 1.0), (5e-324,)], ids=str)
def test_special_places_and_thresholds_give_the_bits_of_the_reference(vertices, thresholds):
    count = len(vertices)
    edges = np.stack([np.arange(count), np.arange(count)[::-1]], axis=1)
    assert_same(vertices, edges, thresholds)


coordinates = st.one_of(
    st.sampled_from([0.0, -0.0, 0.1, 0.15, -0.15, 0.3, 0.45, 0.6, 1e-320, 1e150, -1e150]),
    st.integers(-20, 20).map(lambda step: step * 0.075),
    st.floats(-2, 2),
)


@quick
@given(st.data())
def test_any_vertices_and_edges_give_the_bits_of_the_reference(data):
    count = data.draw(st.integers(0, 20))
    vertices = data.draw(hnp.arrays(np.float64, (count, 3), elements=coordinates))
    length = data.draw(st.integers(0, 30)) if count else 0
    edges = data.draw(hnp.arrays(np.int64, (length, 2), elements=st.integers(0, max(0, count - 1))))
    thresholds = data.draw(st.lists(st.one_of(st.sampled_from(THRESHOLDS), st.floats(0, 3)), max_size=5))
    merged, kept = assert_same(vertices, edges, thresholds)
    assert np.isfinite(merged).all() and len(merged) <= count
    assert (kept[:, 0] < kept[:, 1]).all() and np.array_equal(kept, np.unique(kept, axis=0))


def test_many_vertices_merge_like_their_parts():
    # The reference would need 10^10 pairs for the whole, so it gets groups that cannot meet, one at a time.
    groups = [noisy(seed, 20, 500, 0.1) for seed in range(200)]
    vertices = np.concatenate([part + [100.0 * g, 0, 0] for g, (part, _) in enumerate(groups)])
    edges = np.concatenate([pairs + 500 * g for g, (_, pairs) in enumerate(groups)])
    merged, kept = merge_vertices(vertices, edges, THRESHOLDS, impl="native")
    assert len(vertices) == 100_000
    first = 0
    for g, (_, pairs) in enumerate(groups):
        part, part_edges = merge_vertices(vertices[500 * g : 500 * (g + 1)], pairs, THRESHOLDS, impl="reference")
        last = first + len(part)
        assert merged[first:last].tobytes() == part.tobytes()
        here = kept[(kept[:, 0] >= first) & (kept[:, 0] < last)]
        assert np.array_equal(here - first, part_edges)
        first = last
    assert first == len(merged)


def test_inputs_stay_as_they_are_and_outputs_are_new():
    for impl in IMPLS:
        vertices, edges = np.array([[0.0, 0, 0], [9, 0, 0], [0, 0.1, 0]]), np.array([[1, 0], [1, 2]])
        for thresholds in ((), (0.2,)):
            merged, kept = merge_vertices(vertices, edges, thresholds, impl=impl)
            assert not np.shares_memory(merged, vertices) and not np.shares_memory(kept, edges)
            merged += 1.0
        assert vertices.tolist() == [[0, 0, 0], [9, 0, 0], [0, 0.1, 0]] and edges.tolist() == [[1, 0], [1, 2]]


def test_strided_lists_and_other_number_types_are_taken():
    vertices, edges = noisy(0, 4, 32, 0.1)
    expected = bits(merge_vertices(vertices, edges, THRESHOLDS, impl="reference"))
    wide = np.zeros((32, 7))
    wide[:, 5:2:-1] = vertices
    rows = wide[:, 5:2:-1]
    for impl in IMPLS:
        for v, e, t in (
            (rows, edges.astype(np.int16), np.array(THRESHOLDS)),
            (np.asfortranarray(vertices), np.asfortranarray(edges), list(THRESHOLDS)),
            (vertices.tolist(), edges.astype(np.uint64), THRESHOLDS),
        ):
            assert bits(merge_vertices(v, e, t, impl=impl)) == expected
        assert bits(merge_vertices([], [], THRESHOLDS, impl=impl)) == (b"", b"")
        assert len(merge_vertices([[1, 2, 3], [1, 2, 3]], np.zeros((0, 2)), (0,), impl=impl)[0]) == 1
    pair = torch.from_numpy(vertices.T.copy()).T, torch.from_numpy(edges.T.copy()).T
    assert not pair[0].is_contiguous()
    for impl in IMPLS:
        assert bits(tensors.merge_vertices(*pair, THRESHOLDS, impl=impl)) == expected


GOOD_VERTICES, GOOD_EDGES = np.zeros((3, 3)), np.array([[0, 1]])
WRONG = {
    "NaN": ("vertices", np.array([[0, 0, np.nan]]), []),
    "infinite": ("vertices", np.array([[0, -np.inf, 0]]), []),
    "too large": ("vertices", np.array([[0, 2 * MAX_COORDINATE, 0]]), []),
    "two columns": ("vertices", np.zeros((3, 2)), []),
    "three axes": ("vertices", np.zeros((3, 3, 3)), []),
    "empty axes": ("vertices", np.zeros((3, 0, 3)), []),
    "flat": ("vertices", np.zeros(9), []),
    "text": ("vertices", [["a", "b", "c"]], []),
    "complex": ("vertices", np.zeros((3, 3), complex), []),
    "objects": ("vertices", np.array([[None] * 3]), []),
    "ragged": ("vertices", [[0, 0, 0], [0]], []),
    "none": ("vertices", None, []),
    "below zero": ("edges", GOOD_VERTICES, np.array([[0, -1]])),
    "no such vertex": ("edges", GOOD_VERTICES, np.array([[3, 0]])),
    "no vertex at all": ("edges", np.zeros((0, 3)), np.array([[0, 0]])),
    "beyond int64": ("edges", GOOD_VERTICES, np.array([[0, 2**64 - 1]], np.uint64)),
    "fractions": ("edges", GOOD_VERTICES, np.array([[0.0, 1.0]])),
    "truth values": ("edges", GOOD_VERTICES, np.array([[False, True]])),
    "flat edges": ("edges", GOOD_VERTICES, np.array([0, 1])),
    "triangles": ("edges", GOOD_VERTICES, np.array([[0, 1, 2]])),
}
WRONG_THRESHOLDS = {
    "negative": [-0.1], "NaN": [0.1, float("nan")], "infinite": [float("inf")], "text": "ab", "a number": 0.5,
    "none": None, "nested": [[0.1, 0.2]], "too large": [10**400],
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", WRONG)
def test_wrong_vertices_and_edges_are_named(case, impl):
    name, vertices, edges = WRONG[case]
    with pytest.raises(ValueError, match=rf"^merge_vertices: {name} must") as caught:
        merge_vertices(vertices, edges, THRESHOLDS, impl=impl)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", WRONG_THRESHOLDS)
def test_wrong_thresholds_are_named(case, impl):
    pair = torch.from_numpy(GOOD_VERTICES), torch.from_numpy(GOOD_EDGES)
    for merge, arguments in ((merge_vertices, (GOOD_VERTICES, GOOD_EDGES)), (tensors.merge_vertices, pair)):
        with pytest.raises(ValueError, match=r"^merge_vertices: thresholds must"):
            merge(*arguments, WRONG_THRESHOLDS[case], impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_wrong_tensors_are_named(impl):
    vertices, edges = torch.zeros(3, 3, dtype=torch.float64), torch.tensor([[0, 1]])
    for name, v, e in (
        ("vertices", vertices.float(), edges),
        ("vertices", vertices[:, :2], edges),
        ("vertices", vertices[0], edges),
        ("edges", vertices, edges.int()),
        ("edges", vertices, edges[0]),
        ("edges", vertices, edges.double()),
        ("edges", vertices, edges + 2),
        ("vertices", vertices / 0, edges),
        ("edges", vertices.to("meta"), edges),
    ):
        with pytest.raises(ValueError, match=rf"^merge_vertices: {name}"):
            tensors.merge_vertices(v, e, THRESHOLDS, impl=impl)
    with pytest.raises(TypeError, match=r"^merge_vertices: vertices must be a tensor"):
        tensors.merge_vertices(vertices.numpy(), edges, THRESHOLDS, impl=impl)


def test_an_implementation_that_is_not_built_is_refused():
    for merge, arguments in (
        (merge_vertices, (GOOD_VERTICES, GOOD_EDGES)),
        (tensors.merge_vertices, (torch.from_numpy(GOOD_VERTICES), torch.from_numpy(GOOD_EDGES))),
    ):
        with pytest.raises(ImplementationError, match="triton"):
            merge(*arguments, THRESHOLDS, impl="triton")
        with pytest.raises(ValueError, match="unknown impl 'best'"):
            merge(*arguments, THRESHOLDS, impl="best")


def test_the_binding_itself_refuses_what_would_lead_it_astray():
    def merge(vertices=GOOD_VERTICES, edges=GOOD_EDGES, thresholds=(0.1,), merged=None, kept=None):
        merged = np.zeros((len(vertices), 3)) if merged is None else merged
        kept = np.zeros((len(edges), 2), np.int64) if kept is None else kept
        return native.module().merge_vertices(vertices, edges, thresholds, merged, kept)

    assert merge() == (1, 0)
    # Without its own checks a NaN would break the order of the sort, an edge would be read out of bounds.
    for name, arguments in (
        ("vertices", {"vertices": np.array([[np.nan, 0, 0]] * 3)}),
        ("vertices", {"vertices": np.full((3, 3), np.inf)}),
        ("vertices", {"vertices": np.zeros((3, 2))}),
        ("vertices", {"vertices": np.zeros((6, 3))[::2]}),
        ("edges", {"edges": np.array([[0, 3]])}),
        ("edges", {"edges": np.array([[-1, 0]])}),
        ("edges", {"edges": np.array([0, 1])}),
        ("out_vertices", {"merged": np.zeros((2, 3))}),
        ("out_edges", {"kept": np.zeros((2, 2), np.int64)}),
    ):
        with pytest.raises(ValueError, match=rf"^{name}"):
            merge(**arguments)
    with pytest.raises(TypeError, match=r"^edges must be int64"):
        merge(edges=np.zeros((1, 2), np.int32))
    # Lengths that are no lengths lead to some result, not to a crash.
    for threshold in (float("nan"), float("inf"), -1.0):
        count, _ = merge(vertices=noisy(0, 4, 40, 0.1)[0], thresholds=[threshold, 0.1])
        assert 1 <= count <= 40


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("count", [0, 2, 40])
def test_the_merging_operator_passes_opcheck(impl, count):
    vertices, edges = noisy(0, 5, count, 0.1) if count else (np.zeros((0, 3)), np.zeros((0, 2), np.int64))
    arguments = (torch.from_numpy(vertices), torch.from_numpy(edges), list(THRESHOLDS), impl)
    torch.library.opcheck(torch.ops.wireframe.merge_vertices.default, arguments)


def test_the_graph_is_the_same_with_and_without_native_code(monkeypatch):
    rng = np.random.default_rng(3)
    corners = rng.uniform(-5, 5, (12, 3))
    segments = (corners[rng.integers(0, 12, (64, 2))] + rng.normal(0, 0.12, (64, 2, 3))).astype(np.float32)
    points = (corners[rng.integers(0, 12, 400)] + rng.normal(0, 0.2, (400, 3))).astype(np.float32)
    classes = rng.integers(0, 13, 400).astype(np.uint8)
    calls = []
    binding = native.module().merge_vertices
    monkeypatch.setattr(native.module(), "merge_vertices", lambda *a: calls.append(1) or binding(*a))
    found = segments_to_wireframe(segments, points, classes)
    assert calls == [1]
    monkeypatch.setitem(dispatch.BUILT, "merge_vertices", ("reference",))
    expected = segments_to_wireframe(segments, points, classes)
    assert calls == [1]
    assert [array.tobytes() for array in found] == [array.tobytes() for array in expected]
