"""Models on disk: ``model.safetensors`` + ``config.json`` as huggingface_hub's mixin writes them, and ``.pt`` files.

``graph.json`` beside them says how the model's segments become a wireframe.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wireframe.checkpoint import config_of_state, encode_checkpoint, fit_state, read_checkpoint
from wireframe.errors import CheckpointError, ConfigError, MissingPackageError, one_line
from wireframe.files import atomic_write, sync, write_synced
from wireframe.graph import GraphConfig
from wireframe.perceiver import PerceiverConfig

if TYPE_CHECKING:
    from wireframe.perceiver import Perceiver

WEIGHTS, CONFIG, PUBLISHED, GRAPH = "model.safetensors", "config.json", "checkpoint.pt", "graph.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHT_BYTES = 4 << 30

# In every float type this buffer would be another encoding than the one the weights were trained with.
_KEEP_FLOAT32 = "tokenizer.pos_enc.B"

_STAGING = ".tmp"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def _package(name: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.split(".")[0]
        raise MissingPackageError(f"{purpose} needs {top}: pip install {top}") from error


def save_pretrained(model: Perceiver, directory: Path, dtype: torch.dtype | None) -> None:
    """See ``Perceiver.save_pretrained``."""
    if dtype is not None and not dtype.is_floating_point:
        raise CheckpointError(f"weights cannot be stored as {dtype}; choose a floating type")
    _write_directory(directory, _model_files(model, dtype))


def export_model(model: Perceiver, directory: Path, args: Mapping[str, object]) -> None:
    """Like ``save_pretrained``, with ``checkpoint.pt`` in the published naming beside it.

    Args:
        directory: of this process alone; what an export that was killed had left beside it is removed.
        args: plain values recorded in ``checkpoint.pt``, besides the architecture.

    Raises:
        CheckpointError: the directory cannot be written.
        MissingPackageError: safetensors is not installed.
    """
    files = _model_files(model, None)
    files[PUBLISHED] = encode_checkpoint(model.state_dict(), model.config, args)
    for name in _names_in(directory.parent):
        if name.startswith(f".{directory.name}.") and name.endswith(_STAGING):
            shutil.rmtree(directory.parent / name, ignore_errors=True)
    _write_directory(directory, files)


def save_graph(graph: GraphConfig, directory: Path) -> None:
    """Writes ``graph.json`` into the directory of a model.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        with atomic_write(directory / GRAPH) as file:
            file.write((json.dumps(dataclasses.asdict(graph), indent=2, sort_keys=True) + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {str(directory)!r}: {error.strerror}") from error


def read_graph(source: str | os.PathLike) -> GraphConfig | None:
    """The graph's settings beside a model on this machine; None where there are none.

    Args:
        source: as ``Perceiver.from_checkpoint`` takes it; of ``.pt`` files only ``checkpoint.pt`` in a model's folder
            has them beside it.

    Raises:
        ConfigError: the file there is not what ``save_graph`` writes, or is over the limit.
    """
    directory = Path(source)
    if directory.name == PUBLISHED and directory.is_file():
        directory = directory.parent
    path = directory / GRAPH
    if not os.path.lexists(path):
        return None
    known = {field.name for field in dataclasses.fields(GraphConfig)}
    try:
        if not path.is_file():
            raise ConfigError("it is not a regular file")
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(f"it is over the limit of {MAX_CONFIG_BYTES} bytes")
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or not values.keys() <= known:
            raise ConfigError(f"it must be a JSON object of {', '.join(sorted(known))}")
        return GraphConfig(**values)
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(one_line(f"{path} cannot be used: {reason}; --config gives other settings", 600)) from None


def load_model(
    model: str | os.PathLike | None, config: str | os.PathLike | None = None, threshold: float | None = None
) -> tuple[Perceiver, GraphConfig]:
    """A model and its ``graph_settings``; None: the shipped one. Raises as ``Perceiver.from_checkpoint`` does too."""
    from wireframe.perceiver import Perceiver

    model = model or _shipped()
    # Before the weights, which take longer to be refused.
    graph = graph_settings(model, config, threshold)
    return Perceiver.from_checkpoint(model), graph


def _shipped() -> Path:
    # A bundle of `wireframe submit` has no shipped model beside it.
    from wireframe.assets import MODEL

    return MODEL


def graph_settings(
    model: str | os.PathLike | None, config: str | os.PathLike | None = None, threshold: float | None = None
) -> GraphConfig:
    """How a model's segments become a graph: as ``config`` says, else ``graph.json`` beside the model, else the base.

    Args:
        model: as ``Perceiver.from_checkpoint`` takes it; None: the shipped one.
        config: a configuration whose graph section counts. threshold: the confidence to exceed; None: the graph's.

    Raises:
        ConfigError: the configuration, or the file beside the model, cannot be used.
    """
    graph = None if config else read_graph(model or _shipped())
    if graph is None:
        from wireframe.train.config import BASE_CONFIG, load_config

        graph = load_config(config or BASE_CONFIG).graph
    return graph if threshold is None else dataclasses.replace(graph, confidence=threshold)


def _model_files(model: Perceiver, dtype: torch.dtype | None) -> dict[str, bytes]:
    encode = _package("safetensors.torch", "saving a model").save
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", tensor.dtype if dtype is None or name == _KEEP_FLOAT32 else dtype)
        tensors[name] = tensor.contiguous()
    return {
        WEIGHTS: encode(tensors, metadata={"format": "pt"}),
        CONFIG: (json.dumps(model.config.to_dict(), indent=2, sort_keys=True) + "\n").encode(),
    }


def _names_in(directory: Path) -> list[str]:
    return os.listdir(directory) if directory.is_dir() else []


def _write_directory(directory: Path, files: dict[str, bytes]) -> None:
    """Put the files into the directory; a reader never sees a half-written one, nor a new directory half full."""
    staging = directory.parent / f".{directory.name}.{secrets.token_hex(6)}{_STAGING}"
    try:
        staging.mkdir(parents=True)
        for name, data in files.items():
            write_synced(staging / name, data)
        if directory.exists():
            for name in files:
                os.replace(staging / name, directory / name)
        else:
            sync(staging)
            os.rename(staging, directory)
        sync(directory)
        sync(directory.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {str(directory)!r}: {error.strerror}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def load_pretrained(cls: type[Perceiver], source: str | Path, revision: str | None) -> Perceiver:
    """See ``Perceiver.from_pretrained``."""
    directory = Path(source)
    if directory.is_dir():
        weights, config = directory / WEIGHTS, directory / CONFIG
        if not weights.is_file():
            raise CheckpointError(f"{str(source)!r} has no {WEIGHTS}; write it with Perceiver.save_pretrained")
        return _load_directory(cls, weights, config if config.is_file() else None)
    if isinstance(source, str) and _HUB_ID.fullmatch(source):
        weights = _download(source, WEIGHTS, revision)
        return _load_directory(cls, weights, _download(source, CONFIG, revision))
    raise CheckpointError(f"{str(source)!r} is neither a directory nor a Hub id 'owner/repo'")


def load_checkpoint(cls: type[Perceiver], path: str | Path) -> Perceiver:
    """See ``Perceiver.from_checkpoint``."""
    text = str(path)
    if text.startswith("hf://"):
        owner, _, rest = text[len("hf://"):].partition("/")
        repo, _, filename = rest.partition("/")
        repo, _, revision = repo.partition("@")
        if not (filename and _HUB_ID.fullmatch(f"{owner}/{repo}")):
            raise CheckpointError(f"{text!r} is not of the form hf://owner/repo/file.pt")
        path = _download(f"{owner}/{repo}", filename, revision or None)
    elif Path(path).is_dir():
        return load_pretrained(cls, Path(path), None)
    elif not Path(path).is_file():
        raise CheckpointError(f"there is no checkpoint at {text!r}")
    checkpoint = read_checkpoint(path)
    config = config_of_state(checkpoint.state, checkpoint.args)
    return _build(cls, config, checkpoint.state, f"checkpoint {Path(path).name!r}")


def _download(repo: str, filename: str, revision: str | None) -> Path:
    hub = _package("huggingface_hub", f"loading {repo!r} from the Hub")
    try:
        return Path(hub.hf_hub_download(repo, filename, revision=revision))
    except Exception as error:
        raise CheckpointError(f"cannot get {filename!r} of {repo!r} from the Hub: {one_line(error)}") from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, as stored.

    Raises:
        CheckpointError: it is not there, over the limit, or not such a file.
        MissingPackageError: safetensors is not installed.
    """
    load = _package("safetensors.torch", "loading a model").load_file
    label = f"model {str(path)!r}"
    try:
        if path.stat().st_size > MAX_WEIGHT_BYTES:
            raise CheckpointError(f"{label} is over the limit of {MAX_WEIGHT_BYTES} bytes")
        return load(path, device="cpu")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{label} is not a readable safetensors file") from error


def _load_directory(cls: type[Perceiver], weights: Path, config_path: Path | None) -> Perceiver:
    state = read_weights(weights)
    config = _read_config(config_path) if config_path is not None else config_of_state(state)
    return _build(cls, config, state, f"model {str(weights)!r}")


def _read_config(path: Path) -> PerceiverConfig:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{str(path)!r} is over the limit of {MAX_CONFIG_BYTES} bytes")
        values = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(path)!r} is not a readable JSON file") from error
    if isinstance(values, dict):
        # The mixin records every argument of __init__; the seed says nothing about the architecture.
        values.pop("seed", None)
    return PerceiverConfig.from_dict(values)


def _build(cls: type[Perceiver], config: PerceiverConfig, state: dict[str, Tensor], label: str) -> Perceiver:
    # No weights are drawn for a model whose weights are replaced at once.
    with torch.device("meta"):
        model = cls(config)
    model.load_state_dict(fit_state(state, model.state_dict(), label), assign=True)
    return model.eval()
