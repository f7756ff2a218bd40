"""View fusion: every point is projected into every view and gets the label most views agree on.

Source of the rules: the S23DR 2026 learned baseline, section 2 of the facts in the README's references. The arithmetic
is float64 and elementwise, in the order written; only + - x / and rint, so that a native version gives the same bits.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from wireframe import hashing
from wireframe.classes import (
    ADE_ENVELOPE,
    ADE_ID,
    ADE_OCCLUDERS,
    GESTALT_ID,
    POINT_CLASSES,
    TIER_3_ADE,
    TIER_GESTALT,
    UNKNOWN,
)
from wireframe.depth import IN_HOUSE, depth_points
from wireframe.scene import Scene, View

SOURCE_COLMAP, SOURCE_DEPTH = 0, 1
NO_LABEL, GESTALT_LABEL, ADE_LABEL = 0, 1, 2

# A visible vote as one integer that sorts by (source, id): gestalt ids below this offset, ADE ids above it.
_ADE_OFFSET = 256
_NO_VOTE = -1
_KEYS = 1024


@dataclasses.dataclass(frozen=True)
class LabelledPoints:
    """Points with their fused labels; ``order_id`` and the ground truth travel with them.

    Attributes:
        xyz: float32 [P, 3] world metres.
        source: uint8 [P], 0 COLMAP, 1 depth.
        keep: bool [P], survives fusion (support >= 1 and at least one visible vote).
        visible_src: uint8 [P], 0 none, 1 gestalt, 2 ADE.
        visible_id: int16 [P], class id in that table, -1 none.
        behind_gest_id: int16 [P], gestalt id behind occluders, -1 none.
        support: uint8 [P], views in which the point lies in the house.
        n_views_voted: uint8 [P], visible votes.
        vote_frac: float32 [P], share of the visible votes that agree with the winner, 0 without votes.
        group_id: int8 [P], priority tier 0-4, -1 excluded.
        class_id: uint8 [P], index into ``classes.POINT_CLASSES``.
        order_id, vertices [V, 3] float32, edges [E, 2] int64, edge_classes [E] int64: of the scene.
    """

    xyz: np.ndarray
    source: np.ndarray
    keep: np.ndarray
    visible_src: np.ndarray
    visible_id: np.ndarray
    behind_gest_id: np.ndarray
    support: np.ndarray
    n_views_voted: np.ndarray
    vote_frac: np.ndarray
    group_id: np.ndarray
    class_id: np.ndarray
    order_id: str
    vertices: np.ndarray
    edges: np.ndarray
    edge_classes: np.ndarray

    POINT_ARRAYS = (
        "xyz", "source", "keep", "visible_src", "visible_id", "behind_gest_id", "support", "n_views_voted",
        "vote_frac", "group_id", "class_id",
    )

    def __len__(self) -> int:
        return self.xyz.shape[0]

    def select(self, index: np.ndarray) -> LabelledPoints:
        """The points at ``index`` (boolean mask or positions)."""
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in self.POINT_ARRAYS})


def fuse_views(scene: Scene, depth_points_per_view: int = 20000, seed: int = 0) -> LabelledPoints:
    """COLMAP points, then depth points of every view, labelled; survivors only.

    Args:
        scene: a scene as ``read_scene`` gives it.
        depth_points_per_view: depth pixels drawn per view (20,000 at inference, 8,000 for training data).
        seed: with the scene's id and the view's position, the key of the draw.

    Returns:
        LabelledPoints with ``keep`` True everywhere.
    """
    key = hashing.scene_key(scene.order_id)
    clouds = [scene.points]
    clouds += [depth_points(view, depth_points_per_view, seed, key) for view in scene.views if view.depth is not None]
    xyz = np.concatenate(clouds)
    source = np.full(len(xyz), SOURCE_DEPTH, dtype=np.uint8)
    source[: len(scene.points)] = SOURCE_COLMAP
    points = dataclasses.replace(label_points(xyz, scene), source=source)
    return points.select(points.keep)


def label_points(xyz: np.ndarray, scene: Scene) -> LabelledPoints:
    """Fused labels of arbitrary world points.

    Args:
        xyz: float32 [P, 3] world metres.
        scene: the scene whose views vote.

    Returns:
        LabelledPoints of all P points (source 0); where ``keep`` is False the arrays hold what the votes gave.

    Raises:
        ValueError: ``xyz`` is not [P, 3].
    """
    xyz = np.ascontiguousarray(xyz, dtype=np.float32)
    if xyz.ndim != 2 or xyz.shape[1] != 3:
        raise ValueError(f"xyz must be [P, 3], got {list(xyz.shape)}")
    n = xyz.shape[0]
    world = xyz.T.astype(np.float64)
    visible = np.full((len(scene.views), n), _NO_VOTE, dtype=np.int16)
    behind = np.full((len(scene.views), n), _NO_VOTE, dtype=np.int16)
    support = np.zeros(n, dtype=np.int64)
    for row, view in enumerate(scene.views):
        support += _vote_of_view(world, view, visible[row], behind[row])
    key, agree = _most_frequent(visible)
    behind_id, _ = _most_frequent(behind)
    voted = (visible != _NO_VOTE).sum(axis=0)
    source = np.where(key < 0, NO_LABEL, np.where(key < _ADE_OFFSET, GESTALT_LABEL, ADE_LABEL)).astype(np.uint8)
    visible_id = np.where(key < _ADE_OFFSET, key, key - _ADE_OFFSET).astype(np.int16)
    group_id, class_id = _tiers(source, visible_id, behind_id)
    return LabelledPoints(
        xyz=xyz,
        source=np.zeros(n, dtype=np.uint8),
        keep=(support >= 1) & (voted >= 1),
        visible_src=source,
        visible_id=visible_id,
        behind_gest_id=behind_id.astype(np.int16),
        support=np.minimum(support, 255).astype(np.uint8),
        n_views_voted=np.minimum(voted, 255).astype(np.uint8),
        vote_frac=(agree / np.maximum(voted, 1)).astype(np.float32),
        group_id=group_id,
        class_id=class_id,
        order_id=scene.order_id,
        vertices=scene.vertices,
        edges=scene.edges,
        edge_classes=scene.edge_classes,
    )


def project(world: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray]:
    """The points that fall into a view, and their pixels.

    Args:
        world: float64 [3, P].
        view: camera = R world + t, z forward; pixel = K camera / z; pixel centres are integers.

    Returns:
        index int64 [n] into the points, flat pixel int64 [n] of the label maps (row-major).
    """
    R, t, K = (array.astype(np.float64) for array in (view.R, view.t, view.K))
    x, y, z = world
    height, width = view.ade.shape
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        c0, c1, c2 = (((R[i, 0] * x + R[i, 1] * y) + R[i, 2] * z) + t[i] for i in range(3))
        u = K[0, 0] * (c0 / c2) + K[0, 2]
        v = K[1, 1] * (c1 / c2) + K[1, 2]
        inside = (c2 > 1e-6) & (u >= 0) & (u < width) & (v >= 0) & (v < height)
    index = np.flatnonzero(inside)
    # u just below the width rounds up to it: clamp.
    column = np.minimum(np.rint(u[index]), width - 1).astype(np.int64)
    row = np.minimum(np.rint(v[index]), height - 1).astype(np.int64)
    return index, row * width + column


def _vote_of_view(world: np.ndarray, view: View, visible: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """Writes one view's votes; returns bool [P], the points that lie in the house."""
    index, pixel = project(world, view)
    gestalt = view.gestalt.ravel()[pixel]
    in_house = IN_HOUSE[gestalt]
    index, gestalt = index[in_house], gestalt[in_house]
    ade = view.ade.ravel()[pixel[in_house]]
    # An unknown gestalt colour has no id: it supports the point but cannot name it.
    gestalt_vote = np.where(gestalt == UNKNOWN, _NO_VOTE, gestalt.astype(np.int16))
    behind[index] = gestalt_vote
    visible[index] = np.where(_IS_ENVELOPE[ade], gestalt_vote, _OCCLUDER_VOTE[ade])
    support = np.zeros(world.shape[1], dtype=bool)
    support[index] = True
    return support


