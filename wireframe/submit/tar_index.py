"""Which scenes a tar of raw scenes holds, from its headers alone, and their members by position.

What has to answer for every scene that is named anywhere, before it has read one, needs their names first: a plain tar
is skipped through, a gzipped one is unpacked in passing, and what is no header is stepped over to the next one.
"""

from __future__ import annotations

import gzip
import io
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import BinaryIO, NamedTuple

from wireframe.errors import ShardError, one_line
from wireframe.member_names import MemberName, parse_name
from wireframe.raw_rows import build_row
from wireframe.shards import MAX_SAMPLE_BYTES, MAX_SAMPLE_MEMBERS
from wireframe.tarstream import MAX_MEMBER_BYTES, MAX_NAME_CHARACTERS, TarBytes, TarHeader, headers

MAX_ID_CHARACTERS = 1024
# Of a member that may say another order_id than the key; archives are never opened for it.
MAX_NAMING_BYTES = 1 << 20
# Of one tar: far more than one of the challenge has, few enough to be held.
MAX_MEMBERS = 500_000

# A member's name in parts, its header, and its bytes where they may name the scene.
_Member = tuple[MemberName, TarHeader, "bytes | None"]


class IndexedScene(NamedTuple):
    """The consecutive members of one tar that share a key.

    members: (name, offset, size) of each, its bytes as they stand in the unpacked tar; problem: why the scene cannot be
    read, if so. All of it can be written as JSON.
    """

    shard: str
    key: str
    order_id: str
    members: list[tuple[str, int, int]]
    problem: str | None


def index_tar(path: str, damage: list[str], until: float = math.inf) -> Iterator[IndexedScene]:
    """The scenes of a tar in order, one by one, also one that it breaks off in; never raises for what is in it.

    Members are grouped as in ``shards.iter_rows``. ``order_id`` is what the row would have, but where only an archive
    or a member above ``MAX_NAMING_BYTES`` says it: then it is the key.

    Args:
        damage: gets one line where the tar cannot be read as a whole, on what was wrong first.
        until: of ``time.monotonic``; the tar ends there.
    """
    for key, group in groupby(_members(path, damage, until), lambda member: member[0].key):
        yield _scene(path, key, group)


def read_members(file: BinaryIO, scene: IndexedScene) -> list[tuple[MemberName, bytes]]:
    """The members of a scene as ``build_row`` takes them; those that the file ends before or inside are left out.

    Args:
        file: of ``open_tar``. From a gzipped tar, scenes are best read in their order.

    Raises:
        ShardError: the file cannot be read there, or holds no member as a whole.
    """
    found = []
    try:
        for name, offset, size in scene.members:
            file.seek(offset)
            data = file.read(size)
            if len(data) == size:
                found.append((parse_name(name), data))
    except Exception as problem:  # gzip and zlib let many types out on damaged files.
        raise ShardError(f"{scene.shard}: cannot be read at scene {scene.key!r} ({one_line(problem)})") from None
    if not found:
        raise ShardError(f"{scene.shard}: no member of scene {scene.key!r} is whole")
    return found


@contextmanager
def open_tar(path: str, until: float = math.inf) -> Iterator[BinaryIO]:
    """A tar, plain or gzipped, as a file of its unpacked bytes, until a moment. Raises ShardError."""
    try:
        file = io.BufferedReader(_Timed(path, until))
    except OSError as problem:
        raise ShardError(f"cannot be opened ({problem.strerror})") from None
    with file:
        yield gzip.GzipFile(fileobj=file, mode="rb") if file.peek(2)[:2] == b"\x1f\x8b" else file


class _Timed(io.FileIO):
    """A file that cannot be read any more after a moment: unpacked, a small one may be without end."""

    def __init__(self, path: str, until: float) -> None:
        super().__init__(path)
        self._until = until

    def readinto(self, buffer) -> int | None:
        if time.monotonic() > self._until:
            raise TimeoutError("no time was left to read on")
        return super().readinto(buffer)


def _members(path: str, damage: list[str], until: float) -> Iterator[_Member]:
    """Every recognised regular file, as far as headers can be found."""
    last, whole = "", True

    def note(problem: object) -> None:
        nonlocal whole
        if whole:
            damage.append(f"{path}: {one_line(problem)}" + (f", after {last!r}" if last else ""))
        whole = False

    try:
        with open_tar(path, until) as file:
            tar = TarBytes(file, file.seek)
            for count, header in enumerate(headers(tar, damaged=note)):
                if count == MAX_MEMBERS:
                    raise ShardError(f"more than {MAX_MEMBERS} members")
                last = header.name[:MAX_NAME_CHARACTERS]
                if not header.is_file or last != header.name:
                    continue
                name = parse_name(last)
                naming = name.column == "order_id" or (name.column, name.extension) == ("bundle", "json")
                if name.column is not None:
                    yield name, header, tar.read(header.size) if naming and header.size <= MAX_NAMING_BYTES else None
    except Exception as problem:  # Whatever a hostile file brings about is damage of this tar alone.
        note(problem)


def _scene(path: str, key: str, group: Iterable[_Member]) -> IndexedScene:
    members, naming, count, size, problem = [], {}, 0, 0, None
    for name, header, data in group:
        count += 1
        if data is not None and not data.startswith(b"PK"):
            # The later counts, as in any tar.
            naming[name.column] = name, data
        if header.size <= MAX_MEMBER_BYTES and count <= MAX_SAMPLE_MEMBERS:
            size += header.size
            members.append((header.name, header.offset, header.size))
    if count > MAX_SAMPLE_MEMBERS or size > MAX_SAMPLE_BYTES:
        members, problem = [], f"more than {MAX_SAMPLE_MEMBERS} members or {MAX_SAMPLE_BYTES} bytes"
    try:
        order_id = (build_row(key, list(naming.values())) or {}).get("order_id")
    except Exception:
        # The scene will fail for the same reason; its key still names it.
        order_id = None
    named = isinstance(order_id, str) and 0 < len(order_id) <= MAX_ID_CHARACTERS
    return IndexedScene(path, key, order_id if named else key, members, problem)
