"""Synthetic scenes: valid wireframes, maps that agree with the cameras, rows that others can read."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from wireframe.classes import ADE_ID, EDGE_ID, EDGE_NAMES, GESTALT_ID, UNKNOWN, colors_to_ids
from wireframe.errors import ConfigError
from wireframe.hashing import SYNTH, generator
from wireframe.synth import ROOF_TYPES, SynthConfig, make_building, make_scene, write_shards
from wireframe.synth.cameras import draw_cameras
from wireframe.synth.mistakes import only_missed
from wireframe.synth.points import quaternion
from wireframe.synth.raster import Raster
from wireframe.synth.render import render
from wireframe.synth.surroundings import Surroundings

SMALL = SynthConfig(width=160, height=120, colmap_points=1500, views_range=(4, 6))
CLEAN = dataclasses.replace(SMALL, depth_missing_prob=0.0, depth_none_prob=0.0, depth_sigma=0.0,
                            depth_unscaled_prob=0.0, depth_scale_range=(1.0, 1.0), stroke_drop_prob=0.0,
                            corner_drop_prob=0.0, trees_range=(0, 0), bushes_range=(0, 0), fence_prob=0.0)
CORNERS = ("apex", "eave_end_point", "flashing_end_point")


def digest(row: dict) -> str:
    total = hashlib.sha256()
    for column in sorted(row):
        value = row[column]
        for item in value if isinstance(value, list) else [value]:
            total.update(column.encode())
            plain = item is None or isinstance(item, (str, bool))
            total.update(item if isinstance(item, bytes) else str(item).encode() if plain
                         else np.ascontiguousarray(np.asarray(item)).tobytes())
    return total.hexdigest()


def buildings(roof_type: str, count: int) -> list:
    config = SynthConfig.only(roof_type)
    return [make_building(generator(5, index, SYNTH), config) for index in range(count)]


def gestalt_ids(row: dict, view: int) -> np.ndarray:
    return colors_to_ids(np.asarray(row["gestalt"][view]), "gestalt")


def distance_to_segments(points: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    along = end - start
    share = ((points[:, None] - start) * along).sum(axis=-1) / (along * along).sum(axis=-1)
    return np.linalg.norm(start + np.clip(share, 0, 1)[..., None] * along - points[:, None], axis=-1)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [make_scene(9, index, SMALL) for index in range(4)]


def test_the_same_seed_and_index_give_the_same_bytes_in_another_process(rows):
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_synth import SMALL, digest, make_scene\n"
        "print(digest(make_scene(9, 2, SMALL)))\n"
    )
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "77"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest(rows[2]) == digest(make_scene(9, 2, SMALL))


def test_scenes_differ_between_indices_and_seeds(rows):
    assert len({digest(row) for row in [*rows, make_scene(10, 0, SMALL)]}) == 5


@pytest.mark.parametrize("roof_type", ROOF_TYPES)
def test_every_roof_type_makes_a_valid_wireframe(roof_type):
    for building in buildings(roof_type, 40):
        vertices, edges = building.vertices, building.edges
        assert building.roof_type == roof_type
        assert 4 <= len(vertices) <= 56 and 4 <= len(edges) <= 64
        assert set(edges.ravel().tolist()) == set(range(len(vertices)))
        assert len({tuple(sorted(edge)) for edge in edges.tolist()}) == len(edges)
        assert (edges[:, 0] != edges[:, 1]).all()
        assert set(building.edge_classes.tolist()) <= set(EDGE_ID.values())
        assert EDGE_ID["transition_line"] not in building.edge_classes
        gap = np.linalg.norm(vertices[:, None] - vertices[None], axis=-1)
        assert gap[np.triu_indices(len(vertices), 1)].min() >= 0.9


@pytest.mark.parametrize("roof_type", ROOF_TYPES)
def test_no_corner_lies_inside_an_edge_and_faces_are_planar(roof_type):
    for building in buildings(roof_type, 40):
        start, end = (building.vertices[building.edges[:, k]] for k in (0, 1))
        distance = distance_to_segments(building.vertices, start, end)
        for number, edge in enumerate(building.edges):
            distance[edge, number] = np.inf
        assert distance.min() > 0.5
        for face in building.faces:
            centred = building.vertices[list(face)] - building.vertices[list(face)].mean(axis=0)
            assert np.linalg.svd(centred, compute_uv=False)[-1] < 1e-9


def test_edge_classes_follow_the_shape():
    expected = {"gable": {"eave": 2, "rake": 4, "ridge": 1}, "shed": {"eave": 1, "rake": 2, "ridge": 1}}
    for roof_type, counts in expected.items():
        config = SynthConfig.only(roof_type, garage_prob=0.0, porch_prob=0.0)
        for index in range(10):
            building = make_building(generator(1, index, SYNTH), config)
            names = [EDGE_NAMES[k] for k in building.edge_classes]
            assert {name: names.count(name) for name in names} == counts
    for roof_type in ("l_shaped", "cross_gable"):
        for building in buildings(roof_type, 20):
            valleys = building.edges[building.edge_classes == EDGE_ID["valley"]]
            assert len(valleys) >= (1 if roof_type == "l_shaped" else 2)
            # A valley runs from an eave's inner corner up to a point where ridges or hips meet.
            height = np.sort(building.vertices[valleys][:, :, 1], axis=1)
            assert (height[:, 1] > height[:, 0] + 0.3).all()


def test_an_attached_garage_and_a_porch_meet_the_wall_in_flashing():
    config = SynthConfig.only("gable", garage_prob=1.0, porch_prob=1.0, two_storey_prob=1.0)
    names: set[str] = set()
    for index in range(10):
        building = make_building(generator(2, index, SYNTH), config)
        names |= {EDGE_NAMES[k] for k in building.edge_classes}
        assert len(building.vertices) <= 16
    assert {"flashing", "step_flashing"} <= names


def test_the_row_has_the_raw_layout(rows):
    for row in rows:
        count = len(row["image_ids"])
        assert 4 <= count - sum(row["pose_only_in_colmap"]) <= 6
        for column in ("ade", "gestalt", "depth", "K", "R", "t", "pose_only_in_colmap"):
            assert len(row[column]) == count
        for first in row["image_ids"]:
            assert not any(first in other for other in row["image_ids"] if other is not first)
            assert "." not in first
        for view in range(count):
            assert row["ade"][view].size == row["gestalt"][view].size == (160, 120)
            assert row["K"][view].dtype == row["R"][view].dtype == row["t"][view].dtype == np.float32
            assert row["t"][view].shape == (3,)
            depth = row["depth"][view]
            assert depth is None or (depth.mode == "I;16" and depth.size == (160, 120))
            assert (gestalt_ids(row, view) != UNKNOWN).all()
        assert row["wf_vertices"].dtype == np.float32 and row["wf_edges"].dtype == np.int64
        assert row["wf_classifications"].shape == (len(row["wf_edges"]),)


def test_pose_only_views_have_zero_cameras_but_stand_in_colmap():
    row = make_scene(9, 0, dataclasses.replace(SMALL, pose_only_prob=1.0))
    assert row["pose_only_in_colmap"][-1] and sum(row["pose_only_in_colmap"]) == 1
    for column in ("K", "R", "t"):
        assert not row[column][-1].any() and row[column][0].any()
    text = zipfile.ZipFile(io.BytesIO(row["colmap"])).read("images.txt").decode()
    assert row["image_ids"][-1] in text


def test_depth_is_missing_as_often_as_configured():
    config = dataclasses.replace(SMALL, width=32, height=32, colmap_points=10, depth_none_prob=0.0)
    images = [image for index in range(40) for image in make_scene(4, index, config)["depth"]]
    share = sum(image is None for image in images) / len(images)
    assert 0.3 < share < 0.52
    none = make_scene(4, 0, dataclasses.replace(config, depth_none_prob=1.0))
    assert all(image is None for image in none["depth"])


@pytest.mark.parametrize("index", range(4))
def test_true_corners_project_onto_corner_pixels_in_two_views(index):
    row = make_scene(3, index, dataclasses.replace(CLEAN, views_range=(10, 10), eye_level_share=0.2))
    corners = [GESTALT_ID[name] for name in CORNERS]
    hits = np.zeros(len(row["wf_vertices"]), dtype=int)
    for view, (K, R, t) in enumerate(zip(row["K"], row["R"], row["t"])):
        if row["pose_only_in_colmap"][view]:
            continue
        camera = row["wf_vertices"].astype(np.float64) @ R.T.astype(np.float64) + t
        u, v = (np.rint(camera[:, k] / camera[:, 2] * K[k, k] + K[k, 2]).astype(int) for k in (0, 1))
        ids = gestalt_ids(row, view)
        framed = np.flatnonzero((u >= 0) & (u < 160) & (v >= 0) & (v < 120) & (camera[:, 2] > 0))
        hits[framed] += np.isin(ids[v[framed], u[framed]], corners)
    assert (hits >= 2).mean() >= 0.9


def test_depth_unprojects_onto_the_roof_and_the_ground():
    plain = {"roof_types": ("gable",), "roof_weights": (1.0,), "garage_prob": 0.0, "porch_prob": 0.0}
    building = make_building(generator(6, 0, SYNTH), SynthConfig(**plain))
    row = make_scene(6, 0, dataclasses.replace(CLEAN, **plain))
    np.testing.assert_array_equal(building.vertices.astype(np.float32), row["wf_vertices"])
    checked = 0
    for view, (K, R, t) in enumerate(zip(row["K"], row["R"], row["t"])):
        if row["pose_only_in_colmap"][view]:
            continue
        z = np.asarray(row["depth"][view]) / 1000.0
        ids, ade = gestalt_ids(row, view), colors_to_ids(np.asarray(row["ade"][view]), "ade")
        v, u = np.nonzero((z > 0) & (z < 59))
        rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(len(u))], axis=1)
        world = (rays * z[v, u, None] - t) @ R
        assert np.abs(world[ade[v, u] == ADE_ID["grass"], 1]).max(initial=0) < 0.05
        on_roof = world[ids[v, u] == GESTALT_ID["roof"]]
        gaps = np.full(len(on_roof), np.inf)
        for face in building.faces:
            p = building.vertices[list(face)]
            normal = np.cross(p[1] - p[0], p[2] - p[0])
            gaps = np.minimum(gaps, np.abs((on_roof - p[0]) @ normal) / np.linalg.norm(normal))
        checked += len(on_roof)
        assert gaps.max(initial=0) < 0.05
    assert checked > 500


def test_trees_hide_the_house_in_ade_but_not_in_gestalt():
    config = dataclasses.replace(CLEAN, trees_range=(8, 8))
    row = make_scene(8, 1, config)
    behind = 0
    for view in range(len(row["image_ids"])):
        ade = colors_to_ids(np.asarray(row["ade"][view]), "ade")
        house = gestalt_ids(row, view) != GESTALT_ID["unclassified"]
        behind += int((house & (ade == ADE_ID["tree"])).sum())
    assert behind > 50


def test_strokes_of_hidden_edges_are_not_drawn():
    config = SynthConfig.only(
        "gable", width=320, height=240, garage_prob=0.0, porch_prob=0.0, eye_level_share=1.0)
    building = make_building(generator(12, 0, SYNTH), config)
    nothing = Surroundings((), (), ADE_ID["grass"])
    keep = only_missed(building, *(np.zeros(len(part), dtype=bool) for part in (building.edges, building.vertices)))
    eaves = np.flatnonzero(building.edge_classes == EDGE_ID["eave"])
    checked = 0
    for camera in draw_cameras(generator(12, 1, SYNTH), building, 12, config):
        ends = building.vertices[building.edges[eaves]]
        middle = camera.to_camera(ends.mean(axis=1))
        far = int(np.argmax(middle[:, 2]))
        # Only where the house is seen broadside is the far eave surely behind it.
        if abs(middle[0, 2] - middle[1, 2]) < 6:
            continue
        ids = render(camera, building, nothing, config, keep).gestalt
        u, v, _ = camera.project(np.linspace(*ends[far], 21)[5:16])
        framed = (u >= 0) & (u < 319.4) & (v >= 0) & (v < 239.4)
        seen = ids[np.rint(v[framed]).astype(int), np.rint(u[framed]).astype(int)]
        checked += len(seen)
        assert not (seen == GESTALT_ID["eave"]).any()
    assert checked > 20


def test_a_nearer_polygon_wins_whatever_the_order():
    camera = draw_cameras(generator(0, 0, SYNTH), make_building(generator(0, 0, SYNTH)), 2, SMALL)[0]
    corners = np.array([[20.0, 20.0], [130.0, 25.0], [125.0, 100.0], [15.0, 90.0]])
    # The far one is smaller in the image, so that all of it is hidden.
    inner = 0.9 * corners + 0.1 * corners.mean(axis=0)
    near, far = (camera.to_world(*uv.T, np.full(4, z)) for uv, z in ((corners, 4.0), (inner, 9.0)))
    results = []
    for order in ((0, 1), (1, 0)):
        raster = Raster(camera, 160, 120)
        for number in order:
            raster.polygon((near, far)[number], number)
        results.append(raster)
    np.testing.assert_array_equal(results[0].ident, results[1].ident)
    assert set(np.unique(results[0].ident)) == {-1, 0}
    np.testing.assert_allclose(1 / results[0].inverse_z[60, 70], 4.0, rtol=1e-5)


def test_an_ellipsoid_is_drawn_at_its_front():
    camera = draw_cameras(generator(0, 0, SYNTH), make_building(generator(0, 0, SYNTH)), 2, SMALL)[0]
    centre = camera.to_world(np.array([80.0]), np.array([60.0]), np.array([10.0]))[0]
    raster = Raster(camera, 160, 120)
    raster.ellipsoid(centre, np.array([1.5, 1.5, 1.5]), 4)
    ray = np.array([(80 - camera.K[0, 2]) / camera.K[0, 0], (60 - camera.K[1, 2]) / camera.K[1, 1], 1.0])
    assert raster.ident[60, 80] == 4
    np.testing.assert_allclose(1 / raster.inverse_z[60, 80], 10 - 1.5 / np.linalg.norm(ray), rtol=1e-4)


def test_quaternions_turn_back_into_their_rotations():
    rng = np.random.default_rng(0)
    for _ in range(50):
        q = rng.normal(size=4)
        w, x, y, z = q / np.linalg.norm(q)
        R = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                      [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                      [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])
        np.testing.assert_allclose(np.abs(np.dot(quaternion(R), [w, x, y, z])), 1.0, atol=1e-12)


def test_pycolmap_reads_the_model_and_projects_like_the_row(tmp_path):
    pycolmap = pytest.importorskip("pycolmap")
    row = make_scene(9, 1, SMALL)
    zipfile.ZipFile(io.BytesIO(row["colmap"])).extractall(tmp_path)
    model = pycolmap.Reconstruction(str(tmp_path))
    assert len(model.images) == len(row["image_ids"])
    assert 1000 <= len(model.points3D) <= 1500
    xyz = np.array([point.xyz for point in model.points3D.values()])
    for image in model.images.values():
        view = next(k for k, name in enumerate(row["image_ids"]) if name in image.name)
        pose = image.cam_from_world() if callable(image.cam_from_world) else image.cam_from_world
        K = model.cameras[image.camera_id].calibration_matrix()
        camera = xyz @ pose.rotation.matrix().T + pose.translation
        expected = xyz @ row["R"][view].T.astype(np.float64) + row["t"][view]
        np.testing.assert_allclose(K, row["K"][view], rtol=1e-6)
        np.testing.assert_allclose(camera, expected, atol=1e-4)
        seen = [(p.xy, p.point3D_id) for p in image.points2D]
        assert seen and all(image.has_point3D(number) for _, number in seen[:5])
        pixels = np.array([model.points3D[number].xyz for _, number in seen])
        pixels = pixels @ row["R"][view].T + row["t"][view]
        uv = pixels[:, :2] / pixels[:, 2:] * K[[0, 1], [0, 1]] + K[:2, 2]
        assert np.median(np.linalg.norm(uv - np.array([xy for xy, _ in seen]), axis=1)) < 1.5
    lengths = [point.track.length() for point in model.points3D.values()]
    assert min(lengths) >= 2


def test_points_lie_near_the_house_but_for_background_and_strays(rows):
    from wireframe.colmap import read_points3d

    for row in rows:
        points = read_points3d(row["colmap"])
        low, high = row["wf_vertices"].min(axis=0) - 0.5, row["wf_vertices"].max(axis=0) + 0.5
        low[1] = -0.5
        assert ((points >= low) & (points <= high)).all(axis=1).mean() > 0.5


def test_the_reader_takes_a_synthetic_row_and_fusion_finds_its_corners(rows):
    from wireframe import fuse_views, read_scene

    for row in rows:
        scene = read_scene(row)
        assert len(scene.views) == len(row["image_ids"]) - sum(row["pose_only_in_colmap"])
        points = fuse_views(scene, depth_points_per_view=500, seed=0)
        assert (points.class_id < 3).any() and (points.class_id == 10).any()


def test_the_handcrafted_rival_finds_houses_in_synthetic_scenes():
    example_solutions = pytest.importorskip("hoho2025.example_solutions")
    metric = pytest.importorskip("hoho2025.metric_helper")
    config = SynthConfig(colmap_points=4000, views_range=(5, 6), depth_missing_prob=0.0, depth_none_prob=0.0)
    scores = []
    for index in range(3):
        row = make_scene(11, index, config)
        vertices, edges = example_solutions.predict_wireframe(row)
        scores.append(metric.hss(np.asarray(vertices), edges, row["wf_vertices"], row["wf_edges"])[0])
    assert np.median(scores) > 0.1


def test_shards_do_not_depend_on_workers_and_are_kept_when_finished(tmp_path):
    from wireframe.shards import iter_rows

    config = dataclasses.replace(SMALL, width=64, height=48, colmap_points=100)
    one = write_shards(tmp_path / "one", seed=3, start=4, count=3, config=config, shard_size=2)
    two = write_shards(tmp_path / "two", seed=3, start=4, count=3, config=config, shard_size=2, workers=2)
    assert [Path(path).name for path in one] == ["synth-3-000004.tar", "synth-3-000006.tar"]
    assert [Path(path).read_bytes() for path in one] == [Path(path).read_bytes() for path in two]
    assert digest(next(iter(iter_rows(one[1])))) == digest(make_scene(3, 6, config))
    before = [os.stat(path).st_mtime_ns for path in one]
    write_shards(tmp_path / "one", seed=3, start=4, count=3, config=config, shard_size=2)
    assert [os.stat(path).st_mtime_ns for path in one] == before


def test_a_damaged_or_differently_configured_shard_is_made_anew(tmp_path):
    config = dataclasses.replace(SMALL, width=64, height=48, colmap_points=100)
    (path,) = write_shards(tmp_path, seed=3, count=1, config=config)
    good = Path(path).read_bytes()
    Path(path).write_bytes(good[:-512])
    write_shards(tmp_path, seed=3, count=1, config=config)
    assert Path(path).read_bytes() == good
    write_shards(tmp_path, seed=3, count=1, config=dataclasses.replace(config, colmap_points=50))
    assert Path(path).read_bytes() != good
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["synth-3-000000.tar", "synth-3-000000.tar.json"]


@pytest.mark.parametrize("change", [
    {"width": 3}, {"roof_types": ("dome",), "roof_weights": (1.0,)}, {"depth_missing_prob": 1.5},
    {"views_range": (6, 4)}, {"views_range": (1, 4)}, {"roof_weights": (1.0,)}, {"colmap_sigma": -1.0},
    {"views_range": (4.5, 6)}, {"views_range": (4, 6, 8)}, {"views_range": 4}, {"trees_range": (0, 2.0)},
    {"roof_types": (1,)}, {"roof_types": "gable"}, {"roof_types": ()}, {"roof_weights": ("a",) * 6},
    {"roof_weights": (-1.0, 2, 1, 1, 1, 1)}, {"roof_weights": (0,) * 6}, {"roof_weights": (float("nan"),) * 6},
    {"pitch_range": (0.5, float("inf"))}, {"pitch_range": (True, 1)}, {"focal_range": (0.0, 1.0)}, {"depth_far": 0},
    {"depth_far": float("nan")}, {"aim_sigma": "0.4"}, {"width": 320.0}, {"garage_prob": None},
    {"min_vertex_distance": 10**400}, {"colmap_points": -1},
])
def test_impossible_configurations_are_refused_by_name(change):
    with pytest.raises(ConfigError, match="image size" if change == {"width": 3} else next(iter(change))):
        SynthConfig(**change)


def test_settings_are_json_or_text():
    config = SynthConfig().changed(["roof_types=gable", "roof_weights=[1]", "aim_sigma=1", "views_range=[3, 5]"])
    assert config == SynthConfig.only("gable", aim_sigma=1, views_range=(3, 5))
    for setting, name in (("width=wide", "width"), ("roof_types=dome", "dome"), ("aim_sigma=NaN", "aim_sigma"),
                          ("width", "unknown setting"), ("hight=3", "hight"), ("views_range=" + "[" * 9999, "views")):
        with pytest.raises(ConfigError, match=name) as problem:
            SynthConfig().changed([setting])
        assert len(str(problem.value)) < 1500
