"""Sampled rows: ``{"order_id": str, "data": bytes}``, the data an .npz of a SampledScene, kept in Parquet shards.

Reads the published sampled datasets (local Parquet files or ``hf://`` paths) and writes shards that plain
``datasets.load_dataset("parquet", ...)`` opens.
"""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from wireframe.errors import SampleError, ShardError
from wireframe.files import atomic_write
from wireframe.npy import read_npz
from wireframe.sampling import SampledScene

# name -> (dtype, shape); T points, E edges, V vertices. Ground truth may be absent (a test scene).
_POINT_ARRAYS = {
    "xyz_norm": (np.float32, ("T", 3)),
    "class_id": (np.uint8, ("T",)),
    "source": (np.uint8, ("T",)),
    "mask": (np.bool_, ("T",)),
    "visible_src": (np.uint8, ("T",)),
    "visible_id": (np.int16, ("T",)),
    "behind": (np.int16, ("T",)),
    "n_views_voted": (np.uint8, ("T",)),
    "vote_frac": (np.float32, ("T",)),
    "scale": (np.float32, ()),
    "center": (np.float32, (3,)),
}
_TRUTH_ARRAYS = {
    "gt_segments": (np.float32, ("E", 2, 3)),
    "gt_vertices": (np.float32, ("V", 3)),
    "gt_edges": (np.int32, ("E", 2)),
    "gt_edge_classes": (np.int64, ("E",)),
}


def read_sample(row: Mapping) -> SampledScene:
    """One row of a sampled dataset.

    Args:
        row: mapping with ``order_id`` (str) and ``data`` (bytes of an .npz; never unpickled).

    Raises:
        SampleError: a column or array is missing, has another dtype kind or shape, or is not finite.
    """
    order_id, data = row.get("order_id"), row.get("data")
    if not isinstance(order_id, str) or not isinstance(data, (bytes, bytearray, memoryview)):
        raise SampleError("a sampled row needs the columns order_id (string) and data (bytes); is this a raw scene?")
    arrays = read_npz(bytes(data), f"sample {order_id}", SampleError)
    missing = [name for name in _POINT_ARRAYS if name not in arrays]
    if missing:
        raise SampleError(f"sample {order_id} lacks the arrays {', '.join(missing)}; was it written by prepare?")
    sizes: dict[str, int] = {}
    fields = {name: _checked(order_id, name, arrays[name], spec, sizes) for name, spec in _POINT_ARRAYS.items()}
    for name, (dtype, shape) in _TRUTH_ARRAYS.items():
        if name in arrays:
            fields[name] = _checked(order_id, name, arrays[name], (dtype, shape), sizes)
    for name, (dtype, shape) in _TRUTH_ARRAYS.items():
        empty = tuple(sizes.get(side, 0) if side == "E" else 0 if side == "V" else side for side in shape)
        fields.setdefault(name, np.zeros(empty, dtype=dtype))
    edges = fields["gt_edges"]
    if edges.size and (edges.min() < 0 or edges.max() >= len(fields["gt_vertices"])):
        raise SampleError(f"sample {order_id}: gt_edges point outside gt_vertices; leave this row out")
    return SampledScene(order_id=order_id, **fields)


def _checked(order_id: str, name: str, array: np.ndarray, spec: tuple, sizes: dict[str, int]) -> np.ndarray:
    dtype, shape = spec
    if name == "scale":
        array = array.reshape(array.shape if array.size != 1 else ())
    fits = array.ndim == len(shape) and all(
        size == (sizes.setdefault(side, size) if isinstance(side, str) else side)
        for size, side in zip(array.shape, shape)
    )
    if not fits:
        raise SampleError(f"sample {order_id}: {name} has shape {list(array.shape)}, expected {list(shape)}")
    if array.dtype.kind not in "biuf":
        raise SampleError(f"sample {order_id}: {name} has dtype {array.dtype}, expected {np.dtype(dtype)}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise SampleError(f"sample {order_id}: {name} holds NaN or infinity; leave this row out")
    return array.astype(dtype)


def write_sample(sample: SampledScene) -> dict:
    """The row ``{"order_id", "data"}`` of a sampled scene; the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **sample.arrays())
    return {"order_id": sample.order_id, "data": buffer.getvalue()}


def list_parquet(source: str | os.PathLike) -> list[str]:
    """Parquet shards of a file, folder, glob or ``hf://`` path, sorted by name.

    Raises:
        ShardError: nothing is there.
    """
    source = os.fspath(source)
    if source.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        pattern = source if source.endswith(".parquet") else source.rstrip("/") + "/**/*.parquet"
        found = ["hf://" + path for path in HfFileSystem().glob(pattern)]
    elif Path(source).is_dir():
        found = [str(path) for path in Path(source).rglob("*.parquet")]
    else:
        found = glob.glob(source)
    if not found:
        raise ShardError(f"no Parquet shards in {source}; make some with `wireframe prepare`")
    return sorted(found)


def iter_sample_rows(source: str | os.PathLike, batch_rows: int = 64) -> Iterator[dict]:
    """Rows ``{"order_id", "data"}`` of all shards of ``source``, in order.

    Raises:
        ShardError: a file is not Parquet or lacks the two columns.
    """
    for path in list_parquet(source):
        yield from _rows_of(path, batch_rows)


def _rows_of(path: str, batch_rows: int) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    filesystem = None
    if path.startswith("hf://"):
        from huggingface_hub import HfFileSystem

        filesystem, path = HfFileSystem(), path.removeprefix("hf://")
    try:
        with pyarrow.parquet.ParquetFile(path, filesystem=filesystem) as file:
            for batch in file.iter_batches(batch_rows, columns=["order_id", "data"]):
                if batch.num_columns != 2:
                    raise ShardError(f"{path} lacks the columns order_id and data; point to sampled rows")
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as problem:
        raise ShardError(f"{path} cannot be read as Parquet: {str(problem).splitlines()[0]}") from None


def write_parquet(rows: list[dict], path: str | os.PathLike) -> None:
    """Writes rows to one shard: complete under its name, or not there at all."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("order_id", pyarrow.string()), ("data", pyarrow.binary())])
    with atomic_write(path) as file:
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(table, file, compression="zstd", row_group_size=256)
