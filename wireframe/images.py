"""Label and depth images as arrays, from whatever a raw row holds, with a cap on their size.

PIL is imported where it is used; rows that hold NumPy arrays need no PIL at all.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from wireframe.errors import MissingPackageError, one_line

MAX_PIXELS = 64_000_000

# Other decoders of PIL are never tried on a row's bytes: some of them start programs (EPS) or follow paths.
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")


class ImageError(ValueError):
    """An image of a row cannot be used; ``str(error)`` is a reason in a few words."""


def pil_image():
    """The module ``PIL.Image``.

    Raises:
        MissingPackageError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError:
        raise MissingPackageError("reading images needs Pillow: pip install pillow") from None
    return Image


def open_image(data: bytes):
    """A PIL image over encoded bytes; pixels are decoded on first use.

    Raises:
        ImageError: the bytes are not one of ``FORMATS``.
    """
    image_module = pil_image()
    try:
        with _whole_images_only():
            return image_module.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:  # PIL's parsers let almost any exception out on hostile bytes.
        raise ImageError(f"undecodable image ({one_line(error)})") from None


def label_rgb(value: Any) -> np.ndarray:
    """The colours of a label map.

    Args:
        value: PIL image of any mode, uint8 array [H, W, 3] (or [H, W, 4], [H, W, 1], [H, W]), encoded bytes, or a
            dict ``{"bytes": ...}``.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ImageError: missing, undecodable, empty, of another rank or type, or above ``MAX_PIXELS``.
    """
    value = _unwrapped(value)
    if isinstance(value, np.ndarray):
        array = _label_array(value)
    else:
        array = _pixels(value, convert="RGB")
    if array.size == 0:
        raise ImageError("empty image")
    return array


def depth_millimetres(value: Any) -> np.ndarray | None:
    """A depth map in whole millimetres.

    Args:
        value: PIL image of mode I;16, I, F or L, integer or float array [H, W] of millimetres, encoded bytes, a dict
            ``{"bytes": ...}``, or None.

    Returns:
        uint16 [H, W], clamped at 65535; 0 where there is no depth (non-finite or not positive). None where no pixel
        has a depth.

    Raises:
        ImageError: undecodable, of another rank or type, or above ``MAX_PIXELS``.
    """
    value = _unwrapped(value, allow_none=True)
    if value is None:
        return None
    array = value if isinstance(value, np.ndarray) else _pixels(value, convert=None)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim != 2 or array.dtype.kind not in "uif":
        raise ImageError(f"depth of shape {array.shape} and type {array.dtype}, expected [H, W] numbers")
    if array.size > MAX_PIXELS:
        raise ImageError(f"{array.size} pixels, above the cap of {MAX_PIXELS}")
    if array.dtype.kind == "f":
        array = np.clip(np.rint(np.where(np.isfinite(array), array, 0)), 0, 65535)
    elif array.dtype.itemsize > 2 or array.dtype.kind == "i":
        # np.clip refuses bounds that the array's own type cannot hold.
        wide = np.uint64 if array.dtype.kind == "u" else np.int64
        array = np.clip(array.astype(wide), 0, 65535)
    array = array.astype(np.uint16)
    return array if array.any() else None


def encode_png(image: Any) -> bytes:
    """PNG bytes of a PIL image or a uint8 [H, W, 3] or uint16 [H, W] array; the same for the same pixels and Pillow.
    """
    if isinstance(image, np.ndarray):
        image = pil_image().fromarray(np.ascontiguousarray(image))
    buffer = io.BytesIO()
    # Level 1 costs a third of the default's time for a few per cent of size on label maps.
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


class _Strictness:
    """How many threads are decoding, and what PIL was told before the first of them began."""

    lock = threading.Lock()
    threads = 0
    before = False


@contextlib.contextmanager
def _whole_images_only() -> Iterator[None]:
    """PIL refuses truncated images, even where another package (hoho2025 does) has told it to fill them up.

    The switch is one for the process: the first thread to decode sets it, the last one sets it back.
    """
    from PIL import ImageFile

    with _Strictness.lock:
        if _Strictness.threads == 0:
            _Strictness.before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _Strictness.threads += 1
    try:
        yield
    finally:
        with _Strictness.lock:
            _Strictness.threads -= 1
            if _Strictness.threads == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _Strictness.before


def _unwrapped(value: Any, allow_none: bool = False) -> Any:
    if isinstance(value, Mapping):
        value = value.get("bytes")
    if value is None and not allow_none:
        raise ImageError("missing image")
    return value


def _label_array(array: np.ndarray) -> np.ndarray:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype.kind not in "ui":
        raise ImageError(f"label map of shape {array.shape} and type {array.dtype}, expected uint8 [H, W, 3]")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise ImageError(f"{array.shape[0] * array.shape[1]} pixels, above the cap of {MAX_PIXELS}")
    if array.dtype != np.uint8:
        if array.size and (array.min() < 0 or array.max() > 255):
            raise ImageError("label map with values outside 0-255")
        array = array.astype(np.uint8)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[..., :3]


def _pixels(value: Any, convert: str | None) -> np.ndarray:
    image_module = pil_image()
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = open_image(bytes(value))
    if not isinstance(value, image_module.Image):
        raise ImageError(f"a {type(value).__name__}, expected an image")
    width, height = value.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width * height} pixels, above the cap of {MAX_PIXELS}")
    try:
        # NumPy swallows a decoder's error inside __array_interface__, so the pixels are decoded first.
        with _whole_images_only():
            value.load()
        return np.asarray(value.convert(convert) if convert and value.mode != convert else value)
    except Exception as error:  # PIL's decoders let almost any exception out on hostile bytes.
        raise ImageError(f"undecodable image ({one_line(error)})") from None
