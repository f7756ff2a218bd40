"""Reading .npy and .npz bytes from outside: no pickle, and no allocation that the bytes do not cover."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable

import numpy as np

from wireframe.archives import ArchiveError, open_zip, read_member
from wireframe.errors import one_line

MAX_ARRAYS = 64
MAX_ARRAY_BYTES = 256 << 20
MAX_HEADER_BYTES = 10_000


def read_npy(data: bytes, name: str, error: Callable[[str], Exception] = ValueError) -> np.ndarray:
    """The array in the bytes of an .npy file (a copy).

    Args:
        data: the file's bytes.
        name: what to call it in an error.
        error: the type of error to raise.

    Raises:
        error: an object or structured dtype, a broken header, or another size than the header announces.
    """
    try:
        offset = _header_bytes(data)
        shape, fortran, dtype = _parse_header(data[:offset])
    except Exception as problem:  # The header is Python text: its parser lets many exception types out.
        raise error(f"{name} is not a .npy array ({one_line(problem)})") from None
    if dtype.kind not in "biufUS" or dtype.itemsize == 0:
        raise error(f"{name} is a .npy array of dtype {one_line(dtype)}, expected plain numbers or text")
    if len(shape) > 8 or any(not 0 <= side < 1 << 40 for side in shape):
        raise error(f"{name} is a .npy array of impossible shape {one_line(shape)}")
    # Python integers do not overflow, whatever shape the header claims.
    count = math.prod(shape)
    if count * dtype.itemsize != len(data) - offset:
        raise error(f"{name} announces {count * dtype.itemsize} bytes and holds {len(data) - offset}")
    try:
        flat = np.frombuffer(data, dtype=dtype, count=count, offset=offset) if count else np.zeros(0, dtype=dtype)
        return flat.reshape(shape, order="F" if fortran else "C").copy()
    except ValueError as problem:
        raise error(f"{name} is a .npy array of impossible shape ({one_line(problem)})") from None


def _header_bytes(data: bytes) -> int:
    """Where the numbers of a .npy file begin, as its first bytes say."""
    width = 2 if data[6:7] == b"\x01" else 4
    end = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if end > min(len(data), 8 + width + MAX_HEADER_BYTES):
        raise ValueError("its header is cut or too long")
    return end


@functools.lru_cache(maxsize=256)
def _parse_header(header: bytes) -> tuple[tuple, bool, np.dtype]:
    """(shape, fortran order, dtype); rows of one set share their headers, and parsing one costs most of a read."""
    stream = io.BytesIO(header)
    version = np.lib.format.read_magic(stream)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    return reader(stream, max_header_size=MAX_HEADER_BYTES)


def read_npz(data: bytes, name: str, error: Callable[[str], Exception] = ValueError) -> dict[str, np.ndarray]:
    """The arrays in the bytes of an .npz file, by name.

    Raises:
        error: not a ZIP, more than ``MAX_ARRAYS`` members, a member above ``MAX_ARRAY_BYTES``, or a broken array.
    """
    arrays = {}
    try:
        archive, members = open_zip(data, MAX_ARRAYS)
        for member in members:
            stem = member.filename.removesuffix(".npy")
            data = read_member(archive, member, MAX_ARRAY_BYTES)
            arrays[stem] = read_npy(data, f"{name}: array {one_line(stem)}", error)
    except ArchiveError as problem:
        raise error(f"{name}: {problem}") from None
    return arrays
