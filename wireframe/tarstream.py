"""Reading a tar front to back from any binary file object, as data from outside: capped, never extracted.

Takes USTAR, PAX and GNU tars, plain or gzipped (POSIX.1-2001 ustar and pax formats; GNU tar's long names). Only
``read`` is called on the file object, so a pipe or a remote file will do.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from wireframe.errors import one_line

BLOCK = 512
MAX_MEMBER_BYTES = 256 << 20
MAX_HEADER_BYTES = 1 << 20
MAX_NAME_CHARACTERS = 1024
_SKIPPED = b"123456"


class TarMember(NamedTuple):
    """A regular file of a tar."""

    name: str
    data: bytes


class TarError(ValueError):
    """A tar cannot be read on; ``str(error)`` is one line without the name of the tar."""

    # The name of the member that broke off, where its header is whole.
    member: str | None = None


def iter_members(file: BinaryIO) -> Iterator[TarMember]:
    """The regular files of a tar in order; folders, links and devices are passed over.

    The tar must end with a block of zeros, as the format asks: without it, members may be lost.

    Raises:
        TarError: not a tar, truncated, a corrupt header, or a member above ``MAX_MEMBER_BYTES``.
    """
    read = _reader(file)
    first, long_name, pax, common = True, None, {}, {}
    while True:
        header = read(BLOCK)
        if not header and first:
            raise TarError("empty file, expected a tar")
        if header == bytes(BLOCK):
            return
        if len(header) < BLOCK:
            raise TarError("truncated: it ends without the closing block of zeros")
        kind, size, name = _parse_header(header, "not a tar" if first else "corrupt header")
        first = False
        if kind in b"LKxg":
            if size > MAX_HEADER_BYTES:
                raise TarError(f"an extended header of {size} bytes, above the cap of {MAX_HEADER_BYTES}")
            data = _payload(read, size)
            if kind == b"L":
                long_name = data.rstrip(b"\0").decode("utf-8", "replace")
            elif kind != b"K":
                (pax if kind == b"x" else common).update(_parse_pax(data))
            continue
        extended = {**common, **pax}
        name = extended.get("path", long_name if long_name is not None else name)
        size = _pax_size(extended, size)
        long_name, pax = None, {}
        if kind in _SKIPPED:
            # A hard link may announce the size of its target, but carries no data.
            continue
        yield from _member(read, kind, name, size)


def _member(read: Callable[[int], bytes], kind: bytes, name: str, size: int) -> Iterator[TarMember]:
    if len(name) > MAX_NAME_CHARACTERS:
        raise TarError(f"a member name of {len(name)} characters, above the cap of {MAX_NAME_CHARACTERS}")
    if size > MAX_MEMBER_BYTES:
        raise TarError(f"member {name!r} announces {size} bytes, above the cap of {MAX_MEMBER_BYTES}")
    try:
        data = _payload(read, size)
    except TarError as error:
        error.member = name
        raise
    if kind in b"07\0" and not name.endswith("/"):
        yield TarMember(name, data)
    elif kind == b"S":
        raise TarError(f"member {name!r} is a sparse file, which is not supported")


def _reader(file: BinaryIO) -> Callable[[int], bytes]:
    """A function read(n) that gives n bytes, or fewer at the end only."""
    start = _read_fully(file, 2)
    source = _Prefixed(start, file)
    if start == b"\x1f\x8b":
        source = gzip.GzipFile(fileobj=source, mode="rb")
    return lambda count: _read_fully(source, count)


def _read_fully(source: Any, count: int) -> bytes:
    parts, missing = [], count
    while missing > 0:
        try:
            part = source.read(min(missing, 1 << 24))
        except Exception as error:  # A damaged gzip stream or a remote file may raise anything.
            raise TarError(f"truncated or unreadable ({one_line(error)})") from None
        if not part:
            break
        if not isinstance(part, bytes):
            raise TarError(f"reading gave {type(part).__name__}, expected bytes: open the file in binary mode")
        parts.append(part)
        missing -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _Prefixed:
    """A readable object that gives ``start`` before what ``file`` gives."""

    def __init__(self, start: bytes, file: BinaryIO) -> None:
        self._start, self._file = start, file

    def read(self, count: int = -1) -> bytes:
        if not self._start:
            return self._file.read(count)
        part = self._start if count < 0 else self._start[:count]
        self._start = self._start[len(part):]
        return part + self._file.read() if count < 0 else part


def _payload(read: Callable[[int], bytes], size: int) -> bytes:
    padded = -(-size // BLOCK) * BLOCK
    data = read(padded)
    if len(data) < padded:
        raise TarError("truncated inside a member")
    return data[:size]


def _parse_header(header: bytes, problem: str) -> tuple[bytes, int, str]:
    blanked = header[:148] + b" " * 8 + header[156:]
    # Old tars summed signed bytes.
    signed = sum(blanked) - 256 * sum(byte > 127 for byte in blanked)
    if _number(header[148:156], problem) not in (sum(blanked), signed):
        raise TarError(f"{problem} (the header's checksum is wrong)")
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return header[156:157], _number(header[124:136], problem), name.decode("utf-8", "replace")


def _number(field: bytes, problem: str) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits.strip(b"01234567"):
        raise TarError(f"{problem} (a number field is not octal)")
    return int(digits or b"0", 8)


def _parse_pax(data: bytes) -> dict[str, str]:
    """The records ``length key=value\\n`` of a PAX header that matter here."""
    records, offset = {}, 0
    while offset < len(data):
        digits, space, _ = data[offset:offset + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        record = data[offset + len(digits) + 1:offset + length]
        key, equals, value = record.partition(b"=")
        if length <= len(digits) or offset + length > len(data) or not equals or not value.endswith(b"\n"):
            raise TarError("corrupt PAX header")
        if key in (b"path", b"size"):
            records[key.decode()] = value[:-1].decode("utf-8", "replace")
        offset += length
    return records


def _pax_size(extended: dict[str, str], size: int) -> int:
    value = extended.get("size")
    if value is None:
        return size
    if not (value.isascii() and value.isdigit() and len(value) < 20):
        raise TarError("corrupt PAX header")
    return int(value)
