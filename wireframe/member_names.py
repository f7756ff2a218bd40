"""What a member of a raw tar is, from its name alone.

The documented grouping is ``key.column.imageid.ext`` (``key`` up to the first dot of the base name, the folder left
out). The names of the 2026 tars are not documented, so the layouts in ``parse_name`` are taken too, where they can
mean one thing only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

IMAGE_COLUMNS = ("ade", "gestalt", "depth", "depthcm")
CAMERA_COLUMNS = ("K", "R", "t")

_ALIASES = {
    "ade": "ade", "ade20k": "ade", "gestalt": "gestalt", "depth": "depth", "depthcm": "depthcm",
    "k": "K", "r": "R", "t": "t",
    "image_ids": "image_ids", "imageids": "image_ids", "__imagekey__": "image_ids",
    "order_id": "order_id", "__key__": "order_id", "pose_only_in_colmap": "pose_only_in_colmap",
    "wf_vertices": "wf_vertices", "wf_edges": "wf_edges", "wf_classifications": "wf_classifications",
    "colmap": "colmap", "colmap_binary": "colmap", "wireframe": "bundle",
}
_PER_VIEW = (*IMAGE_COLUMNS, *CAMERA_COLUMNS)
_IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "tif", "tiff", "npy")
# Pickles would run code; they are never read.
_REFUSED = ("pickle", "pkl", "pyd", "pth", "pt")
_EXTENSIONS = (*_IMAGE_EXTENSIONS, "json", "txt", "zip", "npz", "bin", *_REFUSED)
_PREFIXED = re.compile(r"(ade20k|ade|gestalt|depthcm|depth|k|r|t)[_-](.+)", re.IGNORECASE)
_UNDERSCORED = re.compile(r"(.+?)_(ade20k|ade|gestalt|depthcm|depth)_(.+)", re.IGNORECASE)
_SUFFIXED = re.compile(
    r"(.+?)_(pose_only_in_colmap|colmap_binary|colmap|wf_vertices|wf_edges|wf_classifications|image_ids|order_id"
    r"|wireframe)", re.IGNORECASE)
_SUFFIXED_CAMERA = re.compile(r"(.+)_(k|r|t)", re.IGNORECASE)

_Found = tuple[str, str, "str | None"]


class MemberName(NamedTuple):
    """The parts of a member's name; ``column`` is None where it is not recognised."""

    key: str
    column: str | None
    image_id: str | None
    extension: str


def canonical_column(name: str) -> str | None:
    """The column that ``name`` stands for (any case; ``ade20k``, ``colmap_binary``, ``__key__`` ...), or None."""
    return _ALIASES.get(name.lower())


def parse_name(path: str) -> MemberName:
    """Read a member's name. In this order:

    1. ``key.column[.imageid].ext``, also ``key.column`` and an image id with dots;
    2. ``key/column[.imageid].ext``, a folder per sample;
    3. ``key.column_imageid.ext``;
    4. ``key.imageid.column.ext``;
    5. ``key/column/imageid.ext``;
    6. ``key_column_imageid.ext`` and ``key_column.ext``, where one column only is named;
    7. ``key/column_imageid.ext``;
    8. ``key.json`` and ``key.npz``, a whole sample (column "bundle").

    Columns are taken in any case. ``.pkl``, ``.pickle``, ``.pth``, ``.pt`` and ``.pyd`` members are never recognised.
    """
    folders = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
    base = folders.pop() if folders else ""
    key, _, rest = base.partition(".")
    parts = rest.split(".") if rest else []
    extension = parts[-1].lower() if parts and parts[-1].lower() in _EXTENSIONS else ""
    unknown = MemberName(key, None, None, extension)
    if extension in _REFUSED or base.startswith("._") or "__MACOSX" in folders:
        return unknown
    if extension:
        parts.pop()
    stem = base[: len(base) - len(extension) - 1] if extension else base
    found = (_dotted(key, parts) or _in_folder(stem, folders) or _dotted_oddly(key, parts)
             or _in_two_folders(stem, folders) or _joined(stem, folders, extension))
    if found is not None:
        return MemberName(*found, extension)
    if not parts and extension in ("json", "npz"):
        return MemberName(key, "bundle", None, extension)
    return unknown


def _dotted(key: str, parts: list[str]) -> _Found | None:
    column = canonical_column(parts[0]) if parts else None
    return _checked(key, column, ".".join(parts[1:])) if key and column is not None else None


def _in_folder(stem: str, folders: list[str]) -> _Found | None:
    head, _, tail = stem.partition(".")
    column = canonical_column(head)
    return _checked(folders[-1], column, tail) if folders and column is not None else None


def _dotted_oddly(key: str, parts: list[str]) -> _Found | None:
    if not key or not parts:
        return None
    prefixed = _PREFIXED.fullmatch(".".join(parts))
    if prefixed:
        return key, _ALIASES[prefixed[1].lower()], prefixed[2]
    column = canonical_column(parts[-1])
    return _checked(key, column, ".".join(parts[:-1])) if column is not None else None


def _in_two_folders(stem: str, folders: list[str]) -> _Found | None:
    column = canonical_column(folders[-1]) if len(folders) > 1 else None
    return _checked(folders[-2], column, stem) if column in _PER_VIEW else None


def _joined(stem: str, folders: list[str], extension: str) -> _Found | None:
    image = _UNDERSCORED.fullmatch(stem)
    named = [part for part in stem.lower().split("_") if _ALIASES.get(part) in IMAGE_COLUMNS]
    if image and len(named) == 1 and extension in _IMAGE_EXTENSIONS:
        return image[1], _ALIASES[image[2].lower()], image[3]
    whole = _SUFFIXED.fullmatch(stem)
    if whole is None and extension in ("npy", "txt"):
        # x_r.json would as well be the whole sample x_r.
        whole = _SUFFIXED_CAMERA.fullmatch(stem)
    if whole:
        return whole[1], _ALIASES[whole[2].lower()], None
    prefixed = _PREFIXED.fullmatch(stem)
    return (folders[-1], _ALIASES[prefixed[1].lower()], prefixed[2]) if prefixed and folders else None


def _checked(key: str, column: str, image_id: str) -> _Found | None:
    if column in _PER_VIEW:
        return key, column, image_id or ("0" if column in IMAGE_COLUMNS else None)
    return None if image_id else (key, column, None)
