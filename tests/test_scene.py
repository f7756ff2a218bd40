"""Raw rows become scenes of usable views; what cannot be used is named."""

import io

import numpy as np
import pytest
from PIL import Image
from raw_data import HEIGHT, WIDTH, assert_same_scene, label_maps, png, raw_row

from wireframe import images
from wireframe.classes import UNKNOWN, ids_to_colors
from wireframe.errors import SceneError
from wireframe.scene import read_scene


def test_a_good_row_is_read_whole():
    scene = read_scene(raw_row(3))
    assert scene.order_id == "house1" and scene.dropped == ()
    assert [view.image_id for view in scene.views] == ["img_0", "img_1", "img_2"]
    for index, view in enumerate(scene.views):
        ade, gestalt, _, _ = label_maps(index)
        np.testing.assert_array_equal(view.ade, ade)
        np.testing.assert_array_equal(view.gestalt, gestalt)
        assert view.index == index and view.ade.dtype == view.gestalt.dtype == np.uint8
        assert view.K.shape == view.R.shape == (3, 3) and view.t.shape == (3,)
        assert view.K.dtype == view.R.dtype == view.t.dtype == np.float32
        np.testing.assert_array_equal(view.t, np.float32([0.1, 0.2, 5 + index]))
        assert view.depth.dtype == np.uint16 and (view.depth == 1000 + index).all()
    assert scene.points.shape == (3, 3) and scene.points.dtype == np.float32
    assert scene.vertices.shape == (3, 3) and scene.vertices.dtype == np.float32
    assert scene.edges.tolist() == [[0, 1], [1, 2]] and scene.edges.dtype == np.int64
    assert scene.edge_classes.tolist() == [2, 6] and scene.edge_classes.dtype == np.int64


def _encoded(image):
    return {"bytes": png(image), "path": None}


@pytest.mark.parametrize("form", [np.asarray, png, _encoded, lambda image: bytearray(png(image)),
                                  lambda image: Image.open(io.BytesIO(png(image)))])
def test_every_form_of_image_gives_the_same_scene(form):
    row = raw_row(2)
    other = {**row, **{name: [form(image) for image in row[name]] for name in ("ade", "gestalt", "depth")}}
    assert_same_scene(read_scene(row), read_scene(other))


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_other_colour_modes_of_pil_give_the_same_labels(mode):
    row = raw_row(1)
    image = ids_to_colors(np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 28, "gestalt")
    row["gestalt"] = [Image.fromarray(image)]
    converted = Image.fromarray(image).quantize(64, dither=Image.Dither.NONE) if mode == "P" else \
        Image.fromarray(image).convert(mode)
    assert_same_scene(read_scene(row), read_scene({**row, "gestalt": [converted]}))


def test_cameras_as_arrays_and_flat_translations_are_taken():
    row = raw_row(2)
    arrays = {name: np.asarray(row[name], dtype=np.float32) for name in ("K", "R")}
    other = {**row, **arrays, "t": [np.float32([0.1, 0.2, 5.0]), [0.1, 0.2, 6.0]]}
    assert_same_scene(read_scene(row), read_scene(other))


def test_a_colour_outside_the_tables_is_unknown():
    row = raw_row(1)
    row["gestalt"] = [np.full((HEIGHT, WIDTH, 3), 77, dtype=np.uint8)]
    assert (read_scene(row).views[0].gestalt == UNKNOWN).all()


def _edit(column, value):
    def change(row):
        row[column][1] = value
    return change


