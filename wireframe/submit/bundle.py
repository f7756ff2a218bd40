"""A folder whose ``script.py`` answers the challenge's scenes where this package is not installed."""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import wireframe
from wireframe.errors import ConfigError
from wireframe.files import sync, write_synced
from wireframe.graph import GraphConfig
from wireframe.kernels import native

if TYPE_CHECKING:
    from wireframe.perceiver import Perceiver

# All that the chain from a tar to a wireframe imports, beyond Python's own library.
REQUIREMENTS = ("torch>=2.8", "numpy", "pillow", "safetensors")

_PACKAGE = Path(wireframe.__file__).resolve().parent
_SUBMIT = Path(__file__).resolve().parent
_SCRIPT = _SUBMIT / "script.py"
_LICENCES = ("LICENSE", "NOTICE")
# Their commands and the demo are not in the bundle.
_LEFT_OUT = ("cli.py", "__main__.py", "demo.py", "doctor.py")


def write_bundle(folder: str | os.PathLike, model: Perceiver, graph: GraphConfig) -> list[str]:
    """Writes script.py, requirements.txt, model/ (safetensors, with the graph's settings) and wireframe/.

    The Python files of the package go in, without training, bench and synthetic scenes; the compiled module of this
    platform, too, where it is built and up to date: the other implementation gives the same bits.

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
        staging.mkdir(parents=True)
        _fill(staging, model, graph)
        # An empty folder of that name gives way.
        os.replace(staging, folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _fill(folder: Path, model: Perceiver, graph: GraphConfig) -> None:
    from wireframe.pretrained import save_graph

    model.save_pretrained(folder / "model")
    save_graph(graph, folder / "model")
    kernels = Path(native.__file__).resolve().parent
    sources = [path for path in _PACKAGE.glob("*.py") if path.name not in _LEFT_OUT]
    if native.problem("_C") is None:
        sources.append(Path(native.module("_C").__file__))
    _copy(sources, folder / "wireframe")
    _copy(list(kernels.glob("*.py")), folder / "wireframe" / "kernels")
    inside = [path for path in _SUBMIT.glob("*.py") if path.name not in (Path(__file__).name, _SCRIPT.name)]
    _copy(inside, folder / "wireframe" / "submit")
    _copy([_SCRIPT, *_licences()], folder)
    write_synced(folder / "requirements.txt", ("\n".join(REQUIREMENTS) + "\n").encode())


def _copy(files: list[Path], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for file in files:
        write_synced(folder / file.name, file.read_bytes())
    sync(folder)


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
