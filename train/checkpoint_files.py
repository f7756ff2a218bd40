"""The files of one checkpoint folder: written to the disk with a manifest, and read again only as the manifest says.

The manifest is the text of ``sha256sum``. Nothing that it names is opened: the names of the files are known.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from wireframe.errors import CheckpointError, one_line
from wireframe.files import sync, write_synced
from wireframe.pretrained import MAX_WEIGHT_BYTES

MODEL, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"
FILES = (MODEL, OPTIMIZER, STATE)
_LIMITS = {MODEL: MAX_WEIGHT_BYTES, OPTIMIZER: 2 * MAX_WEIGHT_BYTES, STATE: 1 << 20, SUMS: 4096}

# What state.json holds, and of which type.
_STATE_FIELDS = {
    "step": int, "bad_steps": int, "start": (dict, type(None)), "config": dict, "data": dict, "environment": dict,
}  # fmt: skip


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a run's checkpoint, whole or not."""
    return any((folder / name).exists() for name in (OPTIMIZER, STATE, SUMS))


def write_files(folder: Path, contents: dict[str, bytes]) -> None:
    """Writes the files and their manifest into an existing, empty folder, and returns when all is on the disk.

    Args:
        contents: bytes by name, for every name of ``FILES``.

    Raises:
        OSError: the disk is full, or what else the system says.
    """
    for name, data in contents.items():
        write_synced(folder / name, data)
    write_synced(folder / SUMS, _manifest({name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}))
    sync(folder)


def check_files(folder: Path) -> dict:
    """The state of a checkpoint whose files agree with its manifest; reads all of it, in pieces.

    Raises:
        CheckpointError: one line that names the first file that is missing, foreign, too large or altered.
    """
    return _checked(folder)[0]


def holds(folder: Path, contents: dict[str, bytes]) -> bool:
    """Whether a valid checkpoint is there that has these contents; the environment it was made in does not count."""
    try:
        state, sums = _checked(folder)
    except CheckpointError:
        return False
    ours = _parse_state(contents[STATE])
    tensors = all(sums[name] == hashlib.sha256(contents[name]).hexdigest() for name in (MODEL, OPTIMIZER))
    return tensors and {**state, "environment": None} == {**ours, "environment": None}


def _checked(folder: Path) -> tuple[dict, dict[str, str]]:
    """State and SHA-256 by name, of files that agree with their manifest."""
    with _explained(folder):
        _check_names(folder)
        sums = {}
        for name in FILES:
            digest = hashlib.sha256()
            with _open(folder, name) as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
            sums[name] = digest.hexdigest()
        _compare(folder, sums)
        with _open(folder, STATE) as file:
            return _parse_state(file.read(_LIMITS[STATE])), sums


def read_files(folder: Path) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """(state, tensors of the model, tensors of the optimiser) of a checkpoint; the bytes checked are those given back.

    Raises:
        CheckpointError: as ``check_files``, or a tensor file is not one.
    """
    from safetensors.torch import load

    with _explained(folder):
        _check_names(folder)
        contents = {}
        for name in FILES:
            with _open(folder, name) as file:
                contents[name] = file.read()
        _compare(folder, {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()})
        state = _parse_state(contents.pop(STATE))
        tensors = {}
        for name in (MODEL, OPTIMIZER):
            try:
                tensors[name] = load(contents.pop(name))
            except Exception as problem:
                raise _Broken(f"{name} is not a readable safetensors file ({one_line(problem)})") from None
    return state, tensors[MODEL], tensors[OPTIMIZER]


class _Broken(Exception):
    """What is wrong with a checkpoint, without its name."""


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except _Broken as problem:
        raise CheckpointError(one_line(f"checkpoint {folder} is corrupt: {problem}", 600)) from None
    except OSError as problem:
        raise CheckpointError(one_line(f"checkpoint {folder} cannot be read: {problem.strerror}", 600)) from None


def _manifest(sums: dict[str, str]) -> bytes:
    return "".join(f"{sums[name]}  {name}\n" for name in FILES).encode()


def _check_names(folder: Path) -> None:
    found = set(os.listdir(folder))
    for name in (*FILES, SUMS):
        if name not in found:
            raise _Broken(f"there is no {name}")
    foreign = sorted(found - {*FILES, SUMS})
    if foreign:
        raise _Broken(f"it holds {foreign[0][:80]!r}, which is no part of it")


def _compare(folder: Path, sums: dict[str, str]) -> None:
    with _open(folder, SUMS) as file:
        manifest = file.read()
    if manifest == _manifest(sums):
        return
    for line, name in zip(_manifest(sums).splitlines(), FILES):
        if line not in manifest.splitlines():
            raise _Broken(f"{name} does not agree with {SUMS}")
    raise _Broken(f"{SUMS} does not list {', '.join(FILES)} and nothing else")


@contextlib.contextmanager
def _open(folder: Path, name: str) -> Iterator[BinaryIO]:
    """A regular file of the folder itself, of no more than its limit; a link is not followed, a pipe not waited for."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(folder / name, flags)
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            raise _Broken(f"{name} is a link") from None
        raise _Broken(f"{name} cannot be read ({problem.strerror})") from None
    with open(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise _Broken(f"{name} is not a regular file")
        if about.st_size > _LIMITS[name]:
            raise _Broken(f"{name} is {about.st_size} bytes long; the limit is {_LIMITS[name]}")
        yield file


def _parse_state(data: bytes) -> dict[str, Any]:
    try:
        state = json.loads(data)
    except (ValueError, RecursionError) as problem:
        raise _Broken(f"{STATE} is not JSON ({one_line(problem, 80)})") from None
    if not isinstance(state, dict) or state.keys() != _STATE_FIELDS.keys():
        raise _Broken(f"{STATE} must hold {', '.join(_STATE_FIELDS)} and nothing else")
    for name, kind in _STATE_FIELDS.items():
        if not isinstance(state[name], kind) or isinstance(state[name], bool):
            raise _Broken(f"{STATE}: {name} is of type {type(state[name]).__name__}")
    for name in ("step", "bad_steps"):
        if not 0 <= state[name] < 1 << 62:
            raise _Broken(f"{STATE}: {name} is no count of steps")
    return state
