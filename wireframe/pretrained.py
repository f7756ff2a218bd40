"""Models on disk: ``model.safetensors`` + ``config.json`` as huggingface_hub's mixin writes them, and ``.pt`` files."""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
import shutil
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from wireframe.checkpoint import config_of_state, fit_state, read_checkpoint
from wireframe.errors import CheckpointError, MissingPackageError, one_line
from wireframe.perceiver import PerceiverConfig

if TYPE_CHECKING:
    from wireframe.perceiver import Perceiver

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_WEIGHT_BYTES = 4 << 30

# In every float type this buffer would be another encoding than the one the weights were trained with.
_KEEP_FLOAT32 = "tokenizer.pos_enc.B"

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
    encode = _package("safetensors.torch", "saving a model").save
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().to("cpu", tensor.dtype if dtype is None or name == _KEEP_FLOAT32 else dtype)
        tensors[name] = tensor.contiguous()
    files = {
        WEIGHTS: encode(tensors, metadata={"format": "pt"}),
        CONFIG: (json.dumps(model.config.to_dict(), indent=2, sort_keys=True) + "\n").encode(),
    }
    try:
        _write_directory(directory, files)
    except OSError as error:
        raise CheckpointError(f"cannot write the model to {str(directory)!r}: {error.strerror}") from error


def _write_directory(directory: Path, files: dict[str, bytes]) -> None:
    """Put the files into the directory; a reader never sees a half-written one, nor a new directory half full."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = directory.parent / f".{directory.name}.{secrets.token_hex(6)}.tmp"
    staging.mkdir()
    try:
        for name, data in files.items():
            with open(staging / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        if not directory.exists():
            os.rename(staging, directory)
            return
        for name in files:
            os.replace(staging / name, directory / name)
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


def _load_directory(cls: type[Perceiver], weights: Path, config_path: Path | None) -> Perceiver:
    load = _package("safetensors.torch", "loading a model").load_file
    label = f"model {str(weights)!r}"
    try:
        if weights.stat().st_size > MAX_WEIGHT_BYTES:
            raise CheckpointError(f"{label} is over the limit of {MAX_WEIGHT_BYTES} bytes")
        state = load(weights, device="cpu")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{label} is not a readable safetensors file") from error
    config = _read_config(config_path) if config_path is not None else config_of_state(state)
    return _build(cls, config, state, label)


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
