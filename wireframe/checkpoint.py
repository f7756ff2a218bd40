"""Published checkpoints (``{"model": state, "args": {...}}``): safe reading, writing, the architecture, and the fit.

State-dict names are those of the S23DR 2026 baseline; ``_orig_mod.``, which torch.compile inserts, is removed.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from wireframe.errors import CheckpointError, ConfigError
from wireframe.perceiver import PerceiverConfig
from wireframe.torch_zip import Inert, StoredTensor, TorchZip

_LISTED = 4

# Recorded arguments under which the published model would compute something else.
_FIXED_ARGS = {"segment_param": "midpoint_dir_len", "activation": "gelu", "vote_features": True, "rms_norm": True,
               "segment_conf": True}


class Checkpoint(NamedTuple):
    """state: name to tensor (CPU, stored dtypes); args: the recorded arguments, plain values and strings only."""

    state: dict[str, Tensor]
    args: dict[str, object]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a ``.pt`` file of torch.save without executing anything in it.

    Unknown globals under ``args`` become inert strings; anywhere else they are refused.

    Raises:
        CheckpointError: not such a file, damaged, over the caps, or with an unknown global outside ``args``.
    """
    label = Path(path).name
    with TorchZip(path) as archive:
        root = archive.load()
        _refuse_globals(_outside_args(root), label)
        if not isinstance(root, dict) or not isinstance(root.get("model"), dict):
            raise CheckpointError(f"checkpoint {label!r} has no dict under 'model'; found {_describe(root)}")
        stored: dict[str, StoredTensor] = {}
        for name, value in root["model"].items():
            if type(name) is not str or not isinstance(value, StoredTensor):
                raise CheckpointError(f"checkpoint {label!r} holds under 'model' something that is not a tensor")
            plain = name.replace("_orig_mod.", "")
            if plain in stored:
                raise CheckpointError(f"checkpoint {label!r} holds {plain[:80]!r} twice")
            stored[plain] = value
        state = {name: archive.tensor(value) for name, value in stored.items()}
    return Checkpoint(state, _plain_args(root.get("args")))


def encode_checkpoint(state: Mapping[str, Tensor], config: PerceiverConfig, args: Mapping[str, object]) -> bytes:
    """The bytes of a ``.pt`` file in the published naming, which ``read_checkpoint`` and ``torch.load`` read.

    Args:
        state: name to tensor; stored on the CPU in its dtype.
        config: recorded under "args", with the variant of the published model that this one is.
        args: further plain values for "args".
    """
    # Memory of its own each: of a view torch.save writes all that it is a view of.
    weights = {
        name: tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, tensor in state.items()
    }
    buffer = io.BytesIO()
    torch.save({"model": weights, "args": {**_FIXED_ARGS, **config.to_dict(), **args}}, buffer)
    return buffer.getvalue()


def tensor_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal SHA-256 over name, dtype, shape and bytes of every tensor, by name; no file format is part of it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu")
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{shape}\0".encode(errors="surrogatepass"))
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _describe(root: object) -> str:
    if isinstance(root, dict):
        keys = [key[:40] for key in root if type(key) is str][:6]
        return f"keys {', '.join(map(repr, keys))}" if keys else "an empty dict"
    return f"a {type(root).__name__}"


def _outside_args(root: object) -> list:
    if not isinstance(root, dict):
        return [root]
    return [*root.keys(), *(value for key, value in root.items() if key != "args"), *_attributes(root)]


def _attributes(value: object) -> Iterable:
    # An OrderedDict carries attributes (a state dict's _metadata).
    return vars(value).values() if hasattr(value, "__dict__") and isinstance(value, dict) else ()


def _refuse_globals(values: Iterable, label: str) -> None:
    """CheckpointError where an Inert (class or instance) is reachable; iterative, each object once."""
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        if isinstance(value, Inert) or (isinstance(value, type) and issubclass(value, Inert)):
            raise CheckpointError(
                f"checkpoint {label!r} refers to {value.name[:120]!r} outside 'args'; only tensors and plain "
                f"containers are read"
            )
        if isinstance(value, (dict, list, tuple, set, frozenset)) and id(value) not in seen:
            seen.add(id(value))
            pending.extend(value)
            if isinstance(value, dict):
                pending.extend(value.values())
                pending.extend(_attributes(value))


def _plain_args(args: object) -> dict[str, object]:
    """Top-level arguments by name; whatever is no number, string or None becomes a string naming its type."""
    if isinstance(args, Inert):
        args = args.state
    if not isinstance(args, dict):
        return {}
    plain = {}
    for key, value in args.items():
        if type(key) is not str:
            continue
        if value is None or type(value) in (bool, int, float, str):
            plain[key] = value
        elif isinstance(value, Inert) or (isinstance(value, type) and issubclass(value, Inert)):
            plain[key] = f"<{value.name}>"
        else:
            plain[key] = f"<{type(value).__name__}>"
    return plain


