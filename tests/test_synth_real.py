"""The ``real`` preset: every difficulty does what it says and only that, and scenes without any are as they were."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import zipfile

import numpy as np
import pytest

from wireframe.bench.calibration_scene import depth_scales, edge_cells, roof_sample, wireframe_sample
from wireframe.classes import EDGE_ID, GESTALT_ID, colors_to_ids
from wireframe.colmap import read_points3d
from wireframe.errors import ConfigError
from wireframe.hashing import SYNTH, generator
from wireframe.synth import SynthConfig, make_building, make_scene, write_shards
from wireframe.synth.cameras import draw_cameras
from wireframe.synth.mistakes import draw_mistakes
from wireframe.synth.scene import scene_severity
from wireframe.synth.truth import ground_truth

SMALL = SynthConfig(width=160, height=120, colmap_points=1500, views_range=(4, 6))
# Wide enough for what is counted in metres, and no chance elsewhere.
PLAIN = dataclasses.replace(SMALL, colmap_sigma=0.01, colmap_outlier_share=0.0, depth_missing_prob=0.0, depth_sigma=0.0)
REAL = SynthConfig.real(width=160, height=120, colmap_points=1500)
UNCLASSIFIED = GESTALT_ID["unclassified"]


def columns(row: dict) -> dict[str, list]:
    """A row's columns as lists of arrays that compare; of COLMAP its text."""
    archive = zipfile.ZipFile(io.BytesIO(row["colmap"]))
    found = {name: list(value) if isinstance(value, list) else [value] for name, value in row.items()}
    found["colmap"] = [np.frombuffer(archive.read(name), dtype=np.uint8) for name in archive.namelist()]
    return {name: [np.asarray(-1 if item is None else item) for item in items] for name, items in found.items()}


def changed_columns(one: dict, other: dict) -> set[str]:
    first, second = columns(one), columns(other)
    return {name for name in first if len(first[name]) != len(second[name])
            or not all(np.array_equal(a, b) for a, b in zip(first[name], second[name]))}


def real_buildings(count: int, **changes: object) -> list:
    config = SynthConfig.real(**changes)
    return [make_building(generator(77, index, SYNTH), config) for index in range(count)]


def gestalt(row: dict) -> list[np.ndarray]:
    return [colors_to_ids(np.asarray(image), "gestalt") for image in row["gestalt"]]


@pytest.mark.parametrize(("config", "index", "expected"), [
    (SMALL, 0, "b6f87b75023ae581"),
    (SMALL, 1, "f35bba97cce1d421"),
    (SynthConfig.training(), 3, "745681c53c4b83c7"),
])
def test_scenes_of_the_other_presets_are_what_they_were_before_the_real_one(config, index, expected):
    row = make_scene(7, index, config)
    total = hashlib.sha256()
    for name in ("ade", "gestalt", "depth"):
        for image in row[name]:
            total.update(b"none" if image is None else np.asarray(image).tobytes())
    # Rounded: another C library may give another last bit.
    for array in (*row["K"], *row["R"], *row["t"], row["wf_vertices"], row["wf_edges"], read_points3d(row["colmap"])):
        total.update((np.rint(np.asarray(array, dtype=np.float64) * 500) + 0.0).tobytes())
    assert total.hexdigest()[:16] == expected