EYE = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]]
BAD_VIEWS = {
    "pose only": _edit("pose_only_in_colmap", True),
    "all zero": lambda row: [_edit(name, np.zeros(shape))(row) for name, shape in
                             (("K", (3, 3)), ("R", (3, 3)), ("t", 3))],
    "K is not finite": _edit("K", [[np.nan, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "t is not finite": _edit("t", [0.0, 1e300, 0.0]),
    "focal": _edit("K", [[-30.0, 0, 16], [0, 31, 12], [0, 0, 1]]),
    "0 0 1": _edit("K", [[30.0, 0, 0], [0, 31, 0], [16, 12, 1]]),
    "not a rotation": _edit("R", [[1.0, 0.1, 0], [0, 1, 0], [0, 0, 1]]),
    "R is not a rotation": _edit("R", [[-1.0, 0, 0], [0, 1, 0], [0, 0, 1]]),
    "R has shape": _edit("R", [1.0, 2.0]),
    "t does not hold numbers": _edit("t", ["a", "b", "c"]),
    "K is missing": _edit("K", None),
    "ade: missing image": _edit("ade", None),
    "gestalt: undecodable": _edit("gestalt", b"\x89PNG\r\n\x1a\nbroken"),
    "ade: undecodable": _edit("ade", png(label_maps(0)[2])[:200]),
    "gestalt: empty": _edit("gestalt", np.zeros((0, 0, 3), dtype=np.uint8)),
    "gestalt: label map": _edit("gestalt", np.zeros((4, 4, 3))),
    "one size": _edit("gestalt", np.zeros((HEIGHT, WIDTH // 2, 3), dtype=np.uint8)),
    "expected an image": _edit("ade", 7),
}


@pytest.mark.parametrize("reason", BAD_VIEWS)
def test_a_bad_view_is_dropped_with_its_reason_and_the_others_stay(reason):
    row = raw_row(3)
    BAD_VIEWS[reason](row)
    scene = read_scene(row)
    assert [view.index for view in scene.views] == [0, 2]
    (dropped,) = scene.dropped
    assert (dropped.image_id, dropped.index) == ("img_1", 1)
    assert reason in dropped.reason and "\n" not in dropped.reason


def test_a_truncated_image_is_refused_whatever_another_package_has_told_pil(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    row = raw_row(2)
    row["ade"][1] = png(label_maps(0)[2])[:200]
    assert [view.index for view in read_scene(row).dropped] == [1]


@pytest.mark.parametrize("value, hidden", [
    *((value, True) for value in (True, np.bool_(True), 1, 1.0, " True ", "1", "1.0", b"1")),
    *((value, False) for value in (False, np.bool_(False), 0, 0.0, "False", "0", b"0", "", None, [1])),
])
def test_a_pose_only_flag_reads_the_same_everywhere(value, hidden):
    from wireframe.raw_rows import _entries
    from wireframe.rivals import _has_camera

    row = raw_row(2)
    row["pose_only_in_colmap"] = [False, value]
    assert bool(read_scene(row).dropped) is hidden
    assert _entries("pose_only_in_colmap", row["pose_only_in_colmap"], row["image_ids"]) == [False, hidden]
    assert _has_camera(row, 1) is not hidden


def test_more_views_than_the_vote_can_take_are_refused():
    with pytest.raises(SceneError, match="257 views, above the cap of 256"):
        read_scene({"order_id": "house1", "image_ids": ["a"] * 257})


def test_slightly_rounded_rotations_are_kept():
    row = raw_row(2)
    row["R"] = np.round(row["R"], 4)
    assert len(read_scene(row).views) == 2


def test_lists_of_different_lengths_keep_the_views_that_all_have():
    row = raw_row(5)
    row["gestalt"], row["t"], row["depth"] = row["gestalt"][:3], row["t"][:4], row["depth"][:1]
    scene = read_scene(row)
    assert [view.index for view in scene.views] == [0, 1, 2]
    assert [view.depth is None for view in scene.views] == [False, True, True]
    assert {view.index: view.reason for view in scene.dropped} == {3: "gestalt: missing image", 4: "t is missing"}


def test_no_usable_view_names_the_scene_and_the_reasons():
    row = raw_row(2)
    row["pose_only_in_colmap"] = [True, True]
    with pytest.raises(SceneError, match=r"'house1'.*img_0.*pose only.*img_1"):
        read_scene(row)
    with pytest.raises(SceneError, match=r"'house1'.*no views"):
        read_scene({"order_id": "house1"})
    with pytest.raises(ValueError):
        read_scene({"order_id": "house1"})


@pytest.mark.parametrize("depth, expected", [
    (np.array([[np.nan, np.inf, -np.inf, -5.0], [0.4, 1.5, 2.5, 1e9]]), [[0, 0, 0, 0], [0, 2, 2, 65535]]),
    (np.array([[-7, 0, 70000, 12]], dtype=np.int64), [[0, 0, 65535, 12]]),
    (np.array([[1, 255]], dtype=np.uint8), [[1, 255]]),
    (np.array([[2**63, 5]], dtype=np.uint64), [[65535, 5]]),
    (np.array([[[3], [4]]], dtype=np.float32), [[3, 4]]),
    (Image.fromarray(np.array([[1.6, -1.0]], dtype=np.float32)), [[2, 0]]),
    (Image.fromarray(np.array([[70000, 9]], dtype=np.int32)), [[65535, 9]]),
    (Image.fromarray(np.array([[60000, 9]], dtype=np.uint16)), [[60000, 9]]),
    (None, None), (np.zeros((2, 2)), None), (np.full((2, 2), np.nan), None), (np.zeros((0, 3)), None),
    (np.zeros((2, 2, 3), dtype=np.uint8), None), (np.array([[object()]]), None), (b"nonsense", None),
    (Image.new("RGB", (4, 4)), None), ("text", None), ({"bytes": None, "path": "x.png"}, None),
])
def test_depth_becomes_whole_millimetres_or_none(depth, expected):
    row = raw_row(1)
    row["depth"] = [depth]
    read = read_scene(row).views[0].depth
    if expected is None:
        assert read is None
    else:
        assert read.dtype == np.uint16
        np.testing.assert_array_equal(read, expected)


def test_pixel_cap_holds_for_encoded_images_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    row = raw_row(1)
    for form in (np.asarray, png):
        with pytest.raises(SceneError, match="above the cap"):
            read_scene({**row, "ade": [form(row["ade"][0])]})


def test_other_column_names_are_taken():
    row = raw_row(1)
    row["colmap_binary"], row["__key__"] = row.pop("colmap"), row.pop("order_id")
    assert_same_scene(read_scene(row), read_scene(raw_row(1)))


@pytest.mark.parametrize("value", [None, "", 5, "two\nlines", "\ud800"])
def test_a_row_without_a_usable_order_id_is_refused(value):
    with pytest.raises(SceneError, match="order_id") as caught:
        read_scene({**raw_row(1), "order_id": value})
    assert "\n" not in str(caught.value)


def test_columns_without_colmap_or_ground_truth_are_empty():
    row = raw_row(1)
    for name in ("colmap", "wf_vertices", "wf_edges", "wf_classifications"):
        row[name] = None
    scene = read_scene(row)
    assert scene.points.shape == (0, 3) and scene.vertices.shape == (0, 3)
    assert scene.edges.shape == (0, 2) and scene.edge_classes.shape == (0,)
    row = raw_row(1)
    del row["wf_classifications"]
    assert read_scene(row).edge_classes.tolist() == [-1, -1]


@pytest.mark.parametrize("column, value, message", [
    ("colmap", b"junk", "COLMAP"), ("colmap", 7, "column colmap"),
    ("wf_vertices", [[0, 0, np.nan], [1, 0, 0], [1, 1, 0]], "wf_vertices is not finite"),
    ("wf_vertices", [[0, 0], [1, 0]], "wf_vertices has shape"),
    ("wf_vertices", None, "names vertex 2, but wf_vertices has 0"),
    ("wf_edges", [[0, 3]], "names vertex 3"), ("wf_edges", [[0, -1]], "names vertex -1"),
    ("wf_edges", [[0, 0.5]], "whole numbers"), ("wf_edges", "abc", "wf_edges does not hold numbers"),
    ("wf_classifications", [1], "1 entries for 2 edges"), ("ade", 5, "column ade"), ("K", "no", "column K"),
])
def test_a_broken_column_names_the_scene_and_itself(column, value, message):
    with pytest.raises(SceneError, match=rf"'house1'.*{message}"):
        read_scene({**raw_row(1), column: value})


def test_a_datasets_style_table_of_images_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    row = raw_row(3)
    features = datasets.Features({
        "order_id": datasets.Value("string"), "image_ids": datasets.List(datasets.Value("string")),
        **{name: datasets.List(datasets.Image()) for name in ("ade", "gestalt", "depth")},
        **{name: datasets.List(datasets.List(datasets.List(datasets.Value("float32")))) for name in ("K", "R", "t")},
        "pose_only_in_colmap": datasets.List(datasets.Value("bool")),
        "wf_vertices": datasets.List(datasets.List(datasets.Value("float32"))),
        "wf_edges": datasets.List(datasets.List(datasets.Value("int64"))),
        "wf_classifications": datasets.List(datasets.Value("int64")), "colmap": datasets.Value("binary"),
    })
    table = datasets.Dataset.from_list([row], features=features)
    assert_same_scene(read_scene(table[0]), read_scene(row))
