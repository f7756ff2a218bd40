"""The handcrafted rival on broken and whole rows, and the dummies."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from wireframe.errors import MissingPackageError, SampleError
from wireframe.graph import Wireframe, empty_wireframe
from wireframe.rivals import (
    descriptor,
    fit_dummies,
    handcrafted,
    load_dummies,
    mean_wireframe,
    save_dummies,
    try_handcrafted,
)
from wireframe.scoring import score
from wireframe.synth import SynthConfig, make_scene


@dataclasses.dataclass
class Sampled:
    """What the dummies read of a sampled scene."""

    xyz_norm: np.ndarray
    class_id: np.ndarray
    mask: np.ndarray
    gt_vertices: np.ndarray
    gt_edges: np.ndarray
    center: np.ndarray
    scale: np.float32


def sampled(seed: int, corners: int = 4, points: int = 300) -> Sampled:
    rng = np.random.default_rng(seed)
    center, scale = rng.uniform(-50, 50, 3).astype(np.float32), np.float32(rng.uniform(8, 20))
    vertices = rng.uniform(-0.4, 0.4, (corners, 3))
    edges = np.array([[i, (i + 1) % corners] for i in range(corners)], dtype=np.int32)
    cloud = vertices[rng.integers(0, corners, points)] + rng.normal(0, 0.03, (points, 3))
    return Sampled(
        xyz_norm=cloud.astype(np.float32),
        class_id=rng.integers(0, 13, points).astype(np.uint8),
        mask=np.arange(points) < points - 20,
        gt_vertices=(vertices * scale + center).astype(np.float32),
        gt_edges=edges,
        center=center,
        scale=scale,
    )


@pytest.fixture(scope="module")
def row() -> dict:
    pytest.importorskip("hoho2025")
    pytest.importorskip("pycolmap")
    return make_scene(3, 0, SynthConfig())


def first_views(row: dict, count: int, **changes) -> dict:
    """The row cut to its first views, with columns replaced."""
    columns = ("image_ids", "ade", "gestalt", "depth", "K", "R", "t", "pose_only_in_colmap")
    return {**row, **{name: list(row[name])[:count] for name in columns}, **changes}


def test_the_handcrafted_rival_scores_on_a_scene_and_prints_nothing(row, capsys):
    predicted, failure = try_handcrafted(row)
    assert failure is None
    assert predicted.vertices.dtype == np.float32 and predicted.edges.dtype == np.int64
    assert score(predicted, Wireframe(row["wf_vertices"], row["wf_edges"])).f1 > 0.0
    assert capsys.readouterr() == ("", "")


def test_views_that_are_pose_only_or_without_camera_change_nothing(row):
    expected = handcrafted(first_views(row, 3, pose_only_in_colmap=[False] * 3))
    longer = first_views(row, 3, pose_only_in_colmap=[False] * 3)
    for name in ("image_ids", "ade", "gestalt", "depth", "K", "R", "t"):
        longer[name] = [*longer[name], longer[name][0], longer[name][1]]
    longer["K"][4] = np.zeros((3, 3))
    longer["pose_only_in_colmap"] = [False, False, False, True]
    result = handcrafted(longer)
    np.testing.assert_array_equal(result.vertices, expected.vertices)
    np.testing.assert_array_equal(result.edges, expected.edges)


def test_missing_depth_counts_as_a_map_of_zeros(row):
    size = np.asarray(row["gestalt"][0]).shape[:2]
    zeros = [np.zeros(size, np.uint16)] * 3
    expected, failure = try_handcrafted(first_views(row, 3, depth=zeros))
    assert failure is None and len(expected.edges) >= 1
    for depth in ([None] * 3, [], None):
        result, failure = try_handcrafted(first_views(row, 3, depth=depth))
        assert failure is None
        np.testing.assert_array_equal(result.vertices, expected.vertices)


def test_rows_of_arrays_give_what_rows_of_images_give(row):
    small = first_views(row, 2)
    arrays = {name: [np.asarray(image) for image in small[name]] for name in ("ade", "gestalt")}
    arrays["depth"] = [None if depth is None else np.int32(depth) for depth in small["depth"]]
    np.testing.assert_array_equal(handcrafted({**small, **arrays}).vertices, handcrafted(small).vertices)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pose_only_in_colmap": [True, True]}, "raised ValueError: no view has a camera"),
        ({"colmap": b"no zip"}, "raised BadZipFile"),
        ({"ade": [None, None]}, "raised "),
        ({"image_ids": []}, "raised ValueError: no view has a camera"),
    ],
    ids=["pose only", "broken colmap", "no images", "no views"],
)
def test_a_scene_that_breaks_the_rival_gives_the_empty_solution_and_a_reason(row, changes, reason):
    result, failure = try_handcrafted(first_views(row, 2, pose_only_in_colmap=[False] * 2) | changes)
    assert failure.startswith(reason) and "\n" not in failure
    np.testing.assert_array_equal(result.vertices, empty_wireframe().vertices)
    np.testing.assert_array_equal(result.edges, empty_wireframe().edges)


def test_without_hoho2025_the_rival_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "hoho2025.example_solutions", None)
    with pytest.raises(MissingPackageError, match="pip install hoho2025"):
        handcrafted({})


def test_the_mean_wireframe_averages_the_most_common_topology():
    edges = np.array([[0, 1], [1, 2]])
    ones, twos = (np.full((3, 3), value, np.float32) for value in (1, 2))
    others = [Wireframe(ones, np.array([[0, 1], [0, 2]])), Wireframe(np.zeros((4, 3), np.float32), edges)]
    mean = mean_wireframe([others[0], Wireframe(ones, edges), others[1], Wireframe(twos, edges[::-1, ::-1])])
    np.testing.assert_array_equal(mean.vertices, np.full((3, 3), 1.5, np.float32))
    np.testing.assert_array_equal(mean.edges, edges)
    np.testing.assert_array_equal(mean_wireframe(others).edges, others[0].edges)
    with pytest.raises(SampleError):
        mean_wireframe([])


def test_the_nearest_wireframe_finds_each_training_scene_and_puts_it_in_the_world():
    scenes = [sampled(seed) for seed in range(6)]
    nearest = fit_dummies(scenes).nearest
    for scene in scenes:
        result = nearest.predict(scene)
        np.testing.assert_allclose(result.vertices, scene.gt_vertices, atol=1e-4)
        np.testing.assert_array_equal(result.edges, scene.gt_edges)
    moved = dataclasses.replace(scenes[2], center=scenes[2].center + 100, scale=scenes[2].scale * 2)
    expected = (scenes[2].gt_vertices - scenes[2].center) * 2 + moved.center
    np.testing.assert_allclose(nearest.predict(moved).vertices, expected, atol=1e-3)


def test_the_nearest_scene_is_that_of_the_smallest_distance_by_brute_force():
    scenes = [sampled(seed) for seed in range(20)]
    nearest = fit_dummies(scenes).nearest
    for seed in range(100, 110):
        query = descriptor(*(getattr(sampled(seed), name) for name in ("xyz_norm", "class_id", "mask")))
        distances = [sum((int(a) - int(b)) ** 2 for a, b in zip(row, query)) for row in nearest.descriptors]
        assert nearest.nearest(query) == int(np.argmin(distances))


def test_the_descriptor_ignores_padding_and_the_order_of_points_and_keeps_classes_apart():
    scene = sampled(0)
    base = descriptor(scene.xyz_norm, scene.class_id, scene.mask)
    padded = scene.xyz_norm.copy()
    padded[~scene.mask] = np.nan
    order = np.random.default_rng(0).permutation(len(padded))
    np.testing.assert_array_equal(descriptor(padded[order], scene.class_id[order], scene.mask[order]), base)
    roof, other = np.full_like(scene.class_id, 10), np.full_like(scene.class_id, 12)
    assert not np.array_equal(*(descriptor(scene.xyz_norm, ids, scene.mask) for ids in (roof, other)))
    assert not descriptor(scene.xyz_norm, scene.class_id, np.zeros_like(scene.mask)).any()


def test_saved_dummies_predict_the_same_and_have_the_same_bytes(tmp_path):
    scenes = [sampled(seed, corners=3 + seed % 3) for seed in range(7)]
    empty = dataclasses.replace(scenes[0], gt_vertices=np.zeros((0, 3)), gt_edges=np.zeros((0, 2)))
    fitted = save_dummies(tmp_path / "a.npz", [empty, *scenes])
    save_dummies(tmp_path / "b.npz", iter(scenes))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    loaded = load_dummies(tmp_path / "a.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "b.npz"]
    for kind in ("mean", "nearest"):
        for query in (sampled(50), scenes[3]):
            a, b = getattr(fitted, kind).predict(query), getattr(loaded, kind).predict(query)
            assert a.vertices.dtype == np.float32 and a.edges.dtype == np.int64
            np.testing.assert_array_equal(a.vertices, b.vertices)
            np.testing.assert_array_equal(a.edges, b.edges)




@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {"edges": arrays["edges"] + 1},
        lambda arrays: {"vertex_counts": arrays["vertex_counts"][:-1]},
        lambda arrays: {"edge_counts": -arrays["edge_counts"]},
        lambda arrays: {"descriptors": arrays["descriptors"][:-1]},
        lambda arrays: {"descriptors": np.array([{}], dtype=object)},
        lambda arrays: {"vertices": arrays["vertices"][:, :2]},
    ],
    ids=["edge ids", "vertex counts", "edge counts", "descriptors", "pickled objects", "vertices"],
)
def test_a_damaged_file_of_dummies_is_refused(tmp_path, change):
    path = tmp_path / "dummies.npz"
    save_dummies(path, [sampled(seed) for seed in range(3)])
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **{**arrays, **change(arrays)})
    with pytest.raises(SampleError):
        load_dummies(path)


def test_a_missing_or_foreign_file_of_dummies_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    for name in ("absent.npz", "text.npz"):
        with pytest.raises(SampleError, match=name):
            load_dummies(tmp_path / name)
    with pytest.raises(SampleError):
        fit_dummies([])
