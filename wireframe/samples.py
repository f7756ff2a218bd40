"""Sampled rows: ``{"order_id": str, "data": bytes}``, the data an .npz of a SampledScene, kept in Parquet shards.

Reads the published sampled datasets (local Parquet files or ``hf://`` paths) and writes shards that plain
``datasets.load_dataset("parquet", ...)`` opens.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from wireframe.classes import GESTALT_NAMES, POINT_CLASSES
from wireframe.errors import MissingPackageError, SampleError, ShardError, WireframeError, one_line
from wireframe.files import atomic_write
from wireframe.hub import hub_files, is_hub, list_hub
from wireframe.npy import read_npz
from wireframe.sampling import SampledScene
from wireframe.shards import EXTENSIONS

_PARQUET = ".parquet"

SPLITS = ("train", "validation", "test")
# Words of file and folder names that tell a split, as on the hub.
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip

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
# Inclusive bounds of the labels; -1 stands for none.
_BOUNDS = {
    "class_id": (0, len(POINT_CLASSES) - 1),
    "source": (0, 1),
    "visible_src": (0, 2),
    "visible_id": (-1, 255),
    "behind": (-1, len(GESTALT_NAMES) - 1),
}


def read_sample(row: Mapping) -> SampledScene:
    """One row of a sampled dataset.

    Args:
        row: mapping with ``order_id`` (str) and ``data`` (bytes of an .npz; never unpickled).

    Raises:
        SampleError: a column or array is missing, has another shape, a dtype whose values the stored one cannot hold,
            a label outside its table or a number that is not finite, or the scale is not positive.
    """
    if not isinstance(row, Mapping):
        raise SampleError(f"a sampled row must be a dict of columns, got a {type(row).__name__}")
    order_id, data = row.get("order_id"), row.get("data")
    if not isinstance(order_id, str) or not isinstance(data, (bytes, bytearray, memoryview)):
        raise SampleError("a sampled row needs the columns order_id (string) and data (bytes); is this a raw scene?")
    if not order_id.isprintable():
        raise SampleError(f"order_id {order_id[:100]!a} holds unprintable characters; leave this row out")
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
    cast = _cast(array, np.dtype(dtype))
    if cast is None:
        raise SampleError(f"sample {order_id}: {name} has dtype {array.dtype}, whose values are no {np.dtype(dtype)}")
    # After the cast: a float64 beyond float32 becomes infinite there.
    if cast.dtype.kind == "f" and not np.isfinite(cast).all():
        raise SampleError(f"sample {order_id}: {name} holds NaN or infinity; leave this row out")
    if name == "scale" and not cast > 0:
        raise SampleError(f"sample {order_id}: scale is {cast}, expected a positive number; leave this row out")
    low, high = _BOUNDS.get(name, (0, 0))
    if name in _BOUNDS and cast.size and not low <= cast.min() <= cast.max() <= high:
        raise SampleError(f"sample {order_id}: {name} runs from {cast.min()} to {cast.max()}, expected {low} to {high}")
    return cast


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """The array as ``dtype``; None where that is another kind of number or would change an integer."""
    if array.dtype.kind not in {"f": "f", "b": "b"}.get(dtype.kind, "iu"):
        return None
    if dtype.kind == "b":
        # Bytes other than 0 and 1 are truths too, and not every reader of a tensor takes them so.
        return array.view(np.uint8) != 0
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    return cast if dtype.kind == "f" or np.array_equal(cast, array) else None


def write_sample(sample: SampledScene) -> dict:
    """The row ``{"order_id", "data"}`` of a sampled scene; the same bytes for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **sample.arrays())
    return {"order_id": sample.order_id, "data": buffer.getvalue()}


def is_sampled(source: str | os.PathLike) -> bool:
    """Whether a source holds sampled rows (Parquet) rather than raw scenes (tars), by the names of its files.

    Args:
        source: a ``.parquet`` file, or a folder, glob or ``hf://`` path: with Parquet files in it and no tar.

    Raises:
        ShardError: the hub cannot list an ``hf://`` source.
        MissingPackageError: an ``hf://`` source without huggingface_hub.
    """
    source = os.fspath(source)
    if source.endswith((_PARQUET, *EXTENSIONS)):
        return source.endswith(_PARQUET)
    names = _list_files(source, (_PARQUET, *EXTENSIONS))
    return any(name.endswith(_PARQUET) for name in names) and not any(name.endswith(EXTENSIONS) for name in names)


