"""Writing raw scenes into a tar that ``wireframe.shards`` reads: deterministic bytes, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from wireframe.errors import MissingPackageError, ShardError, one_line
from wireframe.files import atomic_write
from wireframe.images import ImageError, depth_millimetres, encode_png, label_rgb
from wireframe.scene import is_true, read_ground_truth

_MAGIC = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"RIFF", "webp"))


class ShardWriter:
    """Writes raw rows to a tar file. Used as a context manager.

    The same rows give the same bytes (given one Pillow): members have mtime, uid and gid 0 and a fixed order. The file
    appears under its name only when the ``with`` block ends without an exception; otherwise nothing is left behind.

    Args:
        path: the tar to write, ``*.tar``; an existing one is replaced. Its folder must exist.

    Raises:
        ShardError: the folder does not exist, or a row cannot be written (see ``write``).
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self._path = Path(path)
        self._context = _open_tar(self._path)
        self._tar: tarfile.TarFile | None = None
        self._written: set[str] = set()
        self._failed = False

    def __enter__(self) -> ShardWriter:
        try:
            self._tar = self._context.__enter__()
        except OSError as error:
            raise ShardError(f"cannot write {self._path}: {error.strerror}") from None
        return self

    def write(self, row: Mapping) -> None:
        """Append one raw row (the columns of ``wireframe.scene``).

        Label maps and depth may be PIL images, arrays, or encoded PNG, JPEG or WebP bytes, which are kept as they are.
        A depth of None or without any pixel is left out, as are label maps and ground truth of None.

        Raises:
            ShardError: an order id or image id that cannot name a member or is there twice, or a column that cannot
                be encoded. The rows written before stay intact.
        """
        if self._tar is None:
            raise ShardError(f"cannot write to {self._path} outside its with block")
        if not isinstance(row, Mapping):
            raise ShardError(f"a raw row must be a dict of columns, got a {type(row).__name__}")
        order_id = _member_part(_first(row, "order_id", "__key__"), "order_id", forbidden="./\\")
        if order_id in self._written:
            raise ShardError(f"order_id {order_id!r} is written to {self._path} twice")
        try:
            members = _members(row)
        except MissingPackageError:
            raise
        except Exception as error:  # A foreign object's conversion to an array may raise anything.
            raise ShardError(f"scene {order_id!r} cannot be written: {one_line(error)}") from None
        # A write that stops half-way (a full disk) leaves a broken tar, which __exit__ then refuses to put in place.
        self._failed = True
        for name, data in members:
            info = tarfile.TarInfo(f"{order_id}.{name}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._failed = False
        self._written.add(order_id)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._tar = None
        if kind is None and self._failed:
            error = ShardError(f"{self._path} is not written: a row stopped half-way")
            self._context.__exit__(ShardError, error, None)
            raise error
        self._context.__exit__(kind, error, trace)


@contextlib.contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    with (atomic_write(path) as file,
          tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8") as tar):
        yield tar


def _member_part(value: Any, what: str, forbidden: str) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    if not isinstance(text, str) or not text or len(text) > 200 or not text.isprintable():
        shown = one_line(ascii(text))
        raise ShardError(f"{what} {shown} cannot name a tar member: expected 1-200 printable characters")
    if any(character in text for character in forbidden):
        raise ShardError(f"{what} {text!r} cannot name a tar member: it holds one of {' '.join(forbidden)}")
    return text


def _members(row: Mapping) -> list[tuple[str, bytes]]:
    columns = {name: [] if row.get(name) is None else list(row[name])
               for name in ("image_ids", "ade", "gestalt", "depth", "K", "R", "t", "pose_only_in_colmap")}
    count = max(len(column) for column in columns.values())
    ids = [_member_part(value, "image id", forbidden="/\\") for value in columns["image_ids"]]
    ids += [str(index) for index in range(len(ids), count)]
    if len(set(ids)) != count:
        raise ShardError("an image id is there twice, expected one per view")
    members = [("image_ids.json", _json(ids))]
    for name in ("ade", "gestalt", "depth"):
        for image_id, image in zip(ids, columns[name]):
            encoded = _encoded(image, name)
            if encoded is not None:
                members.append((f"{name}.{image_id}.{encoded[0]}", encoded[1]))
    for name, shape in (("K", (3, 3)), ("R", (3, 3)), ("t", (3,))):
        members.append((f"{name}.npy", _npy(_cameras(columns[name], name, shape, count))))
    pose_only = [is_true(value) for value in columns["pose_only_in_colmap"]]
    members.append(("pose_only_in_colmap.json", _json(pose_only + [False] * (count - len(pose_only)))))
    for name, array in zip(("wf_vertices", "wf_edges", "wf_classifications"), read_ground_truth(row)):
        if row.get(name) is not None:
            members.append((f"{name}.npy", _npy(array)))
    colmap = _first(row, "colmap", "colmap_binary")
    if colmap is not None:
        if not isinstance(colmap, (bytes, bytearray, memoryview)):
            raise TypeError(f"column colmap is a {type(colmap).__name__}, expected the bytes of a ZIP")
        members.append(("colmap.zip", bytes(colmap)))
    return members


def _first(row: Mapping, *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _cameras(values: list, name: str, shape: tuple[int, ...], count: int) -> np.ndarray:
    cameras = np.zeros((count, *shape), dtype=np.float32)
    for index, value in enumerate(values):
        if value is not None:
            array = np.asarray(value, dtype=np.float64)
            if array.size != cameras[index].size:
                raise ValueError(f"{name} of view {index} has shape {list(array.shape)}, expected {list(shape)}")
            with np.errstate(over="ignore"):
                cameras[index] = array.reshape(shape)
    return cameras


def _encoded(image: Any, column: str) -> tuple[str, bytes] | None:
    if isinstance(image, Mapping):
        image = image.get("bytes")
    if image is None:
        return None
    if isinstance(image, (bytes, bytearray, memoryview)):
        image = bytes(image)
        for magic, extension in _MAGIC:
            if image.startswith(magic):
                return extension, image
        raise ImageError(f"{column}: bytes that are no PNG, JPEG or WebP image")
    array = depth_millimetres(image) if column == "depth" else label_rgb(image)
    return None if array is None else ("png", encode_png(array))


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
