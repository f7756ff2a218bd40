import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenes import random_scene
from wireframe.errors import SampleError, ShardError
from wireframe.fusion import fuse_views
from wireframe.samples import iter_sample_rows, list_parquet, read_sample, write_parquet, write_sample
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
        ({"source": np.array(["a"] * 32)}, "dtype"),
    ],
)
def test_bad_arrays_are_named(arrays, message):
    with pytest.raises(SampleError, match=message):
        read_sample(row_with(**arrays))


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


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    with pytest.raises((TypeError, ValueError)):
        write_parquet([{"order_id": "x", "data": 3.5}], tmp_path / "a.parquet")
    assert list(tmp_path.iterdir()) == []
