"""The vectorised fusion against a brute-force reading of the baseline's rules, point by point in plain Python."""

import collections
import math

import numpy as np
import pytest

from scenes import random_scene
from wireframe import classes, hashing
from wireframe.classes import ADE_NAMES, GESTALT_NAMES, UNKNOWN
from wireframe.fusion import LabelledPoints, fuse_views, label_points

# The S23DR 2026 baseline's rules, by the names of the public colour tables; written out here, so that a name lost from
# the package's own lists shows.
ENVELOPE = {
    "wall", "building;edifice", "floor;flooring", "ceiling", "windowpane;window", "door;double;door", "house",
    "skyscraper", "screen;door;screen", "blind;screen", "hovel;hut;hutch;shack;shanty", "tower",
    "booth;cubicle;stall;kiosk",
}
OCCLUDERS = {
    "tree", "person;individual;someone;somebody;mortal;soul", "car;auto;automobile;machine;motorcar",
    "truck;motortruck", "van", "fence;fencing", "railing;rail", "bannister;banister;balustrade;balusters;handrail",
    "stairs;steps", "stairway;staircase", "step;stair", "pole", "streetlight;street;lamp", "signboard;sign",
    "awning;sunshade;sunblind", "plant;flora;plant;life", "pot;flowerpot",
}
OUTSIDE_THE_HOUSE = {"unclassified", "unknown", "transition_line"}
TIERS = (
    {"apex", "eave_end_point", "flashing_end_point"},
    {"rake", "ridge", "eave", "hip", "valley", "flashing", "step_flashing"},
    {"roof"},
    {"door", "garage", "window", "shutter", "fascia", "soffit", "horizontal_siding", "vertical_siding", "brick",
     "concrete", "other_wall", "trim", "post", "ground_line"},
)
TIER_3_ADE = {"building;edifice", "house", "wall", "windowpane;window", "door;double;door"}
CLASSES = (
    "apex", "eave_end_point", "flashing_end_point", "rake", "ridge", "eave", "hip", "valley", "flashing",
    "step_flashing", "roof", "other_house_part", "other",
)


def test_the_classes_of_the_rules_are_the_baselines():
    for ours, theirs in (
        (classes.ADE_ENVELOPE, ENVELOPE), (classes.ADE_OCCLUDERS, OCCLUDERS), (classes.TIER_3_ADE, TIER_3_ADE),
        (classes.GESTALT_INVALID, OUTSIDE_THE_HOUSE),
    ):  # fmt: skip
        assert len(ours) == len(theirs) and set(ours) == theirs
    assert [set(names) for names in classes.TIER_GESTALT] == list(TIERS)
    assert classes.POINT_CLASSES == CLASSES
    assert set(ADE_NAMES) >= ENVELOPE | OCCLUDERS
    assert set(GESTALT_NAMES) == OUTSIDE_THE_HOUSE.union(*TIERS)


def name_of(table, index):
    return None if index == UNKNOWN else table[index]


def brute_force(xyz, scene):
    """One dict a point, from the text of the rules; float64 in Python's own arithmetic."""
    out = []
    for point in xyz.astype(float).tolist():
        visible, behind, support = [], [], 0
        for view in scene.views:
            R, t, K = view.R.astype(float).tolist(), view.t.astype(float).tolist(), view.K.astype(float).tolist()
            c = [((R[i][0] * point[0] + R[i][1] * point[1]) + R[i][2] * point[2]) + t[i] for i in range(3)]
            if not c[2] > 1e-6:
                continue
            u, v = K[0][0] * (c[0] / c[2]) + K[0][2], K[1][1] * (c[1] / c[2]) + K[1][2]
            height, width = view.ade.shape
            if not (0 <= u < width and 0 <= v < height):
                continue
            column, row = min(round(u), width - 1), min(round(v), height - 1)
            gestalt = name_of(GESTALT_NAMES, view.gestalt[row, column])
            ade = name_of(ADE_NAMES, view.ade[row, column])
            if gestalt in OUTSIDE_THE_HOUSE:
                continue
            support += 1
            if gestalt is not None:
                behind.append(GESTALT_NAMES.index(gestalt))
            if ade in ENVELOPE:
                if gestalt is not None:
                    visible.append((1, GESTALT_NAMES.index(gestalt)))
            elif ade in OCCLUDERS:
                visible.append((2, ADE_NAMES.index(ade)))
        out.append(conclude(visible, behind, support))
    return out


