"""ZIP members read in memory: nothing is extracted, and every size is capped first."""

from __future__ import annotations

import io
import zipfile
import zlib

from wireframe.errors import one_line

MAX_MEMBERS = 4096
MAX_MEMBER_BYTES = 256 << 20
MAX_RATIO = 200
# Below this size a member may be compressed as far as DEFLATE goes.
RATIO_FREE_BYTES = 1 << 20


class ArchiveError(ValueError):
    """A ZIP cannot be read; ``str(error)`` is one line without the name of the scene."""


def open_zip(data: bytes, max_members: int = MAX_MEMBERS) -> tuple[zipfile.ZipFile, list[zipfile.ZipInfo]]:
    """A ZIP over ``data`` and its file members.

    Raises:
        ArchiveError: not a ZIP, above ``max_members``, or with two members of one name.
    """
    # Counted in the bytes, so that a long directory is refused before it is parsed.
    if data.count(b"PK\x01\x02") > max_members:
        raise ArchiveError(f"ZIP with more than {max_members} members")
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except Exception as error:  # zipfile lets struct, Unicode and offset errors out on hostile directories.
        raise ArchiveError(f"not a readable ZIP ({one_line(error)})") from None
    # Not is_dir(), which fails on a member without a name.
    infos = [info for info in archive.infolist() if not info.filename.endswith("/")]
    if len(infos) > max_members:
        raise ArchiveError(f"ZIP with more than {max_members} members")
    names = [info.filename for info in infos]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArchiveError(f"ZIP with two members named {twice!r}")
    return archive, infos


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, max_bytes: int = MAX_MEMBER_BYTES,
                max_ratio: float = MAX_RATIO) -> bytes:
    """The bytes of one member.

    Raises:
        ArchiveError: encrypted, compressed other than by DEFLATE, announced or found larger than ``max_bytes``,
            compressed more than ``max_ratio`` (above ``RATIO_FREE_BYTES``), or corrupt.
    """
    name = info.filename
    if info.flag_bits & 0x1:
        raise ArchiveError(f"ZIP member {name!r} is encrypted")
    # The other methods expand a whole input block at once, whatever size is asked for.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveError(f"ZIP member {name!r} is not stored or deflated")
    if info.file_size > max_bytes:
        raise ArchiveError(f"ZIP member {name!r} announces {info.file_size} bytes, above the cap of {max_bytes}")
    if info.file_size > max(RATIO_FREE_BYTES, max_ratio * info.compress_size):
        raise ArchiveError(f"ZIP member {name!r} is compressed more than {max_ratio:g} times")
    try:
        with archive.open(info) as stream:
            data = stream.read(max_bytes + 1)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
        raise ArchiveError(f"ZIP member {name!r} is corrupt ({one_line(error)})") from None
    if len(data) != info.file_size:
        raise ArchiveError(f"ZIP member {name!r} holds {len(data)} bytes and announces {info.file_size}")
    return data
