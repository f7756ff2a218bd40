"""The contact sheet: it shows both wireframes and the points, in their place, whatever the scene holds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from wireframe.errors import ScoreError
from wireframe.graph import Wireframe, empty_wireframe
from wireframe.plots import SheetItem, contact_sheet
from wireframe.scoring import Score

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

TRUTH, PREDICTED, APEX = (0xA9, 0xBD, 0xD6), (0xE4, 0x57, 0x2E), (0xE6, 0x39, 0x46)
HOUSE = Wireframe(
    np.float32([[0, 3, 0], [8, 3, 0], [8, 3, 6], [0, 3, 6], [0, 5, 3], [8, 5, 3]]),
    np.array([[0, 1], [2, 3], [4, 5], [0, 4], [3, 4], [1, 5], [2, 5]]),
)
NOTHING = Wireframe(np.zeros((0, 3)), np.zeros((0, 2)))


def scene(**changes) -> SheetItem:
    corners = np.repeat(HOUSE.vertices[4:], 20, axis=0)
    item = SheetItem("scene-1", corners, np.zeros(40, np.uint8), HOUSE, HOUSE, Score(1.0, 1.0, 1.0))
    return dataclasses.replace(item, **changes)


def sheet(items, path, **options) -> np.ndarray:
    contact_sheet(items, path, **options)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def count(pixels: np.ndarray, color: tuple[int, int, int]) -> int:
    return int((np.abs(pixels.astype(int) - color) <= 2).all(axis=-1).sum())


def test_points_truth_and_prediction_are_drawn(tmp_path):
    whole = sheet([scene()], tmp_path / "a.png")
    no_prediction = sheet([scene(predicted=NOTHING)], tmp_path / "b.png")
    no_points = sheet([scene(points=np.zeros((0, 3)), class_id=np.zeros(0, np.uint8))], tmp_path / "c.png")
    assert count(whole, PREDICTED) > count(no_prediction, PREDICTED) + 500
    assert count(no_prediction, TRUTH) > count(whole, TRUTH) + 500
    assert count(whole, APEX) > count(no_points, APEX) + 50


def test_the_sheet_has_a_card_per_scene_and_the_same_bytes_every_time(tmp_path):
    one = sheet([scene()], tmp_path / "one.png")
    three = sheet([scene()] * 3, tmp_path / "three.png")
    assert three.shape[1] > 1.9 * one.shape[1] and three.shape[0] > 1.5 * one.shape[0]
    row = sheet([scene()] * 3, tmp_path / "row.png", columns=3)
    assert row.shape[0] == one.shape[0]
    contact_sheet([scene()], tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_up_in_the_world_is_up_in_the_picture(tmp_path):
    above = HOUSE.vertices[4:] + np.float32([0, 0.2, 0])
    pixels = sheet([scene(points=above, class_id=np.array([0, 0]))], tmp_path / "a.png")
    half = pixels[: int(0.8 * len(pixels)), : pixels.shape[1] // 2]
    ridge = np.argwhere((np.abs(half.astype(int) - APEX) <= 2).all(axis=-1))[:, 0].mean()
    truth = pixels[: int(0.8 * len(pixels)), pixels.shape[1] // 2 :]
    roof = np.argwhere((np.abs(truth.astype(int) - PREDICTED) <= 2).all(axis=-1))[:, 0]
    assert ridge < np.median(roof)


def test_a_prediction_that_reaches_far_out_stays_in_its_panel(tmp_path):
    # Up and to both sides, two panels wide.
    ends = np.float32([[4, 4, 3], [30, 30, 3], [-25, 4, 3], [4, -20, 3]])
    far = Wireframe(ends, np.array([[0, 1], [0, 2], [0, 3]]))
    base = sheet([scene(predicted=NOTHING)] * 2, tmp_path / "a.png")
    pixels = sheet([scene(predicted=far), scene(predicted=NOTHING)], tmp_path / "b.png")
    rows, columns = np.nonzero((pixels != base).any(axis=-1))
    assert len(columns) > 50
    quarter = pixels.shape[1] / 4
    assert columns.min() > 0.98 * quarter and columns.max() < 2.02 * quarter
    assert rows.max() < 0.82 * pixels.shape[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"predicted": empty_wireframe()},
        {"predicted": Wireframe(HOUSE.vertices * np.float32(np.nan), HOUSE.edges)},
        {"predicted": Wireframe(HOUSE.vertices, HOUSE.edges + 3)},
        {"truth": NOTHING},
        {"truth": NOTHING, "points": np.zeros((0, 3)), "class_id": np.zeros(0)},
        {"truth": NOTHING, "points": np.full((40, 3), np.nan)},
        {"truth": empty_wireframe(), "score": None},
    ],
    ids=["empty solution", "NaN", "bad ids", "no truth", "nothing at all", "NaN points", "flat truth"],
)
def test_odd_scenes_are_drawn_too(tmp_path, changes):
    assert sheet([scene(**changes)], tmp_path / "a.png").size


@pytest.mark.parametrize("order_id", ["$\\frac{$", "x" * 5000, "<b>&", "a\\b_{c}^d"])
def test_any_id_is_a_title(tmp_path, order_id):
    named = sheet([scene(order_id=order_id)], tmp_path / "a.png")
    unnamed = sheet([scene(order_id="")], tmp_path / "b.png")
    # The scores to the right of it stay free.
    rows, columns = np.nonzero((named != unnamed).any(axis=-1))
    assert len(rows) and columns.max() < 0.66 * named.shape[1]


def test_nothing_to_draw_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ScoreError, match="at least one scene"):
        contact_sheet([], tmp_path / "a.png")
    with pytest.raises(ScoreError):
        contact_sheet([scene()], tmp_path / "a.png", columns=0)
    assert not list(tmp_path.iterdir())
