"""``wireframe doctor DATA`` says what a source holds and what of it is recognised."""

import io

import numpy as np
import pytest
from raw_data import hub_members, npy, raw_row, tar_bytes

from wireframe.errors import ShardError
from wireframe.inspect_data import describe_data


def test_doctor_lists_members_recognised_and_dropped(tmp_path):
    row = raw_row(3)
    row["pose_only_in_colmap"][1] = True
    members = {"README.md": b"hi", **hub_members(row), "house1.pose_only_in_colmap.json": b"[false, true, false]"}
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    lines = describe_data(tmp_path).splitlines()
    fields = {line.split()[0]: line.split(maxsplit=3)[-1] for line in lines if line.startswith("  ")}
    assert fields["README.md"] == "not recognised"
    assert fields["house1.ade.img_0.png"] == "ade, view img_0"
    assert fields["house1.colmap.zip"] == "colmap"
    text = "\n".join(lines)
    assert "views 3, ade 3, gestalt 3, depth 3, K 3" in text
    assert "usable views: 2, 2 of them with depth; dropped: 1" in text
    assert "view 'img_1' dropped: pose only in COLMAP" in text
    assert "COLMAP points: 3" in text and "3 vertices, 2 edges" in text


def test_doctor_reports_what_is_unusable(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_bytes({"house1.K.npy": npy(np.eye(3)[None])}))
    assert "not usable: scene 'house1': no usable view" in describe_data(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(tar_bytes({"notes.md": b"hello"}))
    assert "no member is a column" in describe_data(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(tar_bytes({}))
    with pytest.raises(ShardError, match="no files"):
        describe_data(tmp_path / "a.tar")


def test_names_inside_a_tar_cannot_steer_the_terminal(tmp_path):
    members = {**hub_members(raw_row(1)), "house1.\x1b[2J\nforged.txt": b"x"}
    (tmp_path / "a.tar").write_bytes(tar_bytes(members))
    lines = describe_data(tmp_path).split("\n")
    assert all(line.isprintable() for line in lines)
    assert any(r"house1.\x1b[2J\nforged.txt" in line for line in lines)


def test_doctor_tells_a_glob_of_sampled_rows(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for name in "ba":
        parquet.write_table(arrow.table({"order_id": ["x"], "data": [b""]}), tmp_path / f"{name}.parquet")
    assert "a.parquet: Parquet with 1 row, the first of 2 files" in describe_data(tmp_path / "*.parquet")


def test_doctor_lists_the_arrays_of_sampled_rows(tmp_path):
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    buffer = io.BytesIO()
    np.savez(buffer, xyz_norm=np.zeros((8, 3), dtype=np.float32), mask=np.ones(8, dtype=bool))
    path = tmp_path / "train.parquet"
    parquet.write_table(arrow.table({"order_id": ["a", "b"], "data": [buffer.getvalue(), b""]}), path)
    for source in (path, tmp_path):
        text = describe_data(source)
        assert "2 rows" in text and "order_id (string), data (binary)" in text
        assert "xyz_norm  float32  [8, 3]" in text and "mask      bool     [8]" in text
    path.write_bytes(b"PAR1 no")
    with pytest.raises(ShardError, match=r"train\.parquet"):
        describe_data(path)
