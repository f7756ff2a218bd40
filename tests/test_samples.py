import io
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenes import random_scene
from wireframe.errors import MissingPackageError, SampleError, ShardError
from wireframe.fusion import fuse_views
from wireframe.npy import read_npy
from wireframe.samples import is_sampled, iter_sample_rows, list_parquet, read_sample, write_parquet, write_sample
from wireframe.sampling import sample_points


def sample(seed=0, points=32):
    return sample_points(fuse_views(random_scene(seed), 50), points)


def row_with(**arrays):
    fields = {**sample().arrays(), **arrays}
    buffer = io.BytesIO()
    np.savez(buffer, **{name: array for name, array in fields.items() if array is not None})
    return {"order_id": "x", "data": buffer.getvalue()}


def test_a_row_survives_the_round_trip_bit_for_bit():
    before = sample()
    after = read_sample(write_sample(before))
    assert after.order_id == before.order_id
    for name, array in before.arrays().items():
        assert np.array_equal(array, after.arrays()[name]) and np.asarray(array).dtype == after.arrays()[name].dtype
    assert write_sample(before)["data"] == write_sample(after)["data"]


def test_a_row_has_the_published_arrays_and_dtypes():
    arrays = np.load(io.BytesIO(write_sample(sample())["data"]), allow_pickle=False)
    assert {name: str(arrays[name].dtype) for name in arrays.files} == {
        "xyz_norm": "float32", "class_id": "uint8", "source": "uint8", "mask": "bool", "gt_segments": "float32",
        "scale": "float32", "center": "float32", "gt_vertices": "float32", "gt_edges": "int32",
        "visible_src": "uint8", "visible_id": "int16", "behind": "int16", "n_views_voted": "uint8",
        "vote_frac": "float32", "gt_edge_classes": "int64",
    }  # fmt: skip


def test_a_row_without_ground_truth_has_empty_arrays():
    scene = read_sample(row_with(gt_segments=None, gt_vertices=None, gt_edges=None, gt_edge_classes=None))
    assert scene.gt_segments.shape == (0, 2, 3) and scene.gt_vertices.shape == (0, 3)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mask": None}, "lacks the arrays mask"),
        ({"class_id": np.zeros(5, np.uint8)}, "class_id has shape"),
        ({"center": np.zeros(4, np.float32)}, "center has shape"),
        ({"xyz_norm": np.full((32, 3), np.nan, np.float32)}, "NaN or infinity"),
        ({"gt_edges": np.full((4, 2), 99, np.int32)}, "outside gt_vertices"),
        ({"source": np.array(["a"] * 32)}, "source has dtype <U1"),
        ({"class_id": np.full(32, 300, np.int64)}, "class_id has dtype int64"),
        ({"class_id": np.full(32, 2.0)}, "class_id has dtype float64"),
        ({"gt_edges": np.full((4, 2), 1 << 40)}, "gt_edges has dtype int64"),
        ({"gt_edge_classes": np.full(4, 1 << 63, np.uint64)}, "gt_edge_classes has dtype uint64"),
        ({"xyz_norm": np.zeros((32, 3), np.int64)}, "xyz_norm has dtype int64"),
        ({"mask": np.ones(32, np.uint8)}, "mask has dtype uint8"),
        ({"class_id": np.full(32, 13, np.uint8)}, "class_id runs from 13 to 13, expected 0 to 12"),
        ({"source": np.full(32, 2, np.uint8)}, "source runs"),
        ({"visible_src": np.full(32, 3, np.uint8)}, "visible_src runs"),
        ({"behind": np.full(32, 28, np.int16)}, "behind runs from 28 to 28, expected -1 to 27"),
        ({"behind": np.full(32, -2, np.int16)}, "behind runs"),
        ({"visible_id": np.full(32, 256, np.int16)}, "visible_id runs"),
        ({"vote_frac": np.full(32, 1e300)}, "vote_frac holds NaN or infinity"),
        ({"scale": np.float32(0)}, "scale is 0.0, expected a positive number"),
        ({"scale": np.float64(1e-60)}, "scale is 0.0"),
        ({"scale": np.float32(-1)}, "scale is -1.0"),
    ],
)
def test_bad_arrays_are_named(arrays, message):
    with pytest.raises(SampleError, match=message):
        read_sample(row_with(**arrays))


def test_wider_arrays_that_hold_the_same_values_are_read():
    before, row = sample(), row_with(class_id=sample().class_id.astype(np.int64), center=sample().center.astype(float))
    after = read_sample(row)
    assert after.class_id.dtype == np.uint8 and np.array_equal(after.class_id, before.class_id)
    assert after.center.dtype == np.float32 and np.array_equal(after.center, before.center)


def test_a_mask_of_other_bytes_than_0_and_1_is_read_as_truths():
    mask = np.array([0, 1, 2, 255] * 8, np.uint8).view(np.bool_)
    assert read_sample(row_with(mask=mask)).mask.view(np.uint8).tolist() == [0, 1, 1, 1] * 8


@pytest.mark.parametrize("row", [None, [], {}, {"order_id": "a\x1b[2J", "data": b""}, {"order_id": "x", "data": b"PK"}])
def test_what_is_no_row_is_refused_in_one_printable_line(row):
    with pytest.raises(SampleError) as problem:
        read_sample(row)
    assert str(problem.value).isprintable()


def test_a_header_cut_or_longer_than_it_says_is_refused_and_not_remembered():
    array = io.BytesIO()
    np.save(array, np.zeros(4, np.float32))
    data = array.getvalue()
    assert np.array_equal(read_npy(data, "a"), np.zeros(4))
    for cut in range(len(data)):
        with pytest.raises(ValueError, match=r"a is not a \.npy array|announces 16 bytes"):
            read_npy(data[:cut], "a")
    with pytest.raises(ValueError, match="cut or too long"):
        read_npy(data[:8] + b"\xff\xff" + data[10:] + b" " * 70_000, "a")
    again = read_npy(data, "a")
    again[0] = 1
    assert read_npy(data, "a")[0] == 0


