"""The vote of the views, in NumPy: the readable reference of ``wireframe.kernels.ops.vote_labels`` and ``point_tiers``.

Source of the rules: the S23DR 2026 learned baseline (model card and REPRODUCE.md). The arithmetic is float64 and
elementwise, in the order written; only + - x / and rint, so that a native version gives the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

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
from wireframe.depth import IN_HOUSE
from wireframe.scene import View

NO_LABEL, GESTALT_LABEL, ADE_LABEL = 0, 1, 2

# A visible vote as one integer that sorts by (source, id): gestalt ids below this offset, ADE ids above it.
_ADE_OFFSET = 256
_NO_VOTE = -1
_KEYS = 1024
_ENVELOPE, _OCCLUDER = 1, 2

# Pixels of a side of the cells in which the nearest point hides the others (the optional visibility test).
ZBUFFER_CELL = 8


class Votes(NamedTuple):
    """What the views say of P points.

    Attributes:
        visible_src: uint8 [P], 0 none, 1 gestalt, 2 ADE; visible_id: int16 [P], id in that table, -1 none.
        behind: int16 [P], gestalt id behind occluders, -1 none.
        support: uint8 [P], views in which the point lies in the house; n_views_voted: uint8 [P], visible votes.
        vote_frac: float32 [P], share of the visible votes that agree with the winner, 0 without votes.
    """

    visible_src: np.ndarray
    visible_id: np.ndarray
    behind: np.ndarray
    support: np.ndarray
    n_views_voted: np.ndarray
    vote_frac: np.ndarray


def vote_labels(xyz: np.ndarray, views: Sequence[View], zbuffer: float | None = None) -> Votes:
    """The label that most views agree on, for each point.

    Args:
        xyz: float32 [P, 3] world metres.
        views: the views that vote.
        zbuffer: None, or the relative tolerance of a visibility test: in each view, the nearest of the points that
            project into a cell of 8 x 8 pixels hides those that lie more than this share farther.
    """
    n = xyz.shape[0]
    world = xyz.T.astype(np.float64)
    visible = np.full((len(views), n), _NO_VOTE, dtype=np.int16)
    behind = np.full((len(views), n), _NO_VOTE, dtype=np.int16)
    support = np.zeros(n, dtype=np.int64)
    for row, view in enumerate(views):
        support += _vote_of_view(world, view, zbuffer, visible[row], behind[row])
    key, agree = _most_frequent(visible)
    behind_id, _ = _most_frequent(behind)
    voted = (visible != _NO_VOTE).sum(axis=0)
    return Votes(
        visible_src=np.where(key < 0, NO_LABEL, np.where(key < _ADE_OFFSET, GESTALT_LABEL, ADE_LABEL)).astype(np.uint8),
        visible_id=np.where(key < _ADE_OFFSET, key, key - _ADE_OFFSET).astype(np.int16),
        behind=behind_id.astype(np.int16),
        support=np.minimum(support, 255).astype(np.uint8),
        n_views_voted=np.minimum(voted, 255).astype(np.uint8),
        vote_frac=(agree / np.maximum(voted, 1)).astype(np.float32),
    )


def point_tiers(visible_src: np.ndarray, visible_id: np.ndarray, behind: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Priority tier and class of labelled points (step 5 of the baseline's fusion).

    Args:
        visible_src: uint8 [P]; visible_id, behind: int16 [P], as ``vote_labels`` gives them.

    Returns:
        group_id int8 [P], 0-4, -1 excluded; class_id uint8 [P], index into ``classes.POINT_CLASSES``.
    """
    visible_gestalt = np.where(visible_src == GESTALT_LABEL, visible_id, _NO_VOTE)
    effective = np.where(visible_gestalt >= 0, visible_gestalt, behind)
    # The tables' last entry is that of a point without a gestalt id.
    entry = np.where(effective >= 0, effective & 255, UNKNOWN)
    group = _TIER[entry].astype(np.int8)
    klass = _CLASS[entry]
    # With today's tables neither of the two rules below applies to any point: every ADE class of tier 3 is an envelope
    # class, which votes by its gestalt id, and `unclassified` pixels lie outside the house. They are the baseline's.
    house_by_ade = (effective < 0) & (visible_src == ADE_LABEL) & (visible_id >= 0)
    house_by_ade &= _IS_TIER_3_ADE[visible_id & 255] != 0
    group[house_by_ade] = 3
    klass[house_by_ade] = POINT_CLASSES.index("other_house_part")
    for label in (visible_gestalt, behind):
        group[(label >= 0) & (_IS_EXCLUDED[label & 255] != 0)] = -1
    return group, klass