@pytest.mark.parametrize(("changes", "expected"), [
    ({"label_jitter_px": 9.0}, {"gestalt", "colmap"}),
    ({"false_strokes": 5.0}, {"gestalt", "colmap"}),
    ({"false_corners": 9.0}, {"gestalt", "colmap"}),
    ({"class_swap_prob": 0.5}, {"gestalt"}),
    ({"stroke_cut_prob": 0.9}, {"gestalt", "colmap"}),
    ({"small_miss_px": 80.0}, {"gestalt", "colmap"}),
    ({"gestalt_blank_prob": 1.0}, {"gestalt", "colmap"}),
    ({"ade_patches": 5.0}, {"ade", "colmap"}),
    ({"ade_shift_px": 20.0}, {"ade", "colmap"}),
    ({"ade_wrong_prob": 1.0}, {"ade", "colmap"}),
    ({"truth_scale_sigma": 0.1}, {"wf_vertices"}),
    ({"truth_gross_prob": 0.9}, {"wf_vertices"}),
    ({"colmap_hole_share": 0.5}, {"colmap"}),
    ({"colmap_clump_sigma": 1.0}, {"colmap"}),
    ({"colmap_tail_share": 0.3}, {"colmap"}),
    ({"colmap_backdrop_share": 0.3}, {"colmap"}),
])
def test_a_difficulty_changes_what_it_is_about_and_nothing_else(changes, expected):
    plain, hard = make_scene(5, 1, SMALL), make_scene(5, 1, dataclasses.replace(SMALL, **changes))
    assert changed_columns(plain, hard) - {"wf_vertices"} == expected - {"wf_vertices"}
    # What comes after the cloud in the scene's own stream is the small error of the truth alone, here zero.
    assert ("wf_vertices" in changed_columns(plain, hard)) == ("wf_vertices" in expected)


def test_blank_views_have_no_gestalt_label_and_wrong_ones_no_house():
    blank = make_scene(5, 1, dataclasses.replace(SMALL, gestalt_blank_prob=1.0))
    assert all((ids == UNCLASSIFIED).all() for ids in gestalt(blank))
    from wireframe import fuse_views, read_scene

    votes = []
    for share in (0.0, 1.0):
        points = fuse_views(read_scene(make_scene(5, 1, dataclasses.replace(PLAIN, ade_wrong_prob=share))), 200)
        votes.append(points.n_views_voted[points.keep].mean() if points.keep.any() else 0.0)
    assert votes[1] < 0.7 * votes[0]


def test_jitter_moves_corners_and_strokes_by_as_many_pixels_as_configured():
    config = SynthConfig.real(label_jitter_px=3.0, small_miss_px=0.0, width=384)
    building = real_buildings(1)[0]
    camera = draw_cameras(generator(1, 0, SYNTH), building, 2, config)[0]
    nothing = np.zeros(len(building.edges), dtype=bool), np.zeros(len(building.vertices), dtype=bool)
    drawn = [draw_mistakes(generator(1, index, 0), building, camera, config, *nothing) for index in range(40)]
    # Stated for images of twice this width.
    for shifts in ("corner_shifts", "stroke_shifts"):
        assert 1.4 < np.std(np.stack([getattr(mistakes, shifts) for mistakes in drawn])) < 1.6


def test_small_things_are_missed_more_often():
    config = SynthConfig.real(small_miss_px=60.0)
    missed, length = [], []
    for index, building in enumerate(real_buildings(10)):
        nothing = np.zeros(len(building.edges), dtype=bool), np.zeros(len(building.vertices), dtype=bool)
        for number, camera in enumerate(draw_cameras(generator(1, index, SYNTH), building, 4, config)):
            mistakes = draw_mistakes(generator(1, index, number), building, camera, config, *nothing)
            u, v, _ = camera.project(building.vertices)
            missed.append(mistakes.missed_strokes)
            length.append(np.hypot(*(x[building.edges[:, 0]] - x[building.edges[:, 1]] for x in (u, v))))
    missed, length = np.concatenate(missed), np.concatenate(length)
    assert missed[length < 40].mean() > 0.5
    assert missed[length > 240].mean() < 0.05


