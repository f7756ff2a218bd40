"""Damaged rows through the whole chain: whatever the reader lets in ends in a finite wireframe or a clear error."""

import functools
import warnings

import numpy as np
import pytest
from raw_data import HEIGHT, WIDTH, colmap_zip, label_maps, png, raw_row

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batches import TINY, randomise
from wireframe import Perceiver
from wireframe.errors import WireframeError
from wireframe.fusion import fuse_views
from wireframe.graph import Wireframe
from wireframe.predict import predict_segments, predict_wireframe, wireframe_of
from wireframe.samples import read_sample, write_sample
from wireframe.sampling import sample_points
from wireframe.scene import read_scene

POINTS = 32


@functools.cache
def tiny_model() -> Perceiver:
    model = Perceiver({**TINY, "num_points": POINTS}).eval()
    randomise(model)
    return model


@functools.cache
def good_row() -> dict:
    row = raw_row(3)
    return {**row, **{name: [png(image) for image in row[name]] for name in ("ade", "gestalt", "depth")}}


NUMBERS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 1e-6, 1e-38, 1e-45, 1e15, -1e15, 1e30, 3e38, -3e38, 1e39]),
                    st.floats(-100, 100))
ROTATIONS = [np.eye(3), np.diag([1.0, -1.0, -1.0]), np.eye(3)[[2, 0, 1]], np.eye(3) + 4e-4]


def three(draw, strategy, count: int = 3) -> list:
    return [draw(strategy) for _ in range(count)]


def changed(draw, column: str):
    """A value of a column that the reader may well accept, and that no camera or tool would give."""
    if column == "K":
        return three(draw, st.builds(lambda fx, fy, skew, cx, cy: [[fx, skew, cx], [0, fy, cy], [0, 0, 1]],
                                     *[NUMBERS.map(abs)] * 2, *[NUMBERS] * 3))
    if column == "R":
        return three(draw, st.sampled_from(ROTATIONS))
    if column == "t":
        return three(draw, st.lists(NUMBERS, min_size=3, max_size=3))
    if column == "colmap":
        points = draw(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), max_size=40))
        return colmap_zip("".join(f"{i} {x} {y} {z} 0 0 0 1\n" for i, (x, y, z) in enumerate(points)))
    if column == "wf_vertices":
        return three(draw, st.lists(NUMBERS, min_size=3, max_size=3))
    if column == "wf_edges":
        return draw(st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), min_size=2, max_size=2))
    if column == "depth":
        sizes = st.tuples(*[st.sampled_from([1, 2, HEIGHT, WIDTH, 90])] * 2)
        fills = st.sampled_from([0, 1, 300, 65535])
        return three(draw, st.none() | st.builds(lambda size, fill: np.full(size, fill, np.uint16), sizes, fills))
    return three(draw, st.sampled_from([label_maps(7)[2], label_maps(8)[3], np.zeros((HEIGHT, WIDTH, 3), np.uint8),
                                        np.full((1, 1, 3), 120, np.uint8), np.zeros((1, 900, 3), np.uint8)]))


def damaged_row(draw) -> dict:
    names = ("K", "R", "t", "colmap", "wf_vertices", "wf_edges", "depth", "ade", "gestalt")
    row = dict(good_row())
    for column in draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True)):
        row[column] = changed(draw, column)
    if draw(st.booleans()):
        # Label maps of one odd size are accepted, of two they are not.
        row["gestalt"] = row["ade"] = changed(draw, "ade")
    return row


def assert_sound(found: Wireframe) -> None:
    assert found.vertices.dtype == np.float32 and found.vertices.ndim == 2 and found.vertices.shape[1] == 3
    assert np.isfinite(found.vertices).all()
    assert found.edges.dtype == np.int64 and found.edges.shape[1:] == (2,) and len(found.edges)
    assert 0 <= found.edges.min() <= found.edges.max() < len(found.vertices)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_accepted_rows_end_in_a_finite_wireframe_or_an_error(data):
    row = damaged_row(data.draw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            scene = read_scene(row)
        except WireframeError:
            return
        assert_sound(predict_wireframe(row, tiny_model(), threshold=0.0))
        written = write_sample(sample_points(fuse_views(scene), POINTS))
        try:
            sample = read_sample(written)
        except WireframeError as problem:
            assert str(problem).isprintable()
            return
        assert_sound(wireframe_of(predict_segments(sample, tiny_model()), sample, threshold=0.0))
