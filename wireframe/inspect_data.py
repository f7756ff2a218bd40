"""What is in a data source, in words: the part of ``wireframe doctor DATA`` that looks at data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping

from wireframe.errors import MissingPackageError, ShardError, WireframeError, printable
from wireframe.member_names import MemberName
from wireframe.npy import read_npz
from wireframe.raw_rows import build_row
from wireframe.samples import is_sampled, list_parquet, open_parquet
from wireframe.scene import Scene, read_scene
from wireframe.shards import RawSample, iter_samples, list_shards

MAX_MEMBERS_SHOWN = 200


def describe_data(source: str | os.PathLike) -> str:
    """A report on the first sample of raw tars or of a Parquet file of sampled rows.

    For tars: every member with its size and the column it was recognised as, entries per column, usable views, dropped
    ones with their reasons, COLMAP points and ground truth. For Parquet: the columns, and the arrays of the first row.

    Args:
        source: as ``wireframe.shards.list_shards`` or, for sampled rows, ``wireframe.samples.list_parquet``.

    Raises:
        ShardError: nothing is there, or it cannot be read at all. A first scene that cannot be used is reported, not
            raised.
    """
    lines = _describe_parquet(list_parquet(source)) if is_sampled(source) else _describe_tars(source)
    # Names inside the source are a stranger's: they must not steer the terminal.
    return "\n".join(printable(line) for line in lines)


def _describe_tars(source: str | os.PathLike) -> list[str]:
    shards = list_shards(source)
    sample = next(iter_samples(shards[0]), None)
    if sample is None:
        raise ShardError(f"{shards[0]}: the tar holds no files")
    return [f"{os.fspath(source)}: {_plural(len(shards), 'tar')} of raw scenes", *_describe_sample(sample)]


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _describe_sample(sample: RawSample) -> list[str]:
    lines = [f"first sample: {sample.key or '(no member recognised)'} in {sample.shard}, "
             f"{_plural(len(sample.paths), 'member')}"]
    shown = list(zip(sample.paths, sample.members))[:MAX_MEMBERS_SHOWN]
    width = max(len(path) for path, _ in shown)
    for path, (name, data) in shown:
        lines.append(f"  {path:<{width}}  {len(data):>10} B  {_recognised(name)}")
    if len(sample.paths) > len(shown):
        lines.append(f"  ... and {len(sample.paths) - len(shown)} more")
    row = build_row(sample.key, sample.members)
    if row is None:
        return [*lines, "no member is a column of a raw scene; expected names such as KEY.ade.IMAGEID.png, KEY.K.npy, "
                "KEY.colmap.zip"]
    lines.append("members by column: " + _counts(sample))
    lines.append("entries per modality: " + _entries(row))
    try:
        return [*lines, *_describe_scene(read_scene(row))]
    except MissingPackageError:
        raise
    except WireframeError as error:
        return [*lines, f"not usable: {error}"]


def _recognised(name: MemberName) -> str:
    if name.column is None:
        return "not recognised"
    column = "whole sample" if name.column == "bundle" else name.column
    return column if name.image_id is None else f"{column}, view {name.image_id}"


def _counts(sample: RawSample) -> str:
    counts = Counter(name.column or "not recognised" for name, _ in sample.members)
    return ", ".join(f"{column} {count}" for column, count in sorted(counts.items()))


def _entries(row: Mapping) -> str:
    parts = [f"views {len(row['image_ids'])}"]
    for column in ("ade", "gestalt", "depth", "K", "R", "t"):
        parts.append(f"{column} {sum(entry is not None for entry in row[column])}")
    parts.append(f"pose_only_in_colmap {sum(bool(entry) for entry in row['pose_only_in_colmap'])}")
    return ", ".join(parts)


def _describe_scene(scene: Scene) -> list[str]:
    with_depth = sum(view.depth is not None for view in scene.views)
    lines = [f"usable views: {len(scene.views)}, {with_depth} of them with depth; dropped: {len(scene.dropped)}"]
    lines += [f"  view {view.image_id!r} dropped: {view.reason}" for view in scene.dropped]
    lines.append(f"COLMAP points: {len(scene.points)}")
    lines.append(f"ground truth: {len(scene.vertices)} vertices, {len(scene.edges)} edges")
    return lines


def _describe_parquet(files: list[str]) -> list[str]:
    with open_parquet(files[0]) as table:
        rows, schema = table.metadata.num_rows, table.schema_arrow
        batch = next(table.iter_batches(batch_size=1), None)
        first = batch.to_pylist()[0] if batch is not None and batch.num_rows else None
    lines = [f"{files[0]}: Parquet with {_plural(rows, 'row')}, the first of {_plural(len(files), 'file')}",
             "columns: " + ", ".join(f"{field.name} ({field.type})" for field in schema)]
    return lines + (_describe_row(first) if first is not None else ["no rows"])


def _describe_row(row: Mapping) -> list[str]:
    data = row.get("data")
    if not isinstance(data, bytes) or "order_id" not in row:
        return ["not sampled rows: expected the columns order_id and data"]
    lines = [f"first row: {row['order_id']}, {len(data)} B"]
    try:
        arrays = read_npz(data, f"row {row['order_id']}", ShardError)
    except ShardError as error:
        return [*lines, f"not usable: {error}"]
    width = max((len(name) for name in arrays), default=0)
    return lines + [f"  {name:<{width}}  {array.dtype!s:<8} {list(array.shape)}" for name, array in arrays.items()]