def most_frequent(votes):
    counts = collections.Counter(votes)
    return min(counts, key=lambda vote: (-counts[vote], vote)) if counts else None


def conclude(visible, behind, support):
    winner, hidden = most_frequent(visible), most_frequent(behind)
    effective = winner[1] if winner and winner[0] == 1 else hidden
    name = None if effective is None else GESTALT_NAMES[effective]
    tier = next((level for level, names in enumerate(TIERS) if name in names), 4)
    klass = name if name in CLASSES else "other_house_part" if tier == 3 else "other"
    return {
        "keep": support >= 1 and len(visible) >= 1,
        "visible_src": winner[0] if winner else 0,
        "visible_id": winner[1] if winner else -1,
        "behind_gest_id": -1 if hidden is None else hidden,
        "support": support,
        "n_views_voted": len(visible),
        "vote_frac": np.float32(visible.count(winner) / len(visible)) if visible else 0,
        "group_id": tier,
        "class_id": CLASSES.index(klass),
    }


@pytest.mark.parametrize("seed", range(6))
def test_labels_equal_brute_force(seed):
    scene = random_scene(seed, views=1 + 2 * seed)
    xyz = scene.points * np.float32(1 + seed / 3)
    got, expected = label_points(xyz, scene), brute_force(xyz, scene)
    for name in expected[0]:
        assert getattr(got, name).tolist() == [point[name] for point in expected], name
    assert got.keep.any()


def test_every_branch_of_the_vote_is_reached_by_the_brute_force_scenes():
    seen = [p for seed in range(6) for p in brute_force(random_scene(seed).points, random_scene(seed))]
    assert {p["visible_src"] for p in seen} == {0, 1, 2}
    assert any(p["behind_gest_id"] == -1 and p["keep"] for p in seen)
    assert any(p["support"] and not p["keep"] for p in seen)
    assert any(0 < p["vote_frac"] < 1 for p in seen)


def test_label_points_keeps_dtypes_and_all_points():
    scene = random_scene(0)
    points = label_points(scene.points.astype(np.float64), scene)
    dtypes = {name: str(getattr(points, name).dtype) for name in LabelledPoints.POINT_ARRAYS}
    assert dtypes == {
        "xyz": "float32", "source": "uint8", "keep": "bool", "visible_src": "uint8", "visible_id": "int16",
        "behind_gest_id": "int16", "support": "uint8", "n_views_voted": "uint8", "vote_frac": "float32",
        "group_id": "int8", "class_id": "uint8",
    }  # fmt: skip
    assert len(points) == len(scene.points)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_points_that_are_not_finite_or_huge_get_no_label_and_do_not_spread(bad):
    scene = random_scene(1)
    xyz = scene.points.copy()
    xyz[::2] = bad
    points = label_points(xyz, scene)
    assert not points.keep[::2].any()
    clean = label_points(scene.points, scene)
    assert np.array_equal(points.visible_id[1::2], clean.visible_id[1::2])


def test_no_points_gives_empty_arrays():
    assert len(label_points(np.zeros((0, 3), np.float32), random_scene(0))) == 0
    with pytest.raises(ValueError, match="xyz must be"):
        label_points(np.zeros((4, 2), np.float32), random_scene(0))


def test_labels_of_a_point_do_not_depend_on_the_other_points():
    scene = random_scene(2)
    whole, part = label_points(scene.points, scene), label_points(scene.points[100:150], scene)
    for name in LabelledPoints.POINT_ARRAYS:
        assert np.array_equal(getattr(whole, name)[100:150], getattr(part, name))


