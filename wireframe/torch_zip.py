"""A reader of torch's zip-format files (``torch.save``) that executes nothing it reads.

Only plain containers, numbers, strings, OrderedDict and tensors come out. Any other global named in the pickle
becomes an :class:`Inert` object that holds its name; the caller decides where such an object may stand.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from wireframe.errors import CheckpointError, one_line

MAX_FILE_BYTES = 4 << 30
MAX_PICKLE_BYTES = 16 << 20
MAX_ENTRIES = 1 << 16
MAX_DIMS = 8

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class Inert:
    """What stands for an instance of a class that the reader does not know: its name and its plain state."""

    name = ""
    state: object = None

    def __new__(cls, *args, **kwargs) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __call__(self, *args, **kwargs) -> Inert:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        pass

    def extend(self, items: object) -> None:
        pass

    def add(self, item: object) -> None:
        pass


class _Sealed:
    """A value that the pickle may pass around but not alter."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a pickle may not alter the reader's own objects")


class _StorageType(_Sealed):
    __slots__ = ("dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Storage(_Sealed):
    __slots__ = ("dtype", "key", "numel")

    def __init__(self, dtype: torch.dtype, key: str, numel: int) -> None:
        self.dtype, self.key, self.numel = dtype, key, numel


class StoredTensor(_Sealed):
    """A tensor in the file; ``TorchZip.tensor`` reads its bytes."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


class _RebuildTensor(_Sealed):
    """Stands for ``torch._utils._rebuild_tensor_v2``: the tensor must lie inside its storage."""

    __slots__ = ()

    def __call__(self, storage, offset, size, stride, *_unused) -> StoredTensor:
        if not isinstance(storage, _Storage) or type(size) is not tuple or type(stride) is not tuple:
            raise pickle.UnpicklingError("a tensor is not described by a storage, an offset, a size and a stride")
        if not (_is_count(offset) and all(map(_is_count, size)) and all(map(_is_count, stride))):
            raise pickle.UnpicklingError("a tensor's offset, size or stride is not a count")
        if len(size) != len(stride) or len(size) > MAX_DIMS:
            raise pickle.UnpicklingError(f"a tensor has {len(size)} sizes and {len(stride)} strides")
        elements = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride)) if elements else 0
        if elements > storage.numel or (elements and last >= storage.numel):
            raise pickle.UnpicklingError(
                f"a tensor of {elements} elements reaches past its storage of {storage.numel}"
            )
        return StoredTensor(storage, offset, size, stride)


class _RebuildParameter(_Sealed):
    """Stands for ``torch._utils._rebuild_parameter``: the tensor itself."""

    __slots__ = ()

    def __call__(self, data, *_unused) -> StoredTensor:
        if not isinstance(data, StoredTensor):
            raise pickle.UnpicklingError("a parameter does not hold a tensor")
        return data


# Extension codes, announced buffers and decimal integers: torch.save writes none of them, and they reach other
# code, reserve memory before reading, or take quadratic time.
_REFUSED_OPCODES = {op[0] for op in (
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
    pickle.INT, pickle.LONG,
)}


# The pure-Python unpickler: the one in C reserves memory for whatever memo index a file announces.
class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar[dict] = {
        code: read for code, read in pickle._Unpickler.dispatch.items() if code not in _REFUSED_OPCODES
    }

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _RebuildTensor()
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _RebuildParameter()
        if module == "collections" and name == "OrderedDict":
            return OrderedDict
        return type("Inert", (Inert,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: object) -> _Storage:
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise pickle.UnpicklingError("a persistent id does not describe a storage")
        _, kind, key, _, numel = pid
        if not isinstance(kind, _StorageType) or type(key) is not str or not _is_count(numel):
            if isinstance(kind, type) and issubclass(kind, Inert):
                raise pickle.UnpicklingError(f"storage type {kind.name[:80]!r} is not supported")
            raise pickle.UnpicklingError("a persistent id does not describe a storage")
        return _Storage(kind.dtype, key, numel)


class TorchZip:
    """One file of ``torch.save``, open for reading; a context manager.

    Raises:
        CheckpointError: from every method, where the file is not such a file, is damaged, or is over the caps.
    """

    def __init__(self, path: str | Path) -> None:
        self._label = Path(path).name
        try:
            size = os.path.getsize(path)
            if size > MAX_FILE_BYTES:
                raise self._error(f"is {size} bytes long; the limit is {MAX_FILE_BYTES}")
            self._zip = zipfile.ZipFile(path)
        except CheckpointError:
            raise
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror or type(error).__name__}") from error
        except Exception as error:
            raise self._error(
                "is not in torch's zip format (damaged, or written by torch < 1.6: load and save it again)"
            ) from error
        try:
            self._prefix = self._find_prefix()
            self._refuse_big_endian()
        except BaseException:
            self._zip.close()
            raise

    def __enter__(self) -> TorchZip:
        return self

    def __exit__(self, *_exc) -> None:
        self._zip.close()

    def load(self) -> object:
        """The pickled object; its tensors are StoredTensor, its unknown globals Inert (classes or instances)."""
        data = self._read("data.pkl", MAX_PICKLE_BYTES)
        try:
            return _Unpickler(io.BytesIO(data), encoding="utf-8").load()
        except Exception as error:
            named = isinstance(error, pickle.UnpicklingError) and str(error)
            reason = one_line(error) if named else type(error).__name__
            raise self._error(f"holds a damaged or unsafe pickle: {reason}") from error

    def tensor(self, stored: StoredTensor) -> Tensor:
        """The tensor on the CPU, contiguous, in its stored dtype, with memory of its own."""
        storage = stored.storage
        itemsize = storage.dtype.itemsize
        data = self._read(f"data/{storage.key}", MAX_FILE_BYTES)
        if len(data) != storage.numel * itemsize:
            raise self._error(
                f"storage {storage.key[:40]!r} holds {len(data)} bytes, announced {storage.numel * itemsize}"
            )
        if math.prod(stored.size) == 0:
            return torch.empty(stored.size, dtype=storage.dtype)
        flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        return flat.as_strided(stored.size, stored.stride, stored.offset).clone(
            memory_format=torch.contiguous_format
        )

    def _error(self, reason: str) -> CheckpointError:
        return CheckpointError(f"checkpoint {self._label!r} {reason}")

    def _find_prefix(self) -> str:
        entries = self._zip.infolist()
        if len(entries) > MAX_ENTRIES:
            raise self._error(f"holds {len(entries)} entries; the limit is {MAX_ENTRIES}")
        pickles = [e.filename for e in entries if e.filename == "data.pkl" or e.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise self._error(f"is a zip file with {len(pickles)} entries named data.pkl, not a file of torch.save")
        return pickles[0][: -len("data.pkl")]

    def _refuse_big_endian(self) -> None:
        if f"{self._prefix}byteorder" in self._zip.NameToInfo and self._read("byteorder", 64) != b"little":
            raise self._error("was written in big-endian byte order; save it again on a little-endian machine")

    def _read(self, name: str, limit: int) -> bytes:
        try:
            info = self._zip.getinfo(self._prefix + name)
        except KeyError as error:
            raise self._error(f"has no entry {name[:60]!r}") from error
        # torch never compresses, so an entry cannot be longer than the file.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise self._error(f"has a compressed entry {name[:60]!r}, which torch.save never writes")
        if info.file_size > limit:
            raise self._error(f"has an entry {name[:60]!r} of {info.file_size} bytes; the limit is {limit}")
        try:
            return self._zip.read(info)
        except Exception as error:
            raise self._error(f"has a damaged entry {name[:60]!r}") from error
