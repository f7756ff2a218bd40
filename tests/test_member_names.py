"""Members are recognised under the names that can mean one thing only."""

import io

import pytest
from raw_data import assert_same_scene, hub_members, raw_row, tar_bytes

from wireframe.member_names import MemberName, parse_name
from wireframe.scene import read_scene
from wireframe.shards import iter_rows

LAYOUTS = {
    "folder per sample": lambda key, column, view, ext: f"x/{key}/{column}" + (f".{view}" if view else "") + ext,
    "folder per column": lambda key, column, view, ext: f"{key}/{column}" + (f"/{view}" if view else "") + ext,
    "underscored view": lambda key, column, view, ext: f"{key}.{column}" + (f"_{view}" if view else "") + ext,
    "view before column": lambda key, column, view, ext: f"{key}." + (f"{view}." if view else "") + column + ext,
    "underscores only": lambda key, column, view, ext: f"{key}_{column}" + (f"_{view}" if view else "") + ext,
    "folder and underscore": lambda key, column, view, ext: f"{key}/{column}" + (f"_{view}" if view else "") + ext,
    "upper case": lambda key, column, view, ext: f"{key}.{column.upper()}" + (f".{view}" if view else "") + ext.upper(),
    "older names": lambda key, column, view, ext: f"{key}." + {"ade": "ade20k", "colmap": "colmap_binary"}.get(
        column, column.lower()) + (f".{view}" if view else "") + ("" if column == "colmap" else ext),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_unambiguous_layouts_are_read(layout):
    rows = [raw_row(2, "house1"), raw_row(12, "house2", seed=5)]
    members = []
    for row in rows:
        row["image_ids"] = [str(index) for index in range(len(row["image_ids"]))]
        for name, data in hub_members(row).items():
            key, column, *rest = name.split(".")
            members.append((LAYOUTS[layout](key, column, rest[0] if len(rest) > 1 else "", f".{rest[-1]}"), data))
    scenes = [read_scene(row) for row in iter_rows(io.BytesIO(tar_bytes(members)))]
    assert len(scenes) == 2
    for scene, row in zip(scenes, rows):
        assert_same_scene(scene, read_scene(row))


@pytest.mark.parametrize("path", ["a.K.pickle", "a.ade.0.pkl", "a.pth", "._a.ade.0.png", "a.readme.txt", "a.jpg", "a",
                                  "", "/", ".", "a.colmap.0.zip", "README.md", "__MACOSX/a.ade.0.png",
                                  "x_ade_gestalt_0.png"])
def test_other_names_are_not_recognised(path):
    assert parse_name(path).column is None


@pytest.mark.parametrize("path, expected", [
    ("a.ade.0.png", ("a", "ade", "0", "png")), ("x/y/a.Gestalt.v.1.b.PNG", ("a", "gestalt", "v.1.b", "png")),
    ("a.colmap", ("a", "colmap", None, "")), ("a.K.npy", ("a", "K", None, "npy")),
    ("a.t.7.txt", ("a", "t", "7", "txt")),
    ("x_colmap.ade.K.png", ("x_colmap", "ade", "K", "png")), ("a/ade.img.k.png", ("a", "ade", "img.k", "png")),
    ("a_r.json", ("a_r", "bundle", None, "json")), ("a_r.npy", ("a", "R", None, "npy")),
    ("a_pose_only_in_colmap.json", ("a", "pose_only_in_colmap", None, "json")),
    ("a.wireframe.npz", ("a", "bundle", None, "npz")), ("./a.depthcm.0.png", ("a", "depthcm", "0", "png")),
    ("a.ade.png", ("a", "ade", "0", "png")),
])
def test_names_are_taken_apart(path, expected):
    assert parse_name(path) == MemberName(*expected)