def test_fuse_views_gives_colmap_then_depth_survivors_with_the_scene_attached():
    scene = random_scene(3)
    points = fuse_views(scene, depth_points_per_view=50, seed=1)
    assert points.keep.all() and len(points) > 0
    assert (np.diff(points.source.astype(int)) >= 0).all() and set(points.source) == {0, 1}
    assert points.order_id == scene.order_id and np.array_equal(points.edges, scene.edges)
    colmap = label_points(scene.points, scene)
    assert np.array_equal(points.xyz[points.source == 0], scene.points[colmap.keep])


def test_fuse_views_draws_by_seed_scene_and_view_alone():
    scene = random_scene(4)
    first, again = fuse_views(scene, 40, seed=7), fuse_views(scene, 40, seed=7)
    assert np.array_equal(first.xyz, again.xyz)
    assert not np.array_equal(first.xyz, fuse_views(scene, 40, seed=8).xyz)
    # Without its second view, the depth points of the others stay the same.
    fewer = random_scene(4)
    fewer = type(fewer)(**{**vars(fewer), "views": (fewer.views[0], *fewer.views[2:])})
    wanted = {p.tobytes() for p in fuse_views(fewer, 40, seed=7).xyz}
    assert len(wanted & {p.tobytes() for p in first.xyz}) > 0.5 * len(wanted)


def test_depth_clip_is_numpys_percentile_to_the_last_bit():
    from wireframe.depth import clip_limit

    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 199, 200, 201, 1000, 4321):
        depth = rng.integers(0, 60000, size=n).astype(np.uint16)
        positive = depth[depth > 0].astype(np.float64)
        expected = np.percentile(positive, 99.5) if len(positive) else 0.0
        assert clip_limit(depth.reshape(1, -1)) == expected
    assert clip_limit(np.zeros((3, 4), np.uint16)) == 0.0


def test_house_mask_is_a_box_dilation():
    from wireframe.depth import house_mask

    gestalt = random_scene(5).views[0].gestalt
    valid = ~np.isin(gestalt, [GESTALT_NAMES.index(name) for name in OUTSIDE_THE_HOUSE])
    for radius in (0, 1, 2, 5, 50):
        expected = np.zeros_like(valid)
        for y, x in zip(*np.nonzero(valid)):
            expected[max(y - radius, 0) : y + radius + 1, max(x - radius, 0) : x + radius + 1] = True
        assert np.array_equal(house_mask(gestalt, radius), expected)


@pytest.mark.parametrize("factor", [1, 2])
def test_depth_points_project_back_to_their_pixels(factor):
    from wireframe.depth import clip_limit, depth_points, house_mask

    view = random_scene(0).views[0]
    depth = np.kron(view.depth, np.ones((factor, factor), np.uint16))
    view = type(view)(**{**vars(view), "depth": depth})
    mask, limit = house_mask(view.gestalt), clip_limit(view.depth)
    world = depth_points(view, mask, limit, 30, seed=0, scene=hashing.scene_key("x")).astype(np.float64)
    assert 0 < len(world) <= 30
    camera = world @ view.R.T.astype(np.float64) + view.t
    u = (view.K[0, 0] * camera[:, 0] / camera[:, 2] + view.K[0, 2]) * factor
    v = (view.K[1, 1] * camera[:, 1] / camera[:, 2] + view.K[1, 2]) * factor
    column, row = np.rint(u).astype(int), np.rint(v).astype(int)
    assert np.abs(u - column).max() < 1e-3 and np.abs(v - row).max() < 1e-3
    limit = np.percentile(depth[depth > 0], 99.5)
    assert np.allclose(camera[:, 2] * 1000, np.minimum(depth[row, column], limit), atol=0.05)
    assert math.isclose(len(np.unique(row * depth.shape[1] + column)), len(world))


def test_a_depth_map_of_another_size_still_gives_points():
    scene = random_scene(0)
    small = tuple(
        view if view.depth is None else type(view)(**{**vars(view), "depth": view.depth[::3, ::2].copy()})
        for view in scene.views
    )
    points = fuse_views(type(scene)(**{**vars(scene), "views": small}), 50)
    assert (points.source == 1).any()
