"""Property tests over malformed input: a ``wireframe`` error or a typed result, never another exception or leftover."""

import functools
import io
import json
import os
import tarfile
import tempfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from raw_data import colmap_zip, hub_members, label_maps, npy, png, raw_row, tar_bytes

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wireframe.colmap import read_points3d
from wireframe.errors import SceneError, ShardError, WireframeError
from wireframe.inspect_data import describe_data
from wireframe.member_names import parse_name
from wireframe.scene import Scene, read_scene
from wireframe.shards import ShardWriter, iter_rows

quick = settings(max_examples=150, deadline=2000, derandomize=True, suppress_health_check=list(HealthCheck))
slow = settings(quick, max_examples=60)


def assert_typed(scene: Scene) -> None:
    """Every array of a scene has its documented type, shape and range."""
    assert scene.views and isinstance(scene.order_id, str) and scene.order_id
    assert len({view.index for view in (*scene.views, *scene.dropped)}) == len(scene.views) + len(scene.dropped)
    for view in scene.views:
        assert view.K.shape == view.R.shape == (3, 3) and view.t.shape == (3,)
        assert all(a.dtype == np.float32 and np.isfinite(a).all() for a in (view.K, view.R, view.t))
        assert np.abs(view.R @ view.R.T - np.eye(3)).max() < 2e-3 and min(view.K[0, 0], view.K[1, 1]) > 0
        assert view.ade.dtype == view.gestalt.dtype == np.uint8 and view.ade.shape == view.gestalt.shape
        assert view.ade.ndim == 2 and view.ade.size > 0
        assert view.depth is None or (view.depth.dtype == np.uint16 and view.depth.ndim == 2 and view.depth.any())
    assert all(isinstance(view.reason, str) and view.reason for view in scene.dropped)
    assert scene.points.dtype == scene.vertices.dtype == np.float32
    assert scene.points.shape[1:] == scene.vertices.shape[1:] == (3,)
    assert np.isfinite(scene.points).all() and np.isfinite(scene.vertices).all()
    assert scene.edges.dtype == scene.edge_classes.dtype == np.int64
    assert scene.edges.shape == (len(scene.edge_classes), 2)
    assert scene.edges.size == 0 or 0 <= scene.edges.min() <= scene.edges.max() < len(scene.vertices)


def read_or_refuse(row) -> Scene | None:
    """The scene of a row, checked; None where it is refused, in one line."""
    try:
        scene = read_scene(row)
    except SceneError as error:
        assert str(error) and "\n" not in str(error)
        return None
    assert_typed(scene)
    return scene


def mutated(draw, data: bytes) -> bytes:
    """``data`` cut, overwritten or repeated at a drawn place."""
    kind = draw(st.sampled_from(["cut", "overwrite", "zero", "repeat", "drop"]))
    at = draw(st.integers(0, len(data)))
    length = draw(st.integers(1, 600))
    if kind == "cut":
        return data[:at]
    if kind == "overwrite":
        piece = draw(st.binary(min_size=1, max_size=8))
        return data[:at] + piece + data[at + len(piece):]
    if kind == "zero":
        return data[:at] + b"\0" * length + data[at + length:]
    if kind == "repeat":
        return data[:at] + data[max(0, at - length):]
    return data[:at] + data[at + length:]


@functools.cache
def _tar(gzipped: bool) -> bytes:
    rows = [raw_row(views, f"house{views}", seed=views) for views in (1, 2)]
    members = [item for row in rows for item in hub_members(row).items()]
    return tar_bytes(members, form=tarfile.PAX_FORMAT, mode="w:gz" if gzipped else "w")


@functools.cache
def _encoded_row() -> dict:
    row = raw_row(2)
    return {**row, **{name: [png(image) for image in row[name]] for name in ("ade", "gestalt", "depth")}}


@quick
@given(st.data())
def test_malformed_zips_give_points_or_a_scene_error(data):
    method = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    broken = mutated(data.draw, colmap_zip(method=method))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            points = read_points3d(broken)
    except SceneError as error:
        assert "\n" not in str(error)
        return
    assert points.dtype == np.float32 and points.ndim == 2 and points.shape[1] == 3 and np.isfinite(points).all()


@quick
@given(st.one_of(st.binary(max_size=300), st.text(max_size=120).map(lambda text: text.encode("utf-8", "replace")),
                 st.lists(st.lists(st.one_of(st.floats(), st.integers()), max_size=7), max_size=6).map(
                     lambda rows: "\n".join(" ".join(map(str, row)) for row in rows).encode())),
       st.sampled_from(["points3D.txt", "points3D.bin"]))