def list_parquet(source: str | os.PathLike, split: str | None = None) -> list[str]:
    """Parquet shards of a file, folder (searched to any depth), glob or ``hf://`` path, sorted by name.

    Args:
        source: where the shards are.
        split: "train", "validation" or "test": only the shards whose name, or else a folder of theirs below the
            source, carries that word, as on the hub (``data/train-00000-of-00012.parquet``, ``train/0.parquet``).
            Where no shard carries the word of any split, all of them are "train". None: all shards.

    Raises:
        ShardError: nothing is there, no shard is of that split, or the hub cannot list it.
        MissingPackageError: an ``hf://`` source without huggingface_hub.
    """
    source = os.fspath(source)
    if split is not None and split not in SPLITS:
        raise ShardError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    found = sorted(_list_files(source, (_PARQUET,)))
    if not found:
        raise ShardError(f"no Parquet shards in {source!r}; make some with `wireframe prepare`")
    if split is None:
        return found
    splits = [_split_of(path, source) for path in found]
    if split == "train" and not any(splits):
        return found
    chosen = [path for path, its in zip(found, splits) if its == split]
    if not chosen:
        there = ", ".join(sorted({its or "no named split" for its in splits}))
        raise ShardError(f"no shard of the {split} split in {source!r} (there: {there}); "
                         f"their names say it: {split}-00000-of-00001.parquet or {split}/0.parquet")
    return chosen


def _split_of(path: str, source: str) -> str | None:
    """The split that a shard's name tells, or else the nearest folder below ``source`` that tells one."""
    for part in reversed(_below(path, source).split("/")):
        told = {_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLIT_WORDS}
        if len(told) == 1:
            return told.pop()
    return None


def _below(path: str, source: str) -> str:
    """The part of a shard's path below its source: below the folder, or the fixed folders of a glob."""
    if is_hub(source):
        # hf://datasets/OWNER/NAME@REVISION is no folder of the data set.
        folder = re.split(r"[*?\[]", source)[0].rpartition("/")[0] if re.search(r"[*?\[]", source) else source
        inside = path.removeprefix(folder) if path != source else os.path.basename(path)
        return inside if inside != path else "/".join(path.split("/")[5:])
    if os.path.isdir(source):
        return os.path.relpath(path, source)
    if os.path.exists(source):
        return os.path.basename(path)
    return os.path.relpath(path, os.path.dirname(re.split(r"[*?\[]", source)[0]) or ".")


def _list_files(source: str, extensions: tuple[str, ...]) -> list[str]:
    if is_hub(source):
        return list_hub(source, extensions)
    # A real path may hold the characters of a glob, so it comes first.
    if os.path.isdir(source):
        found = map(str, Path(source).rglob("*"))
    elif os.path.exists(source):
        return [source]
    else:
        found = glob.glob(source, recursive=True)
    return [path for path in found if path.endswith(extensions) and os.path.isfile(path)]


def iter_sample_rows(source: str | os.PathLike, batch_rows: int = 64, split: str | None = None) -> Iterator[dict]:
    """Rows ``{"order_id", "data"}`` of all shards of ``source``, or of those of ``split``, in order.

    Raises:
        ShardError: a file is not Parquet or lacks the two columns, or as ``list_parquet``.
    """
    for path in list_parquet(source, split):
        with open_sampled(path) as file:
            for batch in file.iter_batches(batch_rows, columns=["order_id", "data"]):
                yield from batch.to_pylist()


@contextlib.contextmanager
def open_sampled(path: str) -> Iterator[Any]:
    """``open_parquet`` of a shard of sampled rows.

    Raises:
        ShardError: as ``open_parquet``, or the columns of a sampled row are missing.
    """
    with open_parquet(path) as file:
        if not {"order_id", "data"} <= set(file.schema_arrow.names):
            raise ShardError(f"{path} lacks the columns order_id and data; point to sampled rows")
        yield file


@contextlib.contextmanager
def open_parquet(path: str) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetFile`` over a local or ``hf://`` path.

    Raises:
        ShardError: the file cannot be opened, or the ``with`` block meets unreadable bytes in it.
        MissingPackageError: pyarrow, or for the hub huggingface_hub, is not installed.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise MissingPackageError("reading Parquet needs pyarrow: pip install pyarrow") from None
    try:
        with hub_files().open(path, "rb") if is_hub(path) else open(path, "rb") as stream:
            yield ParquetFile(stream)
    except WireframeError:
        raise
    except Exception as error:  # Arrow and the hub's client raise many types of their own.
        raise ShardError(f"{path}: not a readable Parquet file ({one_line(error)}); fetch or write it again") from None


def write_parquet(rows: list[dict], path: str | os.PathLike) -> None:
    """Writes rows to one shard: complete under its name, or not there at all."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([("order_id", pyarrow.string()), ("data", pyarrow.binary())])
    with atomic_write(path) as file:
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(table, file, compression="zstd", row_group_size=256)
