"""Turning the members of one tar sample into a raw row (the columns of ``wireframe.scene``)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wireframe.errors import one_line
from wireframe.images import ImageError, depth_millimetres, open_image
from wireframe.member_names import CAMERA_COLUMNS, IMAGE_COLUMNS, MemberName, canonical_column
from wireframe.npy import read_npy, read_npz
from wireframe.scene import is_true

MAX_TEXT_BYTES = 64 << 20

_SHAPES = {"K": (3, 3), "R": (3, 3), "t": (3,), "pose_only_in_colmap": ()}
_TRUTH = ("wf_vertices", "wf_edges", "wf_classifications")


class _MemberError(ValueError):
    pass


def natural_order(text: str) -> tuple:
    """A sort key by which ``view_2`` comes before ``view_10``."""
    return (*((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", text)), (-1, text))


def build_row(key: str, members: Sequence[tuple[MemberName, bytes]]) -> dict | None:
    """A raw row from the members of one sample, each with its parsed name.

    Views stand in the order of ``image_ids``, else of their image ids with numbers taken as numbers. Modalities are
    matched by image id; arrays over all views by position in that order. Images stay PIL images that decode on first
    use (their bytes, where PIL cannot open them); ``depthcm`` becomes millimetres. Of two members with one meaning,
    the later counts, as in any tar.

    A member that holds a whole column and cannot be decoded is listed in the extra column ``unreadable`` (name of the
    column -> reason), which makes ``read_scene`` refuse this row alone. A broken per-view member stays as its bytes,
    so that its view alone is dropped.

    Returns:
        The row, or None where no member holds a column.
    """
    # Numbers beyond float32 become infinite here, and are refused by read_scene.
    with np.errstate(over="ignore", invalid="ignore"):
        values, per_view, unreadable = _sort_members(members)
        if not values and not per_view and not unreadable:
            return None
        return _assembled(key, values, per_view, unreadable)


def _assembled(key: str, values: dict, per_view: dict, unreadable: dict) -> dict:
    row: dict[str, Any] = {"order_id": values.get("order_id") or key}
    ids, lookup = _image_ids(values, per_view)
    row["image_ids"] = ids
    for column in ("ade", "depth", "gestalt"):
        found = _images(column, per_view)
        row[column] = [found.get(image_id) for image_id in lookup] if found else values.get(column, [])
    for column in _SHAPES:
        row[column] = _camera_column(column, values, per_view, ids, lookup, unreadable)
    if not row["pose_only_in_colmap"]:
        row["pose_only_in_colmap"] = [False] * len(ids)
    for column in _TRUTH:
        row[column] = values.get(column)
    row["colmap"] = values.get("colmap")
    if unreadable:
        row["unreadable"] = unreadable
    return row


def _sort_members(members: Sequence[tuple[MemberName, bytes]]) -> tuple[dict, dict, dict]:
    """Decoded whole columns, raw per-view members by column and image id, and what could not be decoded."""
    values: dict[str, Any] = {}
    bundled: dict[str, Any] = {}
    per_view: dict[str, dict[str, bytes]] = {}
    unreadable: dict[str, str] = {}
    for name, data in members:
        if name.column is None:
            continue
        if name.image_id is not None:
            per_view.setdefault(name.column, {})[name.image_id] = data
        elif name.column == "colmap":
            values["colmap"] = data
        else:
            try:
                value = _decoded(name.column, name.extension, data)
            except _MemberError as error:
                unreadable[name.column] = str(error)
                continue
            if name.column == "bundle":
                bundled.update(value)
            else:
                values[name.column] = value
    return {**bundled, **values}, per_view, unreadable


def _decoded(column: str, extension: str, data: bytes) -> Any:
    """The value of a member that holds a whole column, told apart by content (numbers, JSON or text)."""
    if data.startswith(b"\x93NUMPY"):
        value = _npy(data)
    elif data.startswith(b"PK\x03\x04"):
        value = read_npz(data, "the archive", _MemberError)
    elif len(data) > MAX_TEXT_BYTES:
        raise _MemberError(f"{len(data)} bytes of text, above the cap of {MAX_TEXT_BYTES}")
    else:
        value = _text_or_json(column, extension, data)
    if column != "bundle":
        return _normalised(column, value)
    if not isinstance(value, Mapping):
        raise _MemberError("expected named columns")
    known = {canonical_column(name): entry for name, entry in value.items() if entry is not None}
    return {name: _normalised(name, entry) for name, entry in known.items()
            if name not in (None, "colmap", "bundle", "depthcm")}


def _normalised(column: str, value: Any) -> Any:
    """The value of a whole column: a string, a list or array over views, a dict by image id, or an array."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "SU":
        value = _strings(value)
        value = value[0] if column == "order_id" and len(value) == 1 else value
    if column == "order_id":
        if not isinstance(value, str) or not value.strip():
            raise _MemberError("order_id: expected one string")
        return value.strip()
    if column in _TRUTH:
        return _numbers(column, value)
    if isinstance(value, np.ndarray) and value.ndim > 0:
        value = list(value) if column in IMAGE_COLUMNS else value
    elif not isinstance(value, list) and not (isinstance(value, Mapping) and column in _SHAPES):
        raise _MemberError(f"{column}: a {type(value).__name__}, expected one entry per view")
    return [str(image_id) for image_id in value] if column == "image_ids" else value