def test_pickled_arrays_are_refused():
    buffer = io.BytesIO()
    np.savez(buffer, xyz_norm=np.array([{"a": 1}], dtype=object))
    with pytest.raises(SampleError, match="dtype object"):
        read_sample({"order_id": "x", "data": buffer.getvalue()})


def test_a_raw_row_is_told_apart():
    with pytest.raises(SampleError, match="order_id"):
        read_sample({"order_id": "x", "ade": []})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_to_a_row_is_a_sample_error_or_a_valid_scene(data):
    blob = bytearray(row_with()["data"])
    for _ in range(data.draw(st.integers(1, 8))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    blob = blob[: data.draw(st.integers(0, len(blob)))] if data.draw(st.booleans()) else blob
    try:
        scene = read_sample({"order_id": "x", "data": bytes(blob)})
    except SampleError as problem:
        assert "\n" not in str(problem)
    else:
        assert scene.xyz_norm.shape == (len(scene.mask), 3)


def test_parquet_shards_open_with_load_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [write_sample(sample(seed)) for seed in range(3)]
    write_parquet(rows, tmp_path / "a.parquet")
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "a.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table.column_names == ["order_id", "data"]
    assert [read_sample(row).order_id for row in table] == [row["order_id"] for row in rows]


def test_rows_come_back_in_order_of_the_shards(tmp_path):
    rows = [write_sample(sample(seed)) for seed in range(3)]
    write_parquet(rows[2:], tmp_path / "b.parquet")
    write_parquet(rows[:2], tmp_path / "a.parquet")
    assert list(iter_sample_rows(tmp_path)) == rows
    assert len(list_parquet(tmp_path)) == 2


def test_what_is_not_parquet_is_a_shard_error(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ShardError, match=r"broken\.parquet"):
        list(iter_sample_rows(tmp_path))
    with pytest.raises(ShardError, match="no Parquet shards"):
        list_parquet(tmp_path / "nowhere")


def test_a_real_path_with_the_characters_of_a_glob_is_found(tmp_path):
    folder = tmp_path / "set[1]"
    folder.mkdir()
    write_parquet([write_sample(sample())], folder / "a[1].parquet")
    paths = [str(folder / "a[1].parquet")]
    assert list_parquet(folder) == list_parquet(folder / "a[1].parquet") == paths
    assert len(list(iter_sample_rows(folder / "a[1].parquet"))) == 1


def test_a_parquet_file_of_something_else_is_refused(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"order_id": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ShardError, match="lacks the columns"):
        list(iter_sample_rows(tmp_path))


def test_sampled_sources_are_told_from_raw_ones(tmp_path):
    for name in ("rows/deep/a.parquet", "raw/a.tar", "both/a.parquet", "both/b.tar.gz", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for sampled in ("rows", "rows/deep/a.parquet", "rows/**/*.parquet", "rows/deep/*", "rows/nowhere.parquet"):
        assert is_sampled(tmp_path / sampled), sampled
    for raw in ("raw", "raw/a.tar", "raw/*", "both", "empty", "nowhere"):
        assert not is_sampled(tmp_path / raw), raw


@pytest.fixture
def hub(monkeypatch):
    """A hub with a sampled, a raw and a gated data set."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    buffer = io.BytesIO()
    write = pytest.importorskip("pyarrow.parquet").write_table
    write(pytest.importorskip("pyarrow").Table.from_pylist([write_sample(sample())]), buffer)
    files = {"datasets/o/rows/b.parquet": buffer.getvalue(), "datasets/o/rows/a.parquet": buffer.getvalue(),
             "datasets/o/raw/a.tar": b"", "datasets/o/broken/a.parquet": b"PAR1"}

    class Files:
        def isfile(self, path):
            if "gated" in path:
                raise PermissionError("gated\nrepository")
            return path.removeprefix("hf://") in files

        def glob(self, pattern):
            return [path for path in files if path.startswith(pattern.removeprefix("hf://").removesuffix("**"))]

        def open(self, path, mode):
            return io.BytesIO(files[path.removeprefix("hf://")])

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Files)


def test_sampled_rows_come_from_the_hub(hub):
    assert is_sampled("hf://datasets/o/rows") and not is_sampled("hf://datasets/o/raw")
    assert list_parquet("hf://datasets/o/rows/") == [f"hf://datasets/o/rows/{name}.parquet" for name in "ab"]
    assert list_parquet("hf://datasets/o/rows/b.parquet") == ["hf://datasets/o/rows/b.parquet"]
    assert list(iter_sample_rows("hf://datasets/o/rows")) == [write_sample(sample())] * 2


def test_what_the_hub_refuses_is_a_shard_error(hub, monkeypatch):
    for call in (is_sampled, list_parquet):
        with pytest.raises(ShardError, match=r"cannot be listed \(gated repository\)"):
            call("hf://datasets/o/gated")
    with pytest.raises(ShardError, match="no Parquet shards"):
        list_parquet("hf://datasets/o/raw")
    with pytest.raises(ShardError, match=r"a\.parquet: not a readable Parquet file"):
        list(iter_sample_rows("hf://datasets/o/broken"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (is_sampled, list_parquet):
        with pytest.raises(MissingPackageError, match="pip install huggingface-hub"):
            call("hf://datasets/o/rows")


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        write_parquet([{"order_id": "x", "data": 3.5}], tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []
