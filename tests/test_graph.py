"""Segments to a wireframe: merging, snapping, levelling, and the canonical result."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wireframe.classes import POINT_CLASSES
from wireframe.errors import ConfigError
from wireframe.fusion import fuse_views
from wireframe.graph import GraphConfig, Wireframe, empty_wireframe, merge_vertices, segments_to_wireframe
from wireframe.sampling import sample_points
from wireframe.scene import read_scene
from wireframe.scoring import score_many, summarise
from wireframe.synth import SynthConfig, make_scene
from wireframe.train.config import parse_config

NO_POINTS = np.zeros((0, 3), np.float32), np.zeros(0, np.uint8)
PLAIN = GraphConfig(snap_radius=0.0, horizontal_max_slope=0.0)
THRESHOLDS = GraphConfig().merge_thresholds
IMPLS = ("reference", pytest.param("native", marks=pytest.mark.native))
APEX, EAVE_END, FLASHING_END, RIDGE = (
    POINT_CLASSES.index(name) for name in ("apex", "eave_end_point", "flashing_end_point", "ridge")
)


def wireframe_of(segments, points=NO_POINTS, config=PLAIN) -> Wireframe:
    return segments_to_wireframe(np.asarray(segments, np.float32), *points, config)


def assert_same(a: Wireframe, b: Wireframe) -> None:
    assert a.vertices.tobytes() == b.vertices.tobytes()
    assert a.edges.tobytes() == b.edges.tobytes()


def assert_valid(result: Wireframe) -> None:
    assert result.vertices.dtype == np.float32 and result.edges.dtype == np.int64
    assert result.vertices.shape[1:] == (3,) and result.edges.shape[1:] == (2,)
    assert len(result.vertices) >= 2 and len(result.edges) >= 1
    assert np.isfinite(result.vertices).all()
    assert np.array_equal(np.unique(result.edges), np.arange(len(result.vertices))), "an orphan or a bad id"
    assert (result.edges[:, 0] < result.edges[:, 1]).all()
    assert np.array_equal(np.unique(result.edges, axis=0), result.edges)


def union_find_merge(vertices, edges, thresholds):
    """Single linkage by union-find over all pairs, one pass per threshold, plain means."""
    vertices = np.asarray(vertices, np.float64)
    edges = [tuple(edge) for edge in edges]
    for threshold in thresholds:
        parent = list(range(len(vertices)))

        def find(i, parent=parent):
            while parent[i] != i:
                i = parent[i]
            return i

        for i in range(len(vertices)):
            for j in range(i):
                if np.linalg.norm(vertices[i] - vertices[j]) <= threshold:
                    a, b = sorted((find(i), find(j)))
                    parent[b] = a
        roots = sorted({find(i) for i in range(len(vertices))})
        members = [[i for i in range(len(vertices)) if find(i) == root] for root in roots]
        edges = [(roots.index(find(a)), roots.index(find(b))) for a, b in edges]
        vertices = np.array([vertices[group].mean(axis=0) for group in members])
    return vertices, sorted({tuple(sorted(edge)) for edge in edges if edge[0] != edge[1]})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_merging_equals_single_linkage_by_union_find(spread, impl):
    rng = np.random.default_rng(int(spread * 100))
    for _ in range(5):
        corners = rng.uniform(-4, 4, (10, 3))
        vertices = corners[rng.integers(0, 10, 48)] + rng.normal(0, spread, (48, 3))
        edges = rng.permutation(48).reshape(-1, 2)
        merged, merged_edges = merge_vertices(vertices, edges, THRESHOLDS, impl=impl)
        expected, expected_edges = union_find_merge(vertices, edges, THRESHOLDS)
        assert len(merged) < 48 or spread == 1.0
        np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-12)
        assert [tuple(edge) for edge in merged_edges] == expected_edges


@pytest.mark.parametrize("impl", IMPLS)
def test_a_chain_becomes_one_vertex_as_single_linkage_says(impl):
    chain = np.stack([np.arange(20) * 0.5, np.zeros(20), np.zeros(20)], axis=1)
    for order in (np.arange(20), np.random.default_rng(0).permutation(20)):
        merged, edges = merge_vertices(chain[order], np.zeros((0, 2)), (0.5,), impl=impl)
        np.testing.assert_allclose(merged, [[4.75, 0, 0]])
        assert edges.shape == (0, 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_vertices_exactly_the_threshold_apart_are_linked_and_farther_ones_are_not(impl):
    pair = np.array([[0.0, 0, 0], [0.5, 0, 0]])
    assert len(merge_vertices(pair, [[0, 1]], (0.5,), impl=impl)[0]) == 1
    assert len(merge_vertices(pair, [[0, 1]], (0.4999,), impl=impl)[0]) == 2


@pytest.mark.parametrize("impl", IMPLS)
def test_later_passes_work_on_plain_means_of_the_clusters(impl):
    # Three endpoints around 0 become one vertex at 0; at 0.4 it meets one at 0.3 with equal weight.
    x = np.array([-0.1, 0.0, 0.1, 0.3])
    vertices = np.stack([x, 0 * x, 0 * x], axis=1)
    merged, _ = merge_vertices(vertices, np.zeros((0, 2)), (0.15, 0.4), impl=impl)
    np.testing.assert_allclose(merged, [[0.15, 0, 0]], atol=1e-12)


def test_merging_drops_self_loops_and_repeated_edges():
    result = wireframe_of(
        [
            [[0, 0, 0], [4, 0, 0]],
            [[4.05, 0, 0], [0, 0.05, 0]],
            [[0, 0, 0], [0.1, 0, 0]],
            [[0, 0, 0], [0, 0, 4]],
        ]
    )
    assert_valid(result)
    assert len(result.vertices) == 3 and len(result.edges) == 2


def test_a_segment_that_collapses_leaves_no_orphan():
    result = wireframe_of([[[0, 0, 0], [4, 0, 0]], [[9, 9, 9], [9.05, 9, 9]]])
    assert_valid(result)
    np.testing.assert_array_equal(result.vertices, np.float32([[0, 0, 0], [4, 0, 0]]))


@pytest.mark.parametrize(
    "segments", [np.zeros((0, 2, 3)), [], [[[1, 1, 1], [1.1, 1, 1]]], [[[np.nan, 0, 0], [1, 1, 1]]]]
)
def test_nothing_found_gives_the_empty_solution(segments):
    result = segments_to_wireframe(segments, *NO_POINTS)
    assert_same(result, empty_wireframe())
    assert result.vertices.tolist() == [[0, 0, 0], [0, 0, 0]] and result.edges.tolist() == [[0, 1]]


def test_segments_that_are_not_finite_are_dropped_and_the_rest_kept():
    good = [[0, 0, 0], [4, 0, 0]]
    result = wireframe_of([good, [[np.inf, 0, 0], [1, 1, 1]], [[0, np.nan, 0], [7, 7, 7]]])
    assert_same(result, wireframe_of([good]))
    too_large = np.array([good, [[1e300, 0, 0], [1, 1, 1]]])
    assert_same(segments_to_wireframe(too_large, *NO_POINTS, PLAIN), wireframe_of([good]))


def test_a_vertex_moves_to_the_mean_of_two_corner_points_nearby():
    points = np.float32([[0.2, 0, 0], [0, 0.4, 0], [3, 0, 0], [9, 0, 0]])
    classes = np.array([APEX, EAVE_END, APEX, APEX])
    result = wireframe_of([[[0, 0, 0], [4, 0, 0]]], (points, classes), GraphConfig(horizontal_max_slope=0.0))
    np.testing.assert_allclose(result.vertices, [[0.1, 0.2, 0], [4, 0, 0]], atol=1e-6)


@pytest.mark.parametrize(
    ("xyz", "classes"),
    [
        ([[0.2, 0, 0]], [APEX]),
        ([[0.2, 0, 0], [0.1, 0, 0]], [APEX, RIDGE]),
        ([[0.2, 0, 0], [0.51, 0, 0]], [APEX, APEX]),
        ([[0.2, 0, 0], [np.nan, 0, 0]], [APEX, APEX]),
    ],
    ids=["one point", "another class", "too far", "not finite"],
)
def test_a_vertex_stays_where_fewer_than_two_corner_points_are_near(xyz, classes):
    result = wireframe_of([[[0, 0, 0], [4, 0, 0]]], (np.float32(xyz), np.array(classes)), GraphConfig())
    np.testing.assert_array_equal(result.vertices, np.float32([[0, 0, 0], [4, 0, 0]]))


def test_which_classes_snap_follows_the_configuration():
    points = np.float32([[0.2, 0, 0], [0.2, 0, 0]]), np.array([FLASHING_END, FLASHING_END])
    segments = [[[0, 0, 0], [4, 0, 0]]]
    assert wireframe_of(segments, points, GraphConfig()).vertices[0, 0] == np.float32(0.2)
    without = GraphConfig(snap_classes=("apex", "eave_end_point"))
    assert wireframe_of(segments, points, without).vertices[0, 0] == 0


def test_vertices_snapped_to_the_same_corner_become_one():
    points = np.float32([[0, 0, 0], [0, 0, 0]]), np.array([APEX, APEX])
    result = wireframe_of([[[0.4, 0, 0], [4, 0, 0]], [[-0.4, 0, 0], [0, 4, 0]]], points, GraphConfig())
    assert_valid(result)
    assert len(result.vertices) == 3 and len(result.edges) == 2


def test_a_nearly_horizontal_edge_becomes_horizontal_and_a_steeper_one_stays():
    flat = wireframe_of([[[0, 3, 0], [4, 3.19, 0]]], config=GraphConfig())
    np.testing.assert_allclose(flat.vertices[:, 1], [3.095, 3.095], atol=1e-6)
    steep = wireframe_of([[[0, 3, 0], [4, 3.21, 0]]], config=GraphConfig())
    np.testing.assert_array_equal(steep.vertices[:, 1], np.float32([3, 3.21]))


def test_an_edge_with_almost_no_run_is_not_levelled():
    config = GraphConfig(merge_thresholds=())
    result = wireframe_of([[[0, 3, 0], [0.09, 3.004, 0]]], config=config)
    assert result.vertices[0, 1] != result.vertices[1, 1]


def test_levelling_makes_every_flagged_edge_exactly_horizontal_in_any_edge_order():
    rng = np.random.default_rng(4)
    corners = np.array([[4 * (i % 4), 0.0, 5 * (i // 4)] for i in range(12)]) + [0.0, 3.0, 0.0]
    corners[:, 1] += rng.uniform(-0.08, 0.08, 12)
    pairs = [(i, i + 1) for i in range(11) if i % 4 != 3] + [(i, i + 4) for i in range(8)]
    segments = corners[np.array(pairs)].astype(np.float32)
    expected = wireframe_of(segments, config=GraphConfig())
    assert np.unique(expected.vertices[:, 1]).size == 1
    assert expected.vertices[0, 1] == pytest.approx(corners[:, 1].mean(), abs=1e-6)
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(len(segments))
        assert_same(wireframe_of(segments[order], config=GraphConfig()), expected)


def test_the_result_does_not_depend_on_the_order_of_segments_endpoints_or_points():
    rng = np.random.default_rng(7)
    corners = rng.uniform(-5, 5, (12, 3))
    segments = (corners[rng.integers(0, 12, (64, 2))] + rng.normal(0, 0.12, (64, 2, 3))).astype(np.float32)
    points = (corners[rng.integers(0, 12, 400)] + rng.normal(0, 0.2, (400, 3))).astype(np.float32)
    classes = rng.integers(0, 13, 400).astype(np.uint8)
    expected = segments_to_wireframe(segments, points, classes)
    assert_valid(expected)
    for seed in range(5):
        shuffle = np.random.default_rng(seed)
        turned = np.where(shuffle.integers(0, 2, (64, 1, 1)) == 1, segments[:, ::-1], segments)
        order = shuffle.permutation(400)
        result = segments_to_wireframe(turned[shuffle.permutation(64)], points[order], classes[order])
        assert_same(result, expected)


coordinates = st.one_of(
    st.sampled_from([0.0, -0.0, 0.1, 0.15, 0.5, np.nan, np.inf, -np.inf, 3.0e38, -3.0e38, 1e-45]),
    st.floats(-3, 3, width=32),
)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_segments_and_points_give_a_valid_wireframe(data):
    segments = data.draw(hnp.arrays(np.float32, (data.draw(st.integers(0, 8)), 2, 3), elements=coordinates))
    points = data.draw(hnp.arrays(np.float32, (data.draw(st.integers(0, 8)), 3), elements=coordinates))
    classes = data.draw(hnp.arrays(np.uint8, (len(points),), elements=st.integers(0, 15)))
    result = segments_to_wireframe(segments, points, classes)
    if not np.array_equal(result.vertices, np.zeros((2, 3))):
        assert_valid(result)
    again = segments_to_wireframe(segments[::-1, ::-1], points[::-1], classes[::-1])
    assert_same(again, result)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("segments", (np.zeros((4, 6)), *NO_POINTS)),
        ("segments", (np.array([["a", "b"]]), *NO_POINTS)),
        ("points", (np.zeros((1, 2, 3)), np.zeros((5, 2)), np.zeros(5))),
        ("class_id", (np.zeros((1, 2, 3)), np.zeros((5, 3)), np.zeros(4))),
    ],
)
def test_a_wrong_shape_is_named(name, arguments):
    with pytest.raises(ValueError, match=f"^{name} must"):
        segments_to_wireframe(*arguments)


def read_graph_section(values):
    """The graph section as every command reads it."""
    stage = {"name": "s", "points": 1, "steps": 1, "batch_size": 1, "lr": 1.0}
    return parse_config({"stages": [stage], "graph": values}).graph


def test_a_configuration_reads_from_json_values():
    config = read_graph_section({"merge_thresholds": [0.4], "snap_radius": 0.7, "snap_classes": ["apex"]})
    assert config == GraphConfig(merge_thresholds=(0.4,), snap_radius=0.7, snap_classes=("apex",))
    assert read_graph_section({}) == GraphConfig()


@pytest.mark.parametrize(
    "values",
    [
        {"snap_radios": 0.7},
        {"merge_thresholds": 0.4},
        {"merge_thresholds": [0.4, 0.3]},
        {"merge_thresholds": [float("nan")]},
        {"confidence": 1.5},
        {"confidence": True},
        {"snap_radius": -1},
        {"snap_min_points": 0},
        {"snap_min_points": 2.0},
        {"snap_classes": ["chimney"]},
        {"snap_classes": "apex"},
        {"horizontal_min_run": float("inf")},
        {"horizontal_max_slope": "0.05"},
    ],
    ids=str,
)
def test_an_impossible_configuration_is_refused_in_one_line(values):
    with pytest.raises(ConfigError, match=next(iter(values))) as caught:
        read_graph_section(values)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        read_graph_section([("snap_radius", 1.0)])


def test_ground_truth_segments_through_the_graph_step_score_at_least_095():
    pairs = []
    for index in range(16):
        scene = read_scene(make_scene(11, index, SynthConfig()))
        points, class_id = sample_points(fuse_views(scene)).world_points()
        found = segments_to_wireframe(scene.vertices[scene.edges], points, class_id)
        pairs.append((found, Wireframe(scene.vertices, scene.edges)))
    assert summarise(score_many(pairs, workers=2))["hss"] >= 0.95