def _numbers(column: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise _MemberError(f"{column}: {one_line(error)}") from None
    if array.dtype.kind not in "iufb":
        raise _MemberError(f"{column}: does not hold numbers")
    return array


def _text_or_json(column: str, extension: str, data: bytes) -> Any:
    try:
        text = data.decode("utf-8-sig")
        if extension == "json" or text.lstrip()[:1] in ("[", "{"):
            return json.loads(text)
        if column == "order_id":
            return text
        if column in ("image_ids", "pose_only_in_colmap"):
            return text.split()
        return np.array(text.replace(",", " ").split(), dtype=np.float64)
    except (ValueError, RecursionError, OverflowError) as error:
        raise _MemberError(one_line(error)) from None


def _npy(data: bytes) -> np.ndarray:
    return read_npy(data, "the array", _MemberError)


def _strings(array: np.ndarray) -> list[str]:
    try:
        values = array.reshape(-1).tolist()
        return [value.decode("utf-8", "replace") if isinstance(value, bytes) else value for value in values]
    except ValueError as error:
        raise _MemberError(one_line(error)) from None


def _image_ids(values: dict, per_view: dict) -> tuple[list[str], list[str]]:
    """The ids of the row's views, and beside each the id that its members are named by."""
    named = sorted({image_id for column in per_view.values() for image_id in column}, key=natural_order)
    listed = values.get("image_ids")
    if listed is None:
        if named:
            return named, named
        counts = [len(values[column]) for column in (*_SHAPES, *IMAGE_COLUMNS) if column in values]
        ids = [str(index) for index in range(max(counts, default=0))]
        return ids, ids
    ids, known = listed, set(listed)
    extra = [image_id for image_id in named if image_id not in known]
    if extra == named and all(name.isdecimal() and int(name) < len(ids) for name in named):
        # Members numbered by position.
        return ids, [str(index) for index in range(len(ids))]
    return ids + extra, ids + extra


def _images(column: str, per_view: dict) -> dict[str, Any]:
    found = {}
    if column == "depth":
        found = {image_id: _centimetres(data) for image_id, data in per_view.get("depthcm", {}).items()}
    found.update({image_id: _image(data) for image_id, data in per_view.get(column, {}).items()})
    return found


def _image(data: bytes) -> Any:
    try:
        return _npy(data) if data.startswith(b"\x93NUMPY") else open_image(data)
    except (ImageError, _MemberError):
        return data


def _centimetres(data: bytes) -> Any:
    try:
        depth = depth_millimetres(_image(data))
    except ImageError:
        return data
    return None if depth is None else np.minimum(depth.astype(np.uint32) * 10, 65535).astype(np.uint16)


def _camera_column(column: str, values: dict, per_view: dict, ids: list[str], lookup: list[str],
                   unreadable: dict) -> list:
    if column in per_view and column in CAMERA_COLUMNS:
        single = per_view[column]
        return [_camera(column, single[image_id]) if image_id in single else None for image_id in lookup]
    value = values.get(column)
    if value is None:
        return []
    try:
        entries = _entries(column, value, ids)
    except (ValueError, TypeError, OverflowError) as error:
        unreadable[column] = one_line(error)
        return []
    if len(entries) != len(ids) and "image_ids" not in values:
        unreadable[column] = f"{len(entries)} entries for {len(ids)} views, and no image_ids to match them by"
        return []
    return entries


def _camera(column: str, data: bytes) -> Any:
    try:
        value = _npy(data) if data.startswith(b"\x93NUMPY") else _text_or_json(column, "", data)
        return np.asarray(value, dtype=np.float32)
    except (_MemberError, ValueError, TypeError, OverflowError):
        return data


def _entries(column: str, value: Any, ids: list[str]) -> list:
    shape = _SHAPES[column]
    if isinstance(value, Mapping):
        value = [value.get(image_id) for image_id in ids]
    if column == "pose_only_in_colmap":
        return [is_true(entry) for entry in value]
    if isinstance(value, list) and any(entry is None or isinstance(entry, list) for entry in value):
        return [None if entry is None else np.asarray(entry, dtype=np.float32) for entry in value]
    return list(np.asarray(value, dtype=np.float64).reshape(-1, *shape).astype(np.float32))