def test_the_truth_is_off_by_what_is_configured():
    def off(**changes: float) -> np.ndarray:
        config = SynthConfig(**changes)
        gaps = []
        for index, building in enumerate(real_buildings(40)):
            found = ground_truth(generator(6, index, 0), generator(6, index, 1), building, config)["wf_vertices"]
            gaps.append(found - building.vertices)
        return np.linalg.norm(np.concatenate(gaps), axis=1)

    gross = off(truth_gross_prob=0.2)
    moved = gross[gross > 1e-5]
    assert off().max() < 1e-5
    # The mean length of a vector of three normal numbers of sigma 3 cm.
    assert 0.045 < off(truth_sigma=0.03).mean() < 0.051
    assert 0.01 < off(truth_scale_sigma=0.005).mean() < 0.05
    assert 0.15 < len(moved) / len(gross) < 0.25
    assert moved.min() >= 0.5 - 1e-3 and moved.max() <= 1.5 + 1e-3


def test_holes_clumps_tails_and_backdrop_show_in_the_cloud():
    def cloud(**changes: object) -> tuple[dict, np.ndarray]:
        row = make_scene(5, 3, dataclasses.replace(PLAIN, views_range=(6, 6), **changes))
        return row, read_points3d(row["colmap"])

    row, plain = cloud()
    empty = [edge_cells(row["wf_vertices"], row["wf_edges"], points)[1]
             for points in (plain, cloud(colmap_hole_share=0.6)[1])]
    assert empty[1] > empty[0] + 20
    counts = [np.unique(np.floor(points / 0.6), axis=0, return_counts=True)[1]
              for points in (plain, cloud(colmap_clump_sigma=1.5)[1])]
    assert np.std(counts[1]) / np.mean(counts[1]) > 1.2 * np.std(counts[0]) / np.mean(counts[0])
    low, high = row["wf_vertices"].min(axis=0) - 0.6, row["wf_vertices"].max(axis=0) + 0.6
    low[1] = -0.1

    def outside(points: np.ndarray) -> float:
        return 1 - ((points >= low) & (points <= high)).all(axis=1).mean()

    # Most of the backdrop is seen by one view only.
    assert outside(cloud(colmap_backdrop_share=0.5, colmap_background_share=0.0)[1]) > 0.05
    assert outside(cloud(colmap_background_share=0.0)[1]) < 0.02
    # Below the ground lie only points whose error is wide.
    under = [(points[:, 1] < -0.2).mean() for points in (plain, cloud(colmap_tail_share=0.5)[1])]
    assert under[0] < 0.002 < 0.01 < under[1]


def test_depth_scale_and_missing_depth_are_as_stated_and_move_the_normalisation_alone():
    from wireframe import fuse_views, read_scene, sample_points
    from wireframe.rivals import try_handcrafted

    pytest.importorskip("hoho2025.example_solutions")
    config = dataclasses.replace(REAL, width=64, height=48, colmap_points=300)
    rows = [make_scene(8, index, config) for index in range(24)]
    scales = np.concatenate([depth_scales(row) for row in rows])
    assert 0.8 < np.percentile(scales, 10) < 0.92 < 1.0 < np.median(scales) < 1.12 < np.percentile(scales, 90) < 1.3
    missing = [image is None for row in rows for image in row["depth"]]
    assert 0.34 < np.mean(missing) < 0.54
    config = dataclasses.replace(PLAIN, width=320, height=240, depth_unscaled_prob=0.0, depth_none_prob=0.0)
    found = []
    for scale in (1.0, 1.3):
        row = make_scene(8, 0, dataclasses.replace(config, depth_scale_range=(scale, scale)))
        found.append((sample_points(fuse_views(read_scene(row), 500)), try_handcrafted(row)[0]))
    (one, rival), (other, same) = found
    np.testing.assert_array_equal(rival.vertices, same.vertices)
    moved = np.linalg.norm(one.center - other.center) + abs(float(one.scale) - float(other.scale))
    assert moved > 1.0


def test_few_views_are_likelier_than_many_and_all_numbers_of_them_occur():
    from wireframe.synth.scene import _draw_count

    config = SynthConfig.real()
    counts = [_draw_count(generator(1, index, SYNTH), config) for index in range(2000)]
    assert (min(counts), max(counts)) == config.views_range
    assert np.median(counts) < 8 < np.percentile(counts, 95)


