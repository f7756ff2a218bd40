"""Tars of raw scenes: written deterministically and whole, read tolerantly, and no view is lost."""

import gzip
import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image
from raw_data import HEIGHT, WIDTH, assert_same_scene, hub_members, npy, png, raw_row, tar_bytes

from wireframe.errors import SceneError, ShardError
from wireframe.scene import read_scene
from wireframe.shards import ShardWriter, iter_rows, list_shards
from wireframe.tarstream import iter_members

VIEW_COUNTS = (3, 5, 1, 22, 4)


def _rows():
    return [raw_row(views, f"house{number}", seed=number) for number, views in enumerate(VIEW_COUNTS)]


def _write(path, rows):
    with ShardWriter(path) as writer:
        for row in rows:
            writer.write(row)
    return path


def _scenes(source):
    return [read_scene(row) for row in iter_rows(source)]


def test_no_view_is_lost_when_view_counts_differ(tmp_path):
    rows = _rows()
    for source in (_write(tmp_path / "a.tar", rows),
                   io.BytesIO(tar_bytes([item for row in rows for item in hub_members(row).items()]))):
        scenes = _scenes(source)
        assert [len(scene.views) for scene in scenes] == list(VIEW_COUNTS)
        for scene, row in zip(scenes, rows):
            assert_same_scene(scene, read_scene(row))


@pytest.mark.parametrize("arrays", [True, False])
def test_documented_hub_layout_is_read(arrays):
    rows = [raw_row(views, f"house{number}", seed=number) for number, views in enumerate((2, 11, 3))]
    members = [(f"train/{name}", data) for row in rows for name, data in hub_members(row, arrays).items()]
    scenes = _scenes(io.BytesIO(tar_bytes(members)))
    assert len(scenes) == 3
    for scene, row in zip(scenes, rows):
        # img_2 stands before img_10, with image_ids or without.
        assert_same_scene(scene, read_scene(row))


def test_rows_hold_the_raw_columns(tmp_path):
    row = raw_row(2)
    row["depth"] = [None, row["depth"][1]]
    (read,) = iter_rows(_write(tmp_path / "a.tar", [row]))
    assert set(read) == set(row)
    assert read["image_ids"] == row["image_ids"] and read["colmap"] == row["colmap"]
    assert read["pose_only_in_colmap"] == [False, False]
    for name in ("ade", "gestalt"):
        assert all(isinstance(image, Image.Image) and image.size == (WIDTH, HEIGHT) for image in read[name])
    assert read["depth"][0] is None and read["depth"][1].mode == "I;16"
    for name, shape in (("K", (3, 3)), ("R", (3, 3)), ("t", (3,))):
        assert [(value.dtype, value.shape) for value in read[name]] == [(np.float32, shape)] * 2
    assert read["wf_edges"].tolist() == row["wf_edges"]


def test_same_rows_give_the_same_bytes(tmp_path):
    first = _write(tmp_path / "a.tar", _rows()).read_bytes()
    second = _write(tmp_path / "b.tar", _rows()).read_bytes()
    assert hashlib.sha256(first).digest() == hashlib.sha256(second).digest()
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        infos = tar.getmembers()
    assert {(info.mtime, info.uid, info.gid, info.uname, info.mode) for info in infos} == {(0, 0, 0, "", 0o644)}


def test_encoded_images_are_stored_as_they_are(tmp_path):
    row = raw_row(1)
    data = png(row["ade"][0])
    path = _write(tmp_path / "a.tar", [{**row, "ade": [{"bytes": data}]}])
    assert dict(iter_members(io.BytesIO(path.read_bytes())))["house1.ade.img_0.png"] == data


def test_written_tar_is_read_by_tarfile_and_webdataset(tmp_path):
    rows = _rows()[:3]
    path = _write(tmp_path / "a.tar", rows)
    with tarfile.open(path) as tar:
        names = tar.getnames()
        members = list(iter_members(io.BytesIO(path.read_bytes())))
        assert [name for name, _ in members] == names
        assert all(data == tar.extractfile(name).read() for name, data in members)
    assert names[:3] == ["house0.image_ids.json", "house0.ade.img_0.png", "house0.ade.img_1.png"]
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"].split("/")[-1] for sample in samples] == ["house0", "house1", "house2"]
    for sample, row in zip(samples, rows):
        assert json.loads(sample["image_ids.json"]) == row["image_ids"]
        assert sum(name.startswith("gestalt.") for name in sample) == len(row["image_ids"])
        assert sample["colmap.zip"] == row["colmap"]


