"""What setup.py and native.py have to agree on. Imports nothing of the package: setup.py runs this file by its path."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

# Under csrc/: what each module is compiled from, and the headers it may include.
SOURCES = {"_C": ("cpu/*.cpp",), "_C_cuda": ("cuda/*.cu", "cuda/*.cpp")}
HEADERS = {"_C": ("*.h", "cpu/*.h"), "_C_cuda": ("*.h", "cuda/*.h", "cuda/*.cuh")}


def files(csrc: Path, patterns: tuple[str, ...]) -> list[Path]:
    """The files of ``csrc`` that match, in the order of their names."""
    return sorted(path for pattern in patterns for path in csrc.glob(pattern))


def digest(csrc: Path, name: str) -> str:
    """Hexadecimal digest of the names and the contents of everything that module ``name`` is compiled from."""
    total = hashlib.sha256()
    for path in files(csrc, SOURCES[name] + HEADERS[name]):
        total.update(path.relative_to(csrc).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:32]


def tag() -> str:
    """Names this Python's binary interface, as in cpython-311-x86_64-linux-gnu."""
    return (sysconfig.get_config_var("EXT_SUFFIX") or ".unknown.so").strip(".").rsplit(".", 1)[0]


def note_name() -> str:
    """The file beside the modules that says how they were built, or why not."""
    return f"_build.{tag()}.json"