def test_names_of_twenty_two_views_do_not_contain_one_another():
    row = make_scene(4, 0, dataclasses.replace(REAL, width=32, height=32, colmap_points=50, views_range=(22, 22)))
    names = row["image_ids"]
    assert len(set(names)) >= 22
    assert not any(first in other for first in names for other in names if first is not other)


def test_roofs_are_as_complex_as_real_ones_and_valid():
    buildings = real_buildings(80)
    edges = [len(building.edges) for building in buildings]
    assert 16 < np.mean([len(building.vertices) for building in buildings]) < 24
    assert 20 < np.mean(edges) < 30 and max(edges) <= 64
    for building in buildings:
        assert len({tuple(sorted(edge)) for edge in building.edges.tolist()}) == len(building.edges)
        assert set(building.edges.ravel().tolist()) == set(range(len(building.vertices)))
        assert EDGE_ID["transition_line"] not in building.edge_classes
        gap = np.linalg.norm(building.vertices[:, None] - building.vertices[None], axis=-1)
        assert gap[np.triu_indices(len(gap), 1)].min() >= 0.9
        for face in building.faces:
            centred = building.vertices[list(face)] - building.vertices[list(face)].mean(axis=0)
            assert np.linalg.svd(centred, compute_uv=False)[-1] < 1e-9


def test_a_dormer_stands_on_a_slope_and_meets_it_in_valleys():
    plain = {"roof_types": ("gable",), "roof_weights": (1.0,), "garage_prob": 0.0, "porch_prob": 0.0,
             "annexes_range": (0, 0)}
    found = 0
    for index in range(20):
        bare, more = (make_building(generator(3, index, SYNTH), SynthConfig.real(**plain, dormers_range=(most, most)))
                      for most in (0, 8))
        added = len(more.vertices) - 6
        assert added % 6 == 0 and len(bare.vertices) == 6
        found += added // 6
        valleys = more.edges[more.edge_classes == EDGE_ID["valley"]]
        assert len(valleys) == added // 3
        slopes = [more.vertices[list(face)] for face in more.faces[:2]]
        for point in more.vertices[np.unique(valleys)] if len(valleys) else ():
            gaps = []
            for face in slopes:
                normal = np.cross(face[1] - face[0], face[2] - face[0])
                gaps.append(abs((point - face[0]) @ normal) / np.linalg.norm(normal))
            assert min(gaps) < 1e-9
    assert found > 10


def test_annexes_stand_on_other_sides_than_the_garage():
    config = {"roof_types": ("hip",), "roof_weights": (1.0,), "garage_prob": 1.0, "porch_prob": 0.0,
              "two_storey_prob": 1.0, "dormers_range": (0, 0)}
    none, all_three = ([make_building(generator(9, index, SYNTH), SynthConfig.real(**config, annexes_range=(n, n)))
                        for index in range(10)] for n in (0, 2))
    flashing = [sum((building.edge_classes == EDGE_ID["step_flashing"]).sum() for building in some)
                for some in (none, all_three)]
    assert flashing[1] >= 2 * flashing[0] > 0


def test_severity_is_log_normal_with_mean_one_and_scales_every_mistake():
    config = SynthConfig.real()
    drawn = np.array([scene_severity(2, index, config) for index in range(4000)])
    steady = np.array([scene_severity(2, index, config.changed(failure_prob=0.0)) for index in range(4000)])
    assert 0.95 < drawn.mean() < 1.05 and 0.95 < steady.mean() < 1.05
    assert abs(np.std(np.log(steady)) - config.severity_sigma) < 0.02
    # Some scenes are failures, the same multiple of what they would have been.
    times = drawn / steady
    failed = times > 1
    assert abs(failed.mean() - config.failure_prob) < 0.015
    np.testing.assert_allclose(times[failed], 6 * times[~failed].max(), rtol=1e-12)
    np.testing.assert_allclose(times[~failed], times[~failed].max(), rtol=1e-12)
    assert config.at_severity(1.0).corner_drop_prob == pytest.approx(config.corner_drop_prob)
    worse, milder = config.at_severity(3.0), config.at_severity(0.2)
    for name in ("corner_drop_prob", "false_strokes", "colmap_sigma", "colmap_hole_share", "ade_patches"):
        assert getattr(milder, name) < getattr(config, name) < getattr(worse, name)
    assert config.at_severity(1000.0).corner_drop_prob <= 1.0
    assert worse.depth_scale_range == config.depth_scale_range and worse.truth_sigma == config.truth_sigma