def test_nothing_is_left_when_writing_fails(tmp_path):
    path = tmp_path / "a.tar"
    with pytest.raises(RuntimeError), ShardWriter(path) as writer:
        writer.write(raw_row(2))
        raise RuntimeError("stopped")
    assert os.listdir(tmp_path) == []
    path.write_bytes(b"old")
    with pytest.raises(ShardError), ShardWriter(path) as writer:
        writer.write({**raw_row(2), "ade": [b"no image", None]})
    assert os.listdir(tmp_path) == ["a.tar"] and path.read_bytes() == b"old"


def test_a_refused_row_leaves_the_others_intact(tmp_path):
    path = tmp_path / "a.tar"
    with ShardWriter(path) as writer:
        writer.write(raw_row(2, "one"))
        for bad in ({"t": [[1, 2], None]}, {"depth": [b"x", None]}, {"colmap": 7}, {"wf_edges": [[1, 2, 3]]}):
            with pytest.raises(ShardError, match="two"):
                writer.write({**raw_row(2, "two"), **bad})
        writer.write(raw_row(3, "three"))
    assert [(scene.order_id, len(scene.views)) for scene in _scenes(path)] == [("one", 2), ("three", 3)]


def test_a_write_that_stops_half_way_is_never_put_in_place(tmp_path):
    with pytest.raises(ShardError, match="half-way"), ShardWriter(tmp_path / "a.tar") as writer:
        writer._tar.addfile = lambda *_: (_ for _ in ()).throw(OSError("disk full"))
        with pytest.raises(OSError):
            writer.write(raw_row(1))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("order_id", ["a.b", "a/b", "", None, "a\\b", "a\nb", "x" * 300])