def test_any_content_of_the_points_file_gives_points_or_a_scene_error(content, name):
    try:
        points = read_points3d(colmap_zip(content, name=name))
    except SceneError as error:
        assert "\n" not in str(error)
        return
    assert points.dtype == np.float32 and points.shape[1:] == (3,) and np.isfinite(points).all()


@slow
@given(st.data(), st.booleans())
def test_damaged_tars_give_scenes_or_a_shard_error(data, gzipped):
    tar = mutated(data.draw, _tar(gzipped))
    try:
        for row in iter_rows(io.BytesIO(tar)):
            read_or_refuse(row)
    except ShardError as error:
        assert str(error) and "\n" not in str(error)


@slow
@given(st.data())
def test_truncated_tars_give_only_whole_samples_and_then_an_error(data):
    tar = _tar(False)
    cut = data.draw(st.integers(0, tar.rindex(b"house2.colmap") + 600))
    rows = []
    with pytest.raises(ShardError):
        rows.extend(iter_rows(io.BytesIO(tar[:cut])))
    assert [len(read_scene(row).views) for row in rows] == [1] * (cut >= tar.index(b"house2.image_ids") + 512)


def _resealed(header: bytes) -> bytes:
    """A tar header with its checksum made right."""
    blanked = header[:148] + b" " * 8 + header[156:]
    return blanked[:148] + b"%06o\0 " % sum(blanked) + blanked[156:]


ODD_FIELDS = [b"\x80" + b"\xff" * 20, b"\xff" * 20, b"77777777777\0", b"-0000000001\0", b"\0" * 20,
              *(bytes([kind]) for kind in b"15SLKxgD")]


@quick
@given(st.data())
def test_well_sealed_hostile_headers_give_scenes_or_a_shard_error(data):
    tar = _tar(False)
    headers = [at for at in range(0, len(tar), 512) if tar[at + 257:at + 262] == b"ustar"]
    at = data.draw(st.sampled_from(headers))
    field, length = data.draw(st.sampled_from([(0, 100), (124, 12), (136, 12), (156, 1), (257, 8), (345, 155)]))
    value = data.draw(st.one_of(
        st.binary(min_size=length, max_size=length),
        st.sampled_from(ODD_FIELDS).map(lambda piece: piece[:length].ljust(length, b"\0"))))
    header = tar[at:at + 512]
    changed = tar[:at] + _resealed(header[:field] + value + header[field + length:]) + tar[at + 512:]
    try:
        for row in iter_rows(io.BytesIO(changed)):
            read_or_refuse(row)
    except ShardError as error:
        assert str(error) and "\n" not in str(error)


@slow
@given(st.binary(max_size=4000))
def test_random_bytes_are_no_tar(data):
    with pytest.raises(ShardError):
        list(iter_rows(io.BytesIO(data)))


def _arrays():
    kinds = ["<f8", "<f4", "<f2", "<i8", "|u1", "|b1", "<U3", "|S4", "<c16", "<M8[s]"]
    plain = st.builds(lambda kind, shape: np.zeros(shape, dtype=kind), st.sampled_from(kinds),
                      st.lists(st.integers(0, 4), max_size=4).map(tuple))
    odd = st.sampled_from([np.array([None, {}], dtype=object), np.array([[1, 2], "a"], dtype=object),
                           np.zeros(2, dtype=[("a", "f4"), ("b", "O")]), np.zeros(2, dtype=[("a", "f4")]),
                           np.full((2, 3, 3), np.nan), np.full((2, 3), np.inf), np.asfortranarray(np.ones((2, 3, 3)))])
    return st.one_of(plain, odd)


COLUMNS = ("K", "R", "t", "image_ids", "pose_only_in_colmap", "wf_vertices", "wf_edges", "wf_classifications",
           "order_id")


def _members_without(start: str) -> dict[str, bytes]:
    return {name: data for name, data in hub_members(raw_row(2)).items() if not name.startswith(start)}


@quick
@given(st.sampled_from([*COLUMNS, "ade.img_0", "depth.img_0", "K.img_0"]), _arrays(), st.data())
def test_any_npy_member_gives_a_scene_or_a_scene_error(column, array, data):
    content = npy(array)
    if data.draw(st.booleans()):
        content = mutated(data.draw, content)
    extension = data.draw(st.sampled_from(["npy", "json", "txt", "png"]))
    members = _members_without(f"house1.{column}")
    for row in iter_rows(io.BytesIO(tar_bytes({**members, f"house1.{column}.{extension}": content}))):
        read_or_refuse(row)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4),
              st.sampled_from([10**400, "img_0"])),
    lambda inner: st.one_of(st.lists(inner, max_size=4),
                            st.dictionaries(st.sampled_from(["img_0", *COLUMNS, "ade", "depth"]), inner, max_size=3)),
    max_leaves=12)