def _most_frequent(votes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most frequent vote of each column (ties to the smallest), and how many agree.

    Args:
        votes: int16 [V, P], -1 = no vote.

    Returns:
        winner int64 [P] (-1 = none), count int64 [P].
    """
    views, n = votes.shape
    best = np.full(n, _NO_VOTE, dtype=np.int32)
    for i in range(views):
        count = np.zeros(n, dtype=np.int32)
        for j in range(views):
            count += votes[j] == votes[i]
        # One integer that grows with the count and, at equal counts, with the smallness of the vote.
        rank = count * _KEYS + (_KEYS - 1 - votes[i])
        np.maximum(best, np.where(votes[i] == _NO_VOTE, _NO_VOTE, rank), out=best)
    voted = best >= 0
    winner = np.where(voted, _KEYS - 1 - best % _KEYS, _NO_VOTE)
    return winner, np.where(voted, best // _KEYS, 0)


def _tiers(source: np.ndarray, visible_id: np.ndarray, behind_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """group_id int8 [P] and class_id uint8 [P] from the fused labels (step 5 of the baseline's fusion)."""
    visible_gestalt = np.where(source == GESTALT_LABEL, visible_id, _NO_VOTE)
    effective = np.where(visible_gestalt >= 0, visible_gestalt, behind_id)
    group = _GESTALT_TIER[effective]
    klass = _GESTALT_CLASS[effective]
    nameless = effective < 0
    # With today's tables neither of the two rules below applies to any point: every ADE class of tier 3 is an envelope
    # class, which votes by its gestalt id, and `unclassified` pixels lie outside the house. They are the baseline's.
    house_by_ade = nameless & (source == ADE_LABEL) & _IS_TIER_3_ADE[visible_id]
    group[house_by_ade] = 3
    klass[house_by_ade] = POINT_CLASSES.index("other_house_part")
    unclassified = GESTALT_ID["unclassified"]
    group[(visible_gestalt == unclassified) | (behind_id == unclassified)] = -1
    return group, klass


def _ade_table(names: tuple[str, ...]) -> np.ndarray:
    table = np.zeros(256, dtype=bool)
    table[[ADE_ID[name] for name in names]] = True
    return table


def _occluder_votes() -> np.ndarray:
    votes = np.full(256, _NO_VOTE, dtype=np.int16)
    ids = np.array([ADE_ID[name] for name in ADE_OCCLUDERS])
    votes[ids] = _ADE_OFFSET + ids
    return votes


def _gestalt_tables() -> tuple[np.ndarray, np.ndarray]:
    """Tier and class by gestalt id; the last entry, reached by id -1, is that of a point without a gestalt id."""
    tier = np.full(len(GESTALT_ID) + 1, 4, dtype=np.int8)
    klass = np.full(len(GESTALT_ID) + 1, POINT_CLASSES.index("other"), dtype=np.uint8)
    for level, names in enumerate(TIER_GESTALT):
        for name in names:
            tier[GESTALT_ID[name]] = level
            klass[GESTALT_ID[name]] = POINT_CLASSES.index(name if level < 3 else "other_house_part")
    return tier, klass


_IS_ENVELOPE = _ade_table(ADE_ENVELOPE)
_IS_TIER_3_ADE = _ade_table(TIER_3_ADE)
_OCCLUDER_VOTE = _occluder_votes()
_GESTALT_TIER, _GESTALT_CLASS = _gestalt_tables()