def test_order_ids_that_cannot_name_members_are_refused(tmp_path, order_id):
    with pytest.raises(ShardError, match="order_id"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.write({**raw_row(1), "order_id": order_id})


def test_ids_that_stand_twice_are_refused(tmp_path):
    with ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(raw_row(1))
        with pytest.raises(ShardError, match="twice"):
            writer.write(raw_row(1))
        with pytest.raises(ShardError, match="twice"):
            writer.write({**raw_row(2, "other"), "image_ids": ["a", "a"]})
    with pytest.raises(ShardError, match="outside its with block"):
        writer.write(raw_row(1, "late"))
    with pytest.raises(ShardError, match="cannot write"), ShardWriter(tmp_path / "none" / "a.tar"):
        pass


def test_views_without_images_or_cameras_survive_the_round_trip(tmp_path):
    row = raw_row(3)
    row["ade"][1] = row["gestalt"][1] = None
    for name in ("K", "R", "t"):
        row[name][1] = None
    row["pose_only_in_colmap"][1] = True
    (scene,) = _scenes(_write(tmp_path / "a.tar", [row]))
    assert_same_scene(scene, read_scene(row))
    assert [view.index for view in scene.views] == [0, 2]


def test_long_unicode_and_dotted_ids_survive_the_round_trip(tmp_path):
    row = raw_row(3, "häuser-" + "x" * 120)
    row["image_ids"] = ["view.v1.0", "ü" * 60, "ade"]
    (scene,) = _scenes(_write(tmp_path / "a.tar", [row]))
    assert_same_scene(scene, read_scene(row))


def test_folders_and_links_are_passed_over():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("house1.K.npy")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in hub_members(raw_row(2)).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (scene,) = _scenes(io.BytesIO(buffer.getvalue()))
    assert_same_scene(scene, read_scene(raw_row(2)))


def test_only_read_is_called_on_a_file_object():
    class Pipe:
        def __init__(self, data):
            self._stream = io.BytesIO(data)

        def read(self, count):
            return self._stream.read(min(count, 777))

    data = tar_bytes(hub_members(raw_row(2)))
    for pipe in (Pipe(data), Pipe(gzip.compress(data))):
        (scene,) = _scenes(pipe)
        assert_same_scene(scene, read_scene(raw_row(2)))


def _without(members, *parts):
    return {name: data for name, data in members.items() if not any(part in name for part in parts)}


def test_members_numbered_by_position_follow_image_ids():
    row = raw_row(3)
    members = {name.replace("img_", "") if "image_ids" not in name else name: data
               for name, data in hub_members(row).items()}
    (scene,) = _scenes(io.BytesIO(tar_bytes(members)))
    assert_same_scene(scene, read_scene(row))


def test_a_depth_that_one_view_lacks_stays_with_its_own_view():
    members = _without(hub_members(raw_row(3)), "depth.img_0", "depth.img_2")
    (scene,) = _scenes(io.BytesIO(tar_bytes(members)))
    assert [view.depth is None for view in scene.views] == [True, False, True]
    assert (scene.views[1].depth == 1001).all()


def test_depth_in_centimetres_becomes_millimetres():
    members = _without(hub_members(raw_row(1)), "depth")
    members["house1.depthcm.img_0.png"] = png(np.full((HEIGHT, WIDTH), 123, dtype=np.uint16))
    (scene,) = _scenes(io.BytesIO(tar_bytes(members)))
    assert (scene.views[0].depth == 1230).all()


def test_bundles_of_columns_are_read():
    row = raw_row(2)
    members = _without(hub_members(row), "wf_", ".K.", ".R.", ".t.", "image_ids")
    bundle = io.BytesIO()
    np.savez(bundle, **{name: row[name] for name in ("wf_vertices", "wf_edges", "wf_classifications")})
    members["house1.wireframe.npz"] = bundle.getvalue()
    members["house1.json"] = json.dumps({name: row[name] for name in ("K", "R", "t", "image_ids")}).encode()
    (scene,) = _scenes(io.BytesIO(tar_bytes(members)))
    assert_same_scene(scene, read_scene(row))


@pytest.mark.parametrize("extension, encode", [
    ("json", lambda ids: json.dumps(ids).encode()), ("txt", lambda ids: "\n".join(ids).encode()),
    ("npy", lambda ids: npy(np.array(ids))), ("npy", lambda ids: npy(np.array(ids, dtype=np.bytes_)))])
def test_image_ids_give_the_order_of_views(extension, encode):
    row = raw_row(3)
    row["image_ids"] = ["img_2", "img_0", "img_1"]
    members = _without(hub_members(row), "image_ids")
    members[f"house1.image_ids.{extension}"] = encode(row["image_ids"])
    members["house1.order_id.txt"] = b"another\n"
    (scene,) = _scenes(io.BytesIO(tar_bytes(members)))
    assert_same_scene(scene, read_scene({**row, "order_id": "another"}))


def test_cameras_that_cannot_be_matched_to_views_are_refused():
    members = _without(hub_members(raw_row(5)), "image_ids", "img_1", "img_3")
    (row,) = iter_rows(io.BytesIO(tar_bytes(members)))
    with pytest.raises(SceneError, match="5 entries for 3 views"):
        read_scene(row)


def test_a_broken_member_costs_its_own_scene_or_view_only():
    members = []
    for number in range(5):
        sample = hub_members(raw_row(2, f"house{number}", seed=number), arrays=number != 3)
        if number == 1:
            sample["house1.K.npy"] = sample["house1.K.npy"][:-10]
        if number == 2:
            sample["house2.wf_vertices.npy"] = b"\x93NUMPY garbage"
        if number == 3:
            sample["house3.ade.img_0.png"] = b"\x89PNG junk"
            sample["house3.R.img_1.json"] = b"{"
        members += sample.items()
    messages = []
    for row in iter_rows(io.BytesIO(tar_bytes(members))):
        try:
            messages.append(len(read_scene(row).views))
        except SceneError as error:
            messages.append(str(error))
    assert messages[0] == 2 and messages[4] == 2
    assert "'house1'" in messages[1] and "'K'" in messages[1] and "announces" in messages[1]
    assert "'house2'" in messages[2] and "'wf_vertices'" in messages[2]
    assert "'house3'" in messages[3] and "ade: undecodable" in messages[3] and "R does not hold" in messages[3]


def test_object_arrays_are_never_unpickled():
    members = hub_members(raw_row(2))
    members["house1.wf_edges.npy"] = npy(np.array([{"a": 1}, None], dtype=object))
    (row,) = iter_rows(io.BytesIO(tar_bytes(members)))
    with pytest.raises(SceneError, match="dtype object"):
        read_scene(row)


def test_truncated_tar_gives_its_complete_samples_then_names_the_last(tmp_path):
    data = tar_bytes([item for row in _rows() for item in hub_members(row).items()])
    start = data.index(b"house2.image_ids")
    # house1 is known to be whole once a header of house2 is.
    for cut, whole in ((start, 1), (start + 100, 1), (start + 517, 2), (start + 512 * 9 + 7, 2)):
        path = tmp_path / f"cut{cut}.tar"
        path.write_bytes(data[:cut])
        scenes = []
        with pytest.raises(ShardError, match=rf"cut{cut}\.tar.*truncated.*'house{whole - 1}'") as caught:
            scenes.extend(read_scene(row) for row in iter_rows(path))
        assert [len(scene.views) for scene in scenes] == list(VIEW_COUNTS[:whole])
        assert "\n" not in str(caught.value)


def test_rows_of_the_other_shards_come_before_the_error_of_a_broken_one(tmp_path):
    data = _write(tmp_path / "b.tar", _rows()[:2]).read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:len(data) // 2])
    (tmp_path / "c.tar").write_bytes(b"")
    read = []
    with pytest.raises(ShardError, match=r"a\.tar"):
        read.extend(row["order_id"] for row in iter_rows(tmp_path))
    assert read[-2:] == ["house0", "house1"]


def test_limit_stops_before_a_broken_end():
    data = tar_bytes([item for row in _rows() for item in hub_members(row).items()])
    rows = list(iter_rows(io.BytesIO(data[:data.index(b"house3.image_ids") + 200]), limit=2))
    assert [row["order_id"] for row in rows] == ["house0", "house1"]
    assert list(iter_rows(io.BytesIO(b""), limit=0)) == []


@pytest.mark.parametrize("data, message", [
    (b"", "empty"), (b"x" * 5000, "not a tar"), (gzip.compress(b"hello" * 200, mtime=0), "not a tar"),
    (b"\x1f\x8bbroken", "truncated"), (b"P" * 100, "truncated")])
def test_what_is_no_tar_is_refused(data, message):
    with pytest.raises(ShardError, match=message):
        list(iter_rows(io.BytesIO(data)))
    with pytest.raises(ShardError, match="binary"):
        list(iter_rows(io.StringIO("text" * 400)))


def test_a_tar_of_other_things_is_named_and_an_empty_one_gives_no_rows():
    with pytest.raises(ShardError, match=r"notes\.md"):
        list(iter_rows(io.BytesIO(tar_bytes({"notes.md": b"hello"}))))
    assert list(iter_rows(io.BytesIO(tar_bytes({})))) == []


def test_caps_on_members(monkeypatch):
    from wireframe import shards, tarstream

    data = tar_bytes(hub_members(raw_row(3)))
    monkeypatch.setattr(shards, "MAX_SAMPLE_MEMBERS", 4)
    with pytest.raises(ShardError, match="more than 4 members"):
        list(iter_rows(io.BytesIO(data)))
    monkeypatch.undo()
    monkeypatch.setattr(tarstream, "MAX_MEMBER_BYTES", 100)
    with pytest.raises(ShardError, match="above the cap of 100"):
        list(iter_rows(io.BytesIO(data)))


def test_shards_of_folders_and_globs_are_listed_in_order(tmp_path):
    for name in ("b/public/2.tar", "b/public/10.tar", "a.tar.gz", "c.tgz", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(tar_bytes({}))
    names = ["a.tar.gz", "b/public/10.tar", "b/public/2.tar", "c.tgz"]
    assert list_shards(tmp_path) == [str(tmp_path / name) for name in names]
    assert list_shards(str(tmp_path / "b" / "*" / "*.tar")) == [str(tmp_path / name) for name in names[1:3]]
    assert list_shards(tmp_path / "c.tgz") == [str(tmp_path / "c.tgz")]
    for missing in (tmp_path / "none.tar", tmp_path / "b" / "x*.tar"):
        with pytest.raises(ShardError, match="no tar at"):
            list_shards(missing)


def test_hub_paths_go_through_the_hub_file_system(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    data = tar_bytes(hub_members(raw_row(4)))

    class Files:
        def isfile(self, path):
            return path.endswith(".tar")

        def glob(self, pattern):
            assert pattern == "hf://datasets/o/n/data/**"
            return ["datasets/o/n/data/1.tar", "datasets/o/n/data/0.tar", "datasets/o/n/data/README.md"]

        def open(self, path, mode, block_size):
            if path.endswith("1.tar"):
                raise PermissionError("gated\nrepository")
            return io.BytesIO(data)

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)
    assert list_shards("hf://datasets/o/n/data/") == ["hf://datasets/o/n/data/0.tar", "hf://datasets/o/n/data/1.tar"]
    rows = iter_rows("hf://datasets/o/n/data")
    assert_same_scene(read_scene(next(rows)), read_scene(raw_row(4)))
    with pytest.raises(ShardError, match=r"1\.tar: cannot be opened \(gated repository\)"):
        next(rows)


def test_every_shard_that_breaks_off_is_named(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.tar").write_bytes(b"P" * 100)
    with pytest.raises(ShardError, match=r"a\.tar.*truncated.*; 2 more broke off: b\.tar, c\.tar$"):
        list(iter_rows(tmp_path))