def test_shards_of_real_scenes_do_not_depend_on_workers(tmp_path):
    config = dataclasses.replace(REAL, width=64, height=48, colmap_points=100, views_range=(4, 6))
    paths = [write_shards(tmp_path / str(workers), seed=3, count=3, config=config, workers=workers)[0]
             for workers in (1, 2)]
    first, second = (hashlib.sha256(open(path, "rb").read()).hexdigest() for path in paths)
    assert first == second


def test_the_truth_survives_the_graph_step_and_the_rival_reads_the_scenes():
    from wireframe import Wireframe, fuse_views, read_scene, sample_points, score
    from wireframe.graph import segments_to_wireframe
    from wireframe.rivals import try_handcrafted

    pytest.importorskip("hoho2025.example_solutions")
    scores = []
    for index in range(4):
        row = make_scene(12, index, dataclasses.replace(REAL, width=384, height=288, colmap_points=8000))
        sampled = sample_points(fuse_views(read_scene(row), 4000), 2048)
        points, class_id = sampled.world_points()
        made = segments_to_wireframe(sampled.gt_segments * sampled.scale + sampled.center, points, class_id)
        scores.append(score(made, Wireframe(row["wf_vertices"], row["wf_edges"])).hss)
        assert try_handcrafted(row)[1] is None
    assert np.mean(scores) > 0.9


@pytest.mark.parametrize("change", [
    {"views_skew": 0.0}, {"colmap_cell": 0.0}, {"false_strokes": -1.0}, {"false_corners": 1000.0},
    {"truth_gross_prob": 1.5}, {"dormers_range": (3, 1)}, {"ring_range": (0.0, 1.0)}, {"severity_sigma": -1.0},
])
def test_impossible_difficulties_are_refused_by_name(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        SynthConfig.real(**change)


def test_the_command_writes_real_scenes(tmp_path):
    from wireframe.cli import main
    from wireframe.shards import iter_rows

    arguments = ["--preset", "real", "--size", "64x48", "--set", "colmap_points=100", "--count", "1", "--workers", "1"]
    assert main(["synth", str(tmp_path), *arguments, "--quiet"]) == 0
    row = next(iter(iter_rows(tmp_path / "synth-0-000000.tar")))
    expected = make_scene(0, 0, SynthConfig.real(width=64, height=48, colmap_points=100))
    np.testing.assert_array_equal(np.asarray(row["wf_vertices"], np.float32), expected["wf_vertices"])


def test_cells_and_dummies_of_the_calibration():
    vertices = np.array([[0.05, 0.05, 0.05], [2.95, 0.05, 0.05]])
    edges = np.array([[0, 1]])
    assert edge_cells(vertices, edges, np.zeros((0, 3))) == (5, 5)
    assert edge_cells(vertices, edges, np.array([[0.1, 0.1, 0.1], [0.2, 0.1, 0.1], [2.5, 0.3, 0.3]])) == (5, 3)
    buildings = real_buildings(3)
    from wireframe.rivals import fit_dummies

    dummies = fit_dummies([wireframe_sample(building) for building in buildings])
    for building in buildings:
        sample = wireframe_sample(building)
        query = roof_sample(sample.xyz_norm * sample.scale + sample.center, sample.class_id)
        np.testing.assert_allclose(dummies.nearest.predict(query).vertices, building.vertices, atol=1e-4)
