"""Tars of raw scenes, local or on the Hugging Face hub, read front to back into raw rows.

Nothing is extracted to disk and no pickle is loaded. ``datasets`` cannot read these tars when view counts differ;
this reader keeps every view of every scene.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from wireframe.errors import MissingPackageError, ShardError, one_line
from wireframe.hub import hub_files, is_hub, list_hub
from wireframe.member_names import MemberName, parse_name
from wireframe.raw_rows import build_row
from wireframe.shard_writer import ShardWriter
from wireframe.tarstream import TarError, iter_members

__all__ = ["RawSample", "ShardWriter", "iter_rows", "iter_samples", "list_shards"]

EXTENSIONS = (".tar", ".tar.gz", ".tgz")
MAX_SAMPLE_MEMBERS = 8192
MAX_SAMPLE_BYTES = 1 << 30
HUB_BLOCK_BYTES = 32 << 20


class RawSample(NamedTuple):
    """Consecutive members of one tar that share a key, and the members between them that are not recognised."""

    shard: str
    key: str
    paths: list[str]
    members: list[tuple[MemberName, bytes]]


def list_shards(source: str | os.PathLike) -> list[str]:
    """The tars of a source, sorted by path.

    Args:
        source: a tar (``.tar``, ``.tar.gz``, ``.tgz``), a folder (searched to any depth), a glob, or one of these on
            the hub as ``hf://datasets/OWNER/NAME/...``.

    Raises:
        ShardError: there is no such file, or no tar in it.
        MissingPackageError: an ``hf://`` source without huggingface_hub.
    """
    source = os.fspath(source)
    if is_hub(source):
        found = list_hub(source, EXTENSIONS)
    elif os.path.isdir(source):
        found = [str(path) for path in Path(source).rglob("*") if path.name.endswith(EXTENSIONS) and path.is_file()]
    elif os.path.exists(source):
        return [source]
    else:
        found = [path for path in glob.glob(source, recursive=True) if os.path.isfile(path)]
    if not found:
        raise ShardError(f"no tar at {source!r}: expected a .tar, a folder of them, a glob or an hf:// path")
    return sorted(found)


def iter_rows(source: str | os.PathLike | BinaryIO, limit: int | None = None) -> Iterator[dict]:
    """Raw rows of a source, in the order of ``list_shards`` and of each tar.

    Each row has the columns of ``wireframe.scene``: ``order_id``, lists with one entry per view (``image_ids``,
    ``ade``, ``depth``, ``gestalt``: PIL images that decode on first use, or None; ``K``, ``R`` float32 [3, 3], ``t``
    float32 [3]; ``pose_only_in_colmap``), ``wf_vertices``, ``wf_edges``, ``wf_classifications`` (arrays or None) and
    ``colmap`` (bytes or None). Member names are read as ``member_names.parse_name`` says. A row with an undecodable
    member is yielded all the same; ``read_scene`` refuses it, or drops the view.

    Args:
        source: as ``list_shards``, or a binary file object that holds one tar.
        limit: stop after so many rows.

    Raises:
        ShardError: after all complete samples of all shards have been yielded, where a shard is truncated, corrupt
            or unreadable; it names the first such shard, the last good key in it, and the other such shards. The
            sample that a shard breaks off in is not yielded. Also where the source has members and none of them is
            recognised.
    """
    count, strange = 0, None
    if limit is not None and limit <= 0:
        return
    for sample in iter_samples(source):
        row = build_row(sample.key, sample.members)
        if row is None:
            strange = strange or sample
            continue
        yield row
        count += 1
        if count == limit:
            return
    if count == 0 and strange is not None:
        raise ShardError(f"{strange.shard}: no member is a column of a raw scene (the first is {strange.paths[0]!r}); "
                         "`wireframe doctor` lists what is recognised")


def iter_samples(source: str | os.PathLike | BinaryIO) -> Iterator[RawSample]:
    """The samples of a source, undecoded; arguments and errors as in ``iter_rows``."""
    if hasattr(source, "read"):
        yield from _samples_of_file(source, str(getattr(source, "name", "<file object>")))
        return
    broken: list[tuple[str, ShardError]] = []
    for shard in list_shards(source):
        try:
            with _open(shard) as file:
                yield from _samples_of_file(file, shard)
        except ShardError as error:
            broken.append((shard, error))
    if broken:
        (_, first), *others = broken
        more = ", ".join(os.path.basename(shard) for shard, _ in others[:8]) + (", ..." if len(others) > 8 else "")
        raise ShardError(f"{first}; {len(others)} more broke off: {more}") if others else first


def _open(shard: str) -> Any:
    try:
        if is_hub(shard):
            return hub_files().open(shard, "rb", block_size=HUB_BLOCK_BYTES)
        return open(shard, "rb")
    except MissingPackageError:
        raise
    except Exception as error:  # The hub's client raises HTTP errors of several packages.
        raise ShardError(f"{shard}: cannot be opened ({one_line(error)})") from None


def _samples_of_file(file: BinaryIO, shard: str) -> Iterator[RawSample]:
    key, paths, members, size, last = None, [], [], 0, None
    try:
        for path, data in iter_members(file):
            name = parse_name(path)
            if name.column is not None and name.key != key:
                if key is not None:
                    yield RawSample(shard, key, paths, members)
                    paths, members, size, last = [], [], 0, key
                key = name.key
            size += len(data)
            paths.append(path)
            members.append((name, data))
            if len(paths) > MAX_SAMPLE_MEMBERS or size > MAX_SAMPLE_BYTES:
                raise TarError(f"sample {key!r} has more than {MAX_SAMPLE_MEMBERS} members or {MAX_SAMPLE_BYTES} bytes")
    except TarError as error:
        broken = parse_name(error.member or "")
        if key is not None and broken.column is not None and broken.key != key:
            # The next sample had begun, so this one is whole.
            yield RawSample(shard, key, paths, members)
            last = key
        after = "before its first sample was complete" if last is None else f"after sample {last!r}"
        raise ShardError(f"{shard}: {error}, {after}; fetch or write it again") from None
    if paths:
        yield RawSample(shard, key or "", paths, members)