def config_of_state(state: Mapping[str, Tensor], args: Mapping[str, object] | None = None) -> PerceiverConfig:
    """The architecture that a state dict belongs to.

    Sizes come from the tensors; dropout, the number of points, and the cross-attention interval where several fit,
    from ``args`` or else the published defaults. A size whose tensor is missing takes its published default too.

    Raises:
        CheckpointError: the sizes contradict one another, or ``args`` names a variant that is not this model.
    """
    args = args or {}
    _refuse_variants(args)
    default = PerceiverConfig()

    def size(name: str, axis: int, fallback: int) -> int:
        tensor = state.get(name)
        return tensor.shape[axis] if tensor is not None and tensor.dim() > axis else fallback

    layer = "segmenter.latent_layers.0"

    def kv_heads(block: str, fallback: int) -> int:
        return size(f"{layer}.{block}.attn.k_proj.weight", 0, fallback * head_dim) // head_dim

    hidden = size("segmenter.latent_embed.weight", 1, default.hidden)
    scale = state.get(f"{layer}.self_attn.attn.log_scale")
    heads = scale.numel() if scale is not None and scale.numel() else default.num_heads
    head_dim = max(1, hidden // heads)
    latent_layers = _count_layers(state, "latent_layers") or default.latent_layers
    dropout, points = args.get("dropout", default.dropout), args.get("num_points", default.num_points)
    try:
        return PerceiverConfig(
            hidden=hidden,
            ff=size(f"{layer}.ffn.ffn.linear1.weight", 0, default.ff),
            latent_tokens=size("segmenter.latent_embed.weight", 0, default.latent_tokens),
            latent_layers=latent_layers,
            decoder_layers=_count_layers(state, "decoder_layers") or default.decoder_layers,
            cross_attn_interval=_interval(state, latent_layers, args.get("cross_attn_interval")),
            num_heads=heads,
            kv_heads_cross=kv_heads("cross", default.kv_heads_cross),
            kv_heads_self=kv_heads("self_attn", default.kv_heads_self),
            dropout=dropout if type(dropout) in (int, float) else default.dropout,
            segments=size("segmenter.query_embed.weight", 0, default.segments),
            behind_emb_dim=size("tokenizer.behind_emb.weight", 1, default.behind_emb_dim),
            num_points=points if type(points) is int and points > 0 else default.num_points,
        )
    except ConfigError as error:
        raise CheckpointError(f"checkpoint does not describe this model: {error}") from error


def _refuse_variants(args: Mapping[str, object]) -> None:
    for key, value in _FIXED_ARGS.items():
        if key in args and args[key] != value:
            raise CheckpointError(f"checkpoint was trained with {key}={args[key]!r:.60}; only {value!r} is supported")


def _indices(state: Mapping[str, Tensor], pattern: str) -> set[int]:
    matches = (re.match(pattern, name, re.ASCII) for name in state)
    return {int(match.group(1)) for match in matches if match}


def _count_layers(state: Mapping[str, Tensor], stack: str) -> int:
    # Counted, not the largest index: a file may name any index.
    return len(_indices(state, rf"segmenter\.{stack}\.(\d{{1,6}})\."))


def _interval(state: Mapping[str, Tensor], latent_layers: int, recorded: object) -> int:
    """An interval that puts cross-attention where the state has it: the recorded, the published, the smallest."""
    found = _indices(state, r"segmenter\.latent_layers\.(\d{1,6})\.cross\.")
    published = PerceiverConfig().cross_attn_interval
    candidates = [recorded] if type(recorded) is int and recorded > 0 else []
    for interval in [*candidates, published, *range(1, latent_layers + 1)]:
        config = PerceiverConfig(latent_layers=latent_layers, cross_attn_interval=interval)
        if {i for i in range(latent_layers) if config.reads_points(i)} == found:
            return interval
    return published


def fit_state(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """The tensors of ``state`` in float32, checked against the names and shapes of ``expected``.

    Raises:
        CheckpointError: one line with the missing, unexpected and ill-shaped tensors.
    """
    problems, fitted = [], {}
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    for name in expected.keys() & state.keys():
        tensor, shape = state[name], expected[name].shape
        # A per-head scale may be stored with broadcast axes.
        if name.endswith(".log_scale") and tensor.numel() == shape.numel():
            tensor = tensor.reshape(shape)
        fitted[name] = tensor
    ill = [f"{name} {list(state[name].shape)} {state[name].dtype} instead of {list(expected[name].shape)} float"
           for name in expected
           if name in fitted and (fitted[name].shape != expected[name].shape or not fitted[name].is_floating_point())]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("ill-shaped", ill)):
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            listed = ", ".join(name.replace("\n", " ")[:120] for name in names[:_LISTED])
            problems.append(f"{len(names)} {kind}: {listed}{more}")
    if problems:
        raise CheckpointError(f"{label} does not fit the model: {'; '.join(problems)}")
    return {name: fitted[name].to(torch.float32).contiguous() for name in expected}
