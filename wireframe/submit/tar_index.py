"""Which scenes a tar of raw scenes holds, from its headers alone, and their members by position.

``shards.iter_rows`` reads a tar front to back and gives the scenes of a whole tar. What has to answer for every scene
that is named anywhere, before it has read one, needs their names first: here a plain tar is skipped through (some
milliseconds a scene), a gzipped one is unpacked in passing, and what is not a header is stepped over to the next one.
"""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from wireframe.errors import ShardError, one_line
from wireframe.member_names import MemberName, parse_name
from wireframe.raw_rows import MAX_TEXT_BYTES, build_row
from wireframe.shards import MAX_SAMPLE_BYTES, MAX_SAMPLE_MEMBERS
from wireframe.tarstream import BLOCK, MAX_MEMBER_BYTES, MAX_NAME_CHARACTERS

MAX_ID_CHARACTERS = 1024
# The members that may say another order_id than the key.
_NAMING = ("order_id", "bundle")
# gzip, zlib and tarfile let all of these out on damaged files.
_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError, OverflowError)


class IndexedMember(NamedTuple):
    """A member of a scene and where its bytes stand in the (unpacked) tar."""

    name: MemberName
    offset: int
    size: int


class IndexedScene(NamedTuple):
    """The consecutive members of one tar that share a key; ``problem`` says why they cannot be read, if so."""

    shard: str
    key: str
    order_id: str
    members: tuple[IndexedMember, ...]
    problem: str | None = None


class TarIndex(NamedTuple):
    """The scenes of a tar in order, also one that it breaks off in; ``problem`` names the first damage."""

    scenes: list[IndexedScene]
    problem: str | None


def index_tar(path: str) -> TarIndex:
    """The scenes of a tar; never raises for what is in it.

    Members are grouped as in ``shards.iter_rows``; ``order_id`` is what the row would have.

    Raises:
        ShardError: the file cannot be opened.
    """
    scenes: list[IndexedScene] = []
    damage: list[str] = []
    with open_tar(path) as file:
        for key, members, naming in _groups(_members(file, damage)):
            wanted = [member for member in members if member.size <= MAX_MEMBER_BYTES]
            problem = None
            if len(members) > MAX_SAMPLE_MEMBERS or sum(member.size for member in wanted) > MAX_SAMPLE_BYTES:
                problem = f"more than {MAX_SAMPLE_MEMBERS} members or {MAX_SAMPLE_BYTES} bytes"
                wanted = []
            scenes.append(IndexedScene(path, key, _order_id(key, naming), tuple(wanted), problem))
    return TarIndex(scenes, f"{path}: {damage[0]}" if damage else None)


def read_members(file: BinaryIO, scene: IndexedScene) -> list[tuple[MemberName, bytes]]:
    """The members of a scene as ``build_row`` takes them; those that the file ends before or inside are left out.

    Args:
        file: of ``open_tar``. From a gzipped tar, scenes are best read in their order.

    Raises:
        ShardError: the file cannot be read there.
    """
    found = []
    try:
        for member in scene.members:
            file.seek(member.offset)
            data = file.read(member.size)
            if len(data) == member.size:
                found.append((member.name, data))
    except _DAMAGE as problem:
        raise ShardError(f"{scene.shard}: cannot be read at scene {scene.key!r} ({one_line(problem)})") from None
    return found


@contextmanager
def open_tar(path: str) -> Iterator[BinaryIO]:
    """A tar, plain or gzipped, as a file of its unpacked bytes. Raises ShardError where it cannot be opened."""
    try:
        file = open(path, "rb")
    except OSError as problem:
        raise ShardError(f"{path}: cannot be opened ({problem.strerror})") from None
    with file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield gzip.GzipFile(fileobj=file, mode="rb") if packed else file


def _members(file: BinaryIO, damage: list[str]) -> Iterator[tuple[IndexedMember, bytes | None]]:
    """Every recognised regular file, as far as headers can be found, with its bytes where they name the scene.

    Appends what is wrong with the tar to ``damage``. Reads forwards only, but to judge damage: in a gzipped file every
    step back would unpack it again from its beginning.
    """
    position, reached = 0, ""
    try:
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True, encoding="utf-8", errors="replace") as tar:
            while (found := tar.next()) is not None:
                # tarfile keeps every header it has seen.
                tar.members.clear()
                if found.size < 0 or tar.offset <= position:
                    raise ValueError("a header with an impossible size")
                if found.offset > position and not damage and not _zeros_at(file, position):
                    damage.append(f"{found.offset - position} bytes after {reached!r} are no header")
                position, reached = tar.offset, found.name
                member = _recognised(found)
                if member is not None:
                    yield member, _naming_bytes(file, member)
        # gzip has an end of its own, which tarfile has read up to.
        if not damage and not isinstance(file, gzip.GzipFile) and not _zeros_at(file, position):
            damage.append(f"no closing block of zeros after {reached!r}" if reached else "not a tar")
    except _DAMAGE as problem:
        damage.append(f"{one_line(problem)}, after {reached!r}" if reached else one_line(problem))


def _zeros_at(file: BinaryIO, position: int) -> bool:
    file.seek(position)
    return file.read(BLOCK) == bytes(BLOCK)


def _recognised(found: tarfile.TarInfo) -> IndexedMember | None:
    if not found.isreg() or found.sparse is not None or len(found.name) > MAX_NAME_CHARACTERS:
        return None
    name = parse_name(found.name)
    return None if name.column is None else IndexedMember(name, found.offset_data, found.size)


def _naming_bytes(file: BinaryIO, member: IndexedMember) -> bytes | None:
    if member.name.column not in _NAMING or member.size > MAX_TEXT_BYTES:
        return None
    file.seek(member.offset)
    return file.read(member.size)


def _groups(
    members: Iterator[tuple[IndexedMember, bytes | None]],
) -> Iterator[tuple[str, list[IndexedMember], list[tuple[MemberName, bytes]]]]:
    """Consecutive members of one key, and those of them that name the scene."""
    key, group, naming = None, [], []
    for member, data in members:
        if member.name.key != key and group:
            yield key, group, naming
            group, naming = [], []
        key = member.name.key
        group.append(member)
        if data is not None:
            naming.append((member.name, data))
    if group:
        yield key, group, naming


def _order_id(key: str, naming: list[tuple[MemberName, bytes]]) -> str:
    if not naming:
        return key
    try:
        named = (build_row(key, naming) or {}).get("order_id")
    except Exception:
        # The scene will fail for the same reason; its key still names it.
        return key
    return named if isinstance(named, str) and 0 < len(named) <= MAX_ID_CHARACTERS else key
