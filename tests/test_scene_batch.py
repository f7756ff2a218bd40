"""Batches of scenes: what does not fit together is refused where it is made."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_cases import assert_same, run_ops
from scenes import random_scene
from wireframe.scene_batch import SceneBatch

pytestmark = pytest.mark.native

QUICK = settings(max_examples=40, deadline=None)


VIEWS = st.lists(st.integers(-(2**62), 2**62) | st.integers(-3, 40), min_size=8, max_size=8)


def test_maps_that_overlap_are_refused():
    batch = SceneBatch.from_scenes([random_scene(1, views=2)])
    table = batch.views.clone()
    table[1, 4] -= 1
    with pytest.raises(ValueError, match="label maps in views do not follow"):
        dataclasses.replace(batch, views=table)


@QUICK
@given(VIEWS, st.integers(0, 2))
def test_a_wild_view_table_is_refused_by_the_batch(row, which):
    batch = SceneBatch.from_scenes([random_scene(1, views=3)])
    table = batch.views.clone()
    table[which] = torch.tensor(row)
    try:
        wild = dataclasses.replace(batch, views=table)
    except ValueError as problem:
        assert "views" in str(problem)
    else:
        assert_same(run_ops(wild, "native", threads=4), run_ops(wild, "reference"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ade", torch.zeros(3, dtype=torch.uint8), "gestalt must have 3 entries"),
        ("K", torch.zeros(1, 3, 3), "K must have 3 entries"),
        ("R", torch.zeros(3, 9), r"R must be float32 \[V, 3, 3\]"),
        ("t", torch.zeros(3, 3, dtype=torch.float64), "t must be float32"),
        ("points", np.zeros((4, 3), np.float32), "points must be a tensor"),
        ("points_of", (0, 3), "point_offsets must not decrease"),
        ("point_offsets", torch.tensor([0, 1, 2]), "point_offsets must have 2 entries"),
        ("view_offsets", torch.tensor([1, 3]), "view_offsets must not decrease"),
        ("keys", torch.zeros(2, dtype=torch.int64), "view_offsets must have 3 entries"),
        ("depth", torch.zeros(5, dtype=torch.uint16), "row 0 of views lies outside"),
    ],
)
def test_a_batch_that_does_not_fit_together_is_refused(name, value, message):
    batch = SceneBatch.from_scenes([random_scene(1, views=3)])
    with pytest.raises((ValueError, TypeError), match=message):
        dataclasses.replace(batch, **{name: value})