def project(world: np.ndarray, view: View) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The points that fall into a view, and their pixels.

    Args:
        world: float64 [3, P].
        view: camera = R world + t, z forward; pixel = K camera / z; pixel centres are integers.

    Returns:
        index int64 [n] into the points; row and column int64 [n] in the label maps; depth float64 [n] along z.
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
    return index, row, column, c2[index]


def _vote_of_view(
    world: np.ndarray, view: View, zbuffer: float | None, visible: np.ndarray, behind: np.ndarray
) -> np.ndarray:
    """Writes one view's votes; returns bool [P], the points that lie in the house."""
    index, row, column, depth = project(world, view)
    if zbuffer is not None:
        cells_across = -(-view.ade.shape[1] // ZBUFFER_CELL)
        cell = (row // ZBUFFER_CELL) * cells_across + column // ZBUFFER_CELL
        nearest = np.full(-(-view.ade.shape[0] // ZBUFFER_CELL) * cells_across, np.inf)
        np.minimum.at(nearest, cell, depth)
        seen = depth <= nearest[cell] * (1.0 + zbuffer)
        index, row, column = index[seen], row[seen], column[seen]
    pixel = row * view.ade.shape[1] + column
    gestalt = view.gestalt.ravel()[pixel]
    in_house = IN_HOUSE[gestalt]
    index, gestalt = index[in_house], gestalt[in_house]
    ade = view.ade.ravel()[pixel[in_house]]
    # A colour outside the table has no id: it supports the point but cannot name it.
    gestalt_vote = np.where(_IS_NAMED[gestalt] != 0, gestalt.astype(np.int16), _NO_VOTE)
    behind[index] = gestalt_vote
    occluder_vote = np.where(_ADE_ROLE[ade] == _OCCLUDER, _ADE_OFFSET + ade.astype(np.int16), _NO_VOTE)
    visible[index] = np.where(_ADE_ROLE[ade] == _ENVELOPE, gestalt_vote, occluder_vote)
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


def _label_tables() -> np.ndarray:
    """uint8 [7, 256]: by gestalt or ADE id, what the vote and the tiers ask of it."""
    tables = np.zeros((7, 256), dtype=np.uint8)
    in_house, named, role, tier, klass, tier_3_ade, excluded = tables
    in_house[:] = IN_HOUSE
    named[: len(GESTALT_ID)] = 1
    role[[ADE_ID[name] for name in ADE_ENVELOPE]] = _ENVELOPE
    role[[ADE_ID[name] for name in ADE_OCCLUDERS]] = _OCCLUDER
    tier[:] = 4
    klass[:] = POINT_CLASSES.index("other")
    for level, names in enumerate(TIER_GESTALT):
        for name in names:
            tier[GESTALT_ID[name]] = level
            klass[GESTALT_ID[name]] = POINT_CLASSES.index(name if level < 3 else "other_house_part")
    tier_3_ade[[ADE_ID[name] for name in TIER_3_ADE]] = 1
    excluded[GESTALT_ID["unclassified"]] = 1
    return tables


# The native versions read this table too (LabelTables in csrc/point_math.h).
LABEL_TABLES = _label_tables()
_, _IS_NAMED, _ADE_ROLE, _TIER, _CLASS, _IS_TIER_3_ADE, _IS_EXCLUDED = LABEL_TABLES
