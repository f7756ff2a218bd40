"""The Perceiver of the S23DR 2026 baseline: labelled points in, 3D segments with confidences out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from wireframe.errors import ConfigError
from wireframe.kernels import ops
from wireframe.layers import Layer, Linear, RMSNorm, Table, run_layers
from wireframe.segments import decode_segments
from wireframe.tokens import Tokenizer, token_width

# No model comes near these; a configuration from outside that does would only exhaust the memory.
MAX_SIZE = 1 << 16
MAX_LAYERS = 256


@dataclass(frozen=True)
class PerceiverConfig:
    """Architecture of the model; the defaults are the published ones.

    hidden: width of latents and queries. ff: inner width of the feed-forward blocks and of the input projection.
    latent_layers: latent layer i reads the points where i = 0, i = latent_layers - 1 or i is a multiple of
    cross_attn_interval. kv_heads_cross, kv_heads_self: key/value heads, divisors of num_heads. segments: queries,
    so the most segments a scene can get. num_points: how many points a raw scene is sampled to for this model.

    Raises ConfigError for a value that cannot be built.
    """

    hidden: int = 256
    ff: int = 1024
    latent_tokens: int = 256
    latent_layers: int = 7
    decoder_layers: int = 3
    cross_attn_interval: int = 4
    num_heads: int = 4
    kv_heads_cross: int = 2
    kv_heads_self: int = 2
    dropout: float = 0.1
    segments: int = 64
    behind_emb_dim: int = 8
    num_points: int = 4096

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "dropout":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                    raise ConfigError(f"model config: dropout must be a number in [0, 1), got {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"model config: {field.name} must be a positive integer, got {value!r}")
            elif value > (cap := MAX_LAYERS if field.name.endswith("_layers") else MAX_SIZE):
                raise ConfigError(f"model config: {field.name} must be at most {cap}, got {value}")
        if self.hidden % self.num_heads:
            raise ConfigError(f"model config: hidden {self.hidden} is no multiple of num_heads {self.num_heads}")
        for name in ("kv_heads_cross", "kv_heads_self"):
            if self.num_heads % getattr(self, name):
                raise ConfigError(
                    f"model config: num_heads {self.num_heads} is no multiple of {name} {getattr(self, name)}"
                )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    def reads_points(self, layer: int) -> bool:
        """Whether latent layer ``layer`` has cross-attention to the points."""
        return layer % self.cross_attn_interval == 0 or layer == self.latent_layers - 1

    @classmethod
    def from_dict(cls, values: Mapping) -> PerceiverConfig:
        """A config from a mapping; absent fields keep their defaults, unknown keys are a ConfigError."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"model config: expected a mapping, got {type(values).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ConfigError(f"model config: unknown key {unknown[0]!r}; known keys: {', '.join(known)}")
        return cls(**values)

    def to_dict(self) -> dict:
        """Plain values by field name; ``from_dict`` reverses it."""
        return dataclasses.asdict(self)


class Prediction(NamedTuple):
    """segments: [B, S, 2, 3] endpoints, normalised coordinates; conf: [B, S] logits."""

    segments: Tensor
    conf: Tensor


class Segmenter(nn.Module):
    """Points to segments: latents read the points, queries read the latents."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        width, hidden = token_width(config.behind_emb_dim), config.hidden
        self.dropout = config.dropout
        self.input_proj = nn.Sequential(
            nn.Linear(width, config.ff), nn.GELU(), Linear(config.ff, hidden), RMSNorm(hidden)
        )
        sizes = (hidden, config.ff, config.num_heads, config.kv_heads_cross, config.kv_heads_self, config.dropout)
        self.latent_embed = Table(config.latent_tokens, hidden)
        self.latent_layers = nn.ModuleList(
            Layer(*sizes, cross=config.reads_points(i), index=i) for i in range(config.latent_layers)
        )
        self.query_embed = Table(config.segments, hidden)
        self.decoder_layers = nn.ModuleList(
            Layer(*sizes, cross=True, index=config.latent_layers + i) for i in range(config.decoder_layers)
        )
        self.segment_head = nn.Linear(hidden, 7)
        # Row 0 alone is used; the published checkpoints hold two rows.
        self.query_offsets = nn.Parameter(torch.empty(config.segments, 2, 3))
        self.conf_head = nn.Linear(hidden, 1)
        self._init_heads()

    def _init_heads(self) -> None:
        if self.query_offsets.is_meta:
            return
        nn.init.trunc_normal_(self.segment_head.weight, std=1e-3)
        nn.init.zeros_(self.segment_head.bias)
        with torch.no_grad():
            self.segment_head.bias[6] = 0.5
        nn.init.normal_(self.query_offsets, std=0.05)
        nn.init.zeros_(self.conf_head.bias)

    @property
    def dtype(self) -> torch.dtype:
        """What the large products are computed in."""
        return self.input_proj[2].weight.dtype

    def forward(
        self,
        features: Tensor,  # [B, T, width]
        weight: Tensor,  # [ff, width]
        mask: Tensor,  # [B, T] bool
        dropout_keys: Tensor | None = None,  # [B] int64
    ) -> Prediction:
        """Features of points and the first linear map as they read it come from the tokenizer."""
        batch = len(features)
        if dropout_keys is None and self.training and self.dropout > 0:
            dropout_keys = torch.randint(-(1 << 63), (1 << 63) - 1, (batch,), device=features.device)
        points = self.input_proj[2](ops.linear_gelu(features, weight))
        points = self.input_proj[3](points, self.dtype)
        latents = run_layers(self.latent_layers, self.latent_embed.weight, points, mask, dropout_keys)
        # The heads stay in float32: in bfloat16 a midpoint would be off by centimetres.
        queries = run_layers(
            self.decoder_layers, self.query_embed.weight, latents.to(self.dtype), None, dropout_keys
        )
        segments = decode_segments(self.segment_head(queries), self.query_offsets[:, 0])
        return Prediction(segments, self.conf_head(queries).squeeze(-1).to(segments.dtype))


@contextmanager
def _private_randomness(seed: int) -> Iterator[None]:
    """Run with torch's CPU generator seeded, and give it back as it was."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


class Perceiver(nn.Module):
    """Sampled points of a batch of scenes to 3D segments.

    Args:
        config: PerceiverConfig, a mapping with its fields, or None for the published model (8.85 M parameters).
        seed: of the initial weights; the global random state is neither read nor changed.

    The initial prediction does not depend on the points: the last linear map of every branch starts at zero.
    """

    def __init__(self, config: PerceiverConfig | Mapping | None = None, *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(config, PerceiverConfig):
            config = PerceiverConfig.from_dict(config or {})
        self.config = config
        with _private_randomness(seed):
            self.tokenizer = Tokenizer(config.behind_emb_dim)
            self.segmenter = Segmenter(config)

    def forward(self, batch: Mapping[str, Tensor], dropout_keys: Tensor | None = None) -> Prediction:
        """Segments of a batch of scenes.

        Args:
            batch: arrays of sampled rows as tensors with a batch axis: xyz_norm float32 [B, T, 3]; class_id
                uint8, source uint8, mask bool, behind int16, n_views_voted uint8, vote_frac float32 [B, T].
                Other keys are ignored, and so is all that a masked point holds.
            dropout_keys: int64 [B], for example of ``ops.step_keys``: a scene's dropout masks are a function of its
                key alone. None: drawn from torch's generator of the device. Used in training mode only.

        Returns:
            Prediction(segments [B, S, 2, 3] in normalised coordinates, conf [B, S] logits), float32.

        Raises:
            ValueError: a missing key, a wrong shape or (seen on the CPU only) a label out of its table.
        """
        first = self.segmenter.input_proj[0]
        features = self.tokenizer.features(batch, self.segmenter.dtype)
        weight = self.tokenizer.fold(first.weight, first.bias, self.segmenter.dtype)
        return self.segmenter(features, weight, batch["mask"], dropout_keys)

    def save_pretrained(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write ``model.safetensors`` and ``config.json`` (the layout of huggingface_hub's mixin), atomically.

        Args:
            directory: created if absent; files of these names in it are replaced.
            dtype: stored type of the weights (for example torch.float16), default as they are; the Fourier
                frequencies stay float32.

        Raises:
            CheckpointError: the directory cannot be written, or dtype is not a floating type.
            MissingPackageError: safetensors is not installed.
        """
        from wireframe.pretrained import save_pretrained

        save_pretrained(self, Path(directory), dtype)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, revision: str | None = None) -> Perceiver:
        """The model of a directory written by ``save_pretrained`` (or the mixin), or of a Hub id "owner/repo".

        On the CPU, in eval mode, float32.

        Raises:
            CheckpointError: files are missing or do not fit the model.
            ConfigError: config.json holds an unknown key or an impossible value.
            MissingPackageError: safetensors (or, for a Hub id, huggingface_hub) is not installed.
        """
        from wireframe.pretrained import load_pretrained

        return load_pretrained(cls, source, revision)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Perceiver:
        """The model of a published ``.pt`` file, of a directory of ours, or of ``hf://owner/repo/file.pt``.

        The pickle inside a ``.pt`` is read by a restricted loader: tensors and plain containers; nothing in it
        is executed. On the CPU, in eval mode, float32.

        Raises:
            CheckpointError: the file cannot be read, is not safe, or does not fit the model.
            MissingPackageError: huggingface_hub is needed for ``hf://`` and not installed.
        """
        from wireframe.pretrained import load_checkpoint

        return load_checkpoint(cls, path)
