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
_EXTENDED = b"LKxg"
# Links, devices and folders. A hard link may announce the size of its target, but carries no data.
_WITHOUT_DATA = b"123456"
_SKIP_BYTES = 1 << 20


class TarMember(NamedTuple):
    """A regular file of a tar."""

    name: str
    data: bytes


class TarHeader(NamedTuple):
    """What is there of a member: its name, the type flag, and where in the unpacked tar its data stand, in bytes."""

    name: str
    kind: bytes
    offset: int
    size: int

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file, which has its bytes as they are."""
        return self.kind in b"07\0" and not self.name.endswith("/")


class TarError(ValueError):
    """A tar cannot be read on; ``str(error)`` is one line without the name of the tar."""

    # The name of the member that broke off, where its header is whole.
    member: str | None = None


class TarBytes:
    """The unpacked bytes of a tar, forwards; ``position`` is that of the next one.

    Args:
        file: ``read`` gives bytes that are unpacked already, as ``unpacked`` does.
        seek: goes to a position, where the file can; without it what is stepped over is read.
    """

    def __init__(self, file: Any, seek: Callable[[int], Any] | None = None) -> None:
        self.position = 0
        self._file, self._seek = file, seek

    def read(self, count: int) -> bytes:
        """So many bytes, or fewer at the end only. Raises TarError."""
        data = _read_fully(self._file, count)
        self.position += len(data)
        return data

    def skip_to(self, position: int) -> None:
        """Goes on to a position; behind the end there is nothing to read. Raises TarError."""
        if self._seek is not None and position > self.position:
            try:
                self._seek(position)
            except Exception as error:
                raise TarError(f"truncated or unreadable ({one_line(error)})") from None
            self.position = position
        while self.position < position and self.read(min(position - self.position, _SKIP_BYTES)):
            pass


def iter_members(file: BinaryIO) -> Iterator[TarMember]:
    """The regular files of a tar in order; folders, links and devices are passed over.

    The tar must end with a block of zeros, as the format asks: without it, members may be lost.

    Raises:
        TarError: not a tar, truncated, a corrupt header, or a member above ``MAX_MEMBER_BYTES``.
    """
    tar = TarBytes(unpacked(file))
    for header in headers(tar):
        if header.kind in _WITHOUT_DATA:
            continue
        name = header.name
        if len(name) > MAX_NAME_CHARACTERS:
            raise TarError(f"a member name of {len(name)} characters, above the cap of {MAX_NAME_CHARACTERS}")
        if header.size > MAX_MEMBER_BYTES:
            raise TarError(_too_large(header))
        if header.kind == b"S":
            raise TarError(f"member {name!r} is a sparse file, which is not supported")
        try:
            data = _payload(tar, header.size)
        except TarError as error:
            error.member = name
            raise
        if header.is_file:
            yield TarMember(name, data)


def headers(tar: TarBytes, damaged: Callable[[str], None] | None = None) -> Iterator[TarHeader]:
    """The headers of a tar's members in order; what they announce is the caller's to judge.

    At each of them ``tar`` stands where the member's data begin: the caller may read them, the rest is stepped over.

    Args:
        damaged: told what is wrong with a tar, which is then read on at the next block that is a header, be it inside
            a member above ``MAX_MEMBER_BYTES`` or behind the zeros that close a tar. None: the first damage raises, the
            zeros end it.

    Raises:
        TarError: the tar cannot be read; without ``damaged`` also: not a tar, truncated, a corrupt header, a member
            above ``MAX_MEMBER_BYTES``.
    """

    def report(problem: TarError) -> None:
        if damaged is None:
            raise problem
        damaged(str(problem))

    extended, closed = _Extended(), False
    while len(block := tar.read(BLOCK)) == BLOCK:
        if block == bytes(BLOCK):
            if damaged is None:
                return
            closed = True
            continue
        closed = False
        try:
            found = _next_header(tar, block, extended)
        except TarError as problem:
            report(problem)
            # It spoke of a member that is lost, not of the next one that is found.
            extended = _Extended()
            continue
        if found is None:
            continue
        yield found
        if found.size > MAX_MEMBER_BYTES:
            report(TarError(_too_large(found)))
        else:
            tar.skip_to(found.offset + _padded(found.size))
    if tar.position == 0:
        report(TarError("empty file, expected a tar"))
    elif block or not closed:
        report(TarError("truncated: it ends without the closing block of zeros"))


def _too_large(header: TarHeader) -> str:
    return f"member {header.name!r} announces {header.size} bytes, above the cap of {MAX_MEMBER_BYTES}"


def _next_header(tar: TarBytes, block: bytes, extended: _Extended) -> TarHeader | None:
    """The member that a block announces; None for an extended header, which speaks of the next one."""
    kind, size, name = _parse_header(block, "not a tar" if tar.position == BLOCK else "corrupt header")
    if kind in _EXTENDED:
        if size > MAX_HEADER_BYTES:
            raise TarError(f"an extended header of {size} bytes, above the cap of {MAX_HEADER_BYTES}")
        extended.take(kind, _payload(tar, size))
        return None
    name, size = extended.applied(name, size)
    return TarHeader(name, kind, tar.position, 0 if kind in _WITHOUT_DATA else size)


class _Extended:
    """What extended headers say of the next member, and PAX's global ones of all that follow."""

    def __init__(self) -> None:
        self._common: dict[str, str] = {}
        self._next: dict[str, str] = {}
        self._long_name: str | None = None

    def take(self, kind: bytes, data: bytes) -> None:
        if kind == b"L":
            self._long_name = data.rstrip(b"\0").decode("utf-8", "replace")
        elif kind != b"K":
            (self._next if kind == b"x" else self._common).update(_parse_pax(data))

    def applied(self, name: str, size: int) -> tuple[str, int]:
        """Name and size of the next member, whose own header says these."""
        said, long_name = {**self._common, **self._next}, self._long_name
        self._next, self._long_name = {}, None
        return said.get("path", name if long_name is None else long_name), _pax_size(said, size)


def unpacked(file: BinaryIO) -> Any:
    """A tar, plain or gzipped, as an object whose ``read`` gives its unpacked bytes."""
    start = _read_fully(file, 2)
    source = _Prefixed(start, file)
    return gzip.GzipFile(fileobj=source, mode="rb") if start == b"\x1f\x8b" else source


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


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _payload(tar: TarBytes, size: int) -> bytes:
    data = tar.read(_padded(size))
    if len(data) < _padded(size):
        raise TarError("truncated inside a member")
    return data[:size]


def _parse_header(header: bytes, problem: str) -> tuple[bytes, int, str]:
    total = _number(header[148:156], problem)
    blanked = header[:148] + b" " * 8 + header[156:]
    # Old tars summed signed bytes.
    if total != sum(blanked) and total != sum(memoryview(blanked).cast("b")):
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
