"""A folder whose ``script.py`` answers the challenge's scenes where this package is not installed."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import wireframe
from wireframe import kernels
from wireframe.errors import ConfigError
from wireframe.graph import GraphConfig
from wireframe.pretrained import save_graph

if TYPE_CHECKING:
    from wireframe.perceiver import Perceiver

# All that the chain from a tar to a wireframe imports, beyond Python's own library.
REQUIREMENTS = ("torch>=2.8", "numpy", "pillow", "safetensors")

_SUBMIT = Path(__file__).resolve().parent
_PACKAGE = Path(wireframe.__file__).resolve().parent
_KERNELS = Path(kernels.__file__).resolve().parent
_SCRIPT = _SUBMIT / "script.py"
_LICENCES = ("LICENSE", "NOTICE")


def write_bundle(folder: str | os.PathLike, model: Perceiver, graph: GraphConfig) -> list[str]:
    """Writes script.py, requirements.txt, model/ (safetensors, with the graph's settings) and wireframe/.

    The Python files of the package go in, without training, bench and synthetic scenes, and without the compiled
    module: the reference implementation gives points of the same bits and segments within rounding, and reads, fuses
    and samples a synthetic scene of full size in 0.46 s of CPU instead of 0.16 to 0.21 s.

    Args:
        folder: is made; there must be nothing in it yet.
        model: of any float type.
        graph: how its segments become a wireframe, the threshold included.

    Returns:
        The paths in the folder, sorted.

    Raises:
        ConfigError: the folder holds something. CheckpointError: the model cannot be written. OSError: another file
            cannot. MissingPackageError: safetensors is not installed.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is there and not an empty folder; give a new one for the bundle")
    staging = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.tmp"
    try:
        for source, target in ((_PACKAGE, "wireframe"), (_KERNELS, "wireframe/kernels"), (_SUBMIT, "wireframe/submit")):
            (staging / target).mkdir(parents=True)
            for file in source.glob("*.py"):
                shutil.copyfile(file, staging / target / file.name)
        for file in (_SCRIPT, *_licences()):
            shutil.copyfile(file, staging / file.name)
        (staging / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n")
        model.save_pretrained(staging / "model")
        save_graph(graph, staging / "model")
        # An empty folder of that name gives way.
        os.replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _licences() -> list[Path]:
    """The licence and its notices: of the checkout, else as an installed package keeps them."""
    beside = [_PACKAGE.parent / name for name in _LICENCES]
    if all(path.is_file() for path in beside):
        return beside
    try:
        kept = importlib.metadata.files("wireframe") or []
    except importlib.metadata.PackageNotFoundError:
        kept = []
    return [Path(file.locate()) for file in kept if file.name in _LICENCES]