@quick
@given(st.sampled_from([*COLUMNS, "K.img_0", ""]), JSON)
def test_any_json_member_gives_a_scene_or_a_scene_error(column, value):
    members = _members_without(f"house1.{column}.")
    name = f"house1.{column}.json" if column else "house1.json"
    for row in iter_rows(io.BytesIO(tar_bytes({**members, name: json.dumps(value).encode()}))):
        read_or_refuse(row)


def test_deeply_nested_json_is_refused():
    members = {**_members_without("house1.wf_edges"), "house1.wf_edges.json": b"[" * 200_000}
    (row,) = iter_rows(io.BytesIO(tar_bytes(members)))
    assert read_or_refuse(row) is None


NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 30.0, 1e-30, 1e300, float("nan"), float("inf"), -float("inf")])


@quick
@given(st.sampled_from(["K", "R", "t"]), st.lists(NUMBERS, min_size=9, max_size=9), st.booleans())
def test_impossible_cameras_are_dropped(column, numbers, everywhere):
    row = _encoded_row()
    value = numbers[:3] if column == "t" else [numbers[:3], numbers[3:6], numbers[6:]]
    scene = read_or_refuse({**row, column: [value, value if everywhere else row[column][1]]})
    if not np.isfinite(numbers[:3] if column == "t" else numbers).all():
        assert scene is None if everywhere else [view.reason for view in scene.dropped] == [f"{column} is not finite"]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_row_of_only_such_cameras_is_refused(value):
    row = _encoded_row()
    bad = {name: np.full((2, *shape), value) for name, shape in (("K", (3, 3)), ("R", (3, 3)), ("t", (3,)))}
    with pytest.raises(SceneError, match=r"all zero|not finite"):
        read_scene({**row, **bad})


class _Hostile:
    """An object whose every conversion fails."""

    def __array__(self, *args, **kwargs):
        raise RuntimeError("no array")

    def __bool__(self):
        raise RuntimeError("no truth")


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.binary(max_size=40),
    st.just([]), st.just({}), st.just([None, None]), st.just([[], []]), st.just([{}, {"bytes": b""}]),
    st.just([_Hostile(), _Hostile()]), st.just(_Hostile()), st.just(np.zeros(0)), st.just(np.zeros(())),
    st.just([np.zeros((0, 5, 3), dtype=np.uint8)] * 2), st.just([np.zeros((2, 2), dtype=object)] * 2),
    st.just([np.zeros((24, 32, 3), dtype=np.uint8)] * 2), st.just(np.zeros((2, 24, 32, 3), dtype=np.int64)),
    st.just(np.full((2, 4, 4), np.nan)), st.just([b"\x89PNG\r\n\x1a\n", png(label_maps(3)[2])]),
    st.lists(st.lists(st.floats(), max_size=3), max_size=3))


@quick
@given(st.dictionaries(st.sampled_from(sorted(_encoded_row())), VALUES, min_size=1, max_size=3))
def test_any_value_in_any_column_gives_a_scene_or_a_scene_error(changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        read_or_refuse({**_encoded_row(), **changes})


@pytest.mark.parametrize("row", [None, [], 5, {}, {"order_id": "x"}, {"order_id": "x", "ade": [], "gestalt": []}])
def test_rows_without_views_are_refused(row):
    assert read_or_refuse(row) is None


@slow
@given(st.data())
def test_damaged_images_drop_their_view_or_their_depth(data):
    row = _encoded_row()
    column = data.draw(st.sampled_from(["ade", "gestalt", "depth"]))
    scene = read_or_refuse({**row, column: [mutated(data.draw, row[column][0]), row[column][1]]})
    assert scene is not None and scene.views[-1].index == 1
    if column == "depth":
        assert len(scene.views) == 2


@quick
@given(st.text(alphabet=st.one_of(st.sampled_from("kKrRtade_./\\0gestalt-"), st.characters()), max_size=40))
def test_any_member_name_is_parsed(name):
    found = parse_name(name)
    assert found.column is None or found.key


@slow
@given(st.dictionaries(st.sampled_from(sorted(_encoded_row())), VALUES, min_size=1, max_size=3), st.booleans())
def test_a_row_is_written_whole_or_not_at_all(changes, damage):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        try:
            with ShardWriter(path) as writer:
                writer.write(raw_row(1, "first"))
                writer.write({**_encoded_row(), **changes})
        except WireframeError as error:
            assert "\n" not in str(error)
            assert os.listdir(folder) == []
            return
        assert os.listdir(folder) == ["a.tar"]
        ids = []
        for row in iter_rows(path):
            ids.append(row["order_id"])
            read_or_refuse(row)
        assert ids[0] == "first" and len(ids) == 2
        assert describe_data(path)
