"""Tokens of a labelled point: position, Fourier features, embeddings of its labels and its votes.

Source: S23DR 2026 baseline (``behind_emb_dim=8, vote_features=True``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wireframe.classes import GESTALT_NAMES, POINT_CLASSES
from wireframe.layers import Table

FOURIER_BANDS = 32
FOURIER_SIGMA = 10.0
LABEL_DIM = 16
SOURCES = 2
SOURCE_DIM = 2

# Mean and spread of the vote features over the training scenes.
VIEWS_MEAN, VIEWS_STD = 2.7, 1.0
FRACTION_MEAN, FRACTION_STD = 0.5, 0.25

# The arrays of a sampled row that the model reads.
MODEL_INPUTS = ("xyz_norm", "class_id", "source", "mask", "behind", "n_views_voted", "vote_frac")


def token_width(behind_emb_dim: int) -> int:
    """Numbers per token: 95 with the published ``behind_emb_dim`` of 8."""
    return 3 + 2 * FOURIER_BANDS + LABEL_DIM + SOURCE_DIM + behind_emb_dim + 2


class FourierFeatures(nn.Module):
    """sin and cos of 2 pi x B^T for fixed random frequencies B [32, 3]."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        frequencies = torch.randn(FOURIER_BANDS, 3, generator=generator, device="cpu") * FOURIER_SIGMA
        self.register_buffer("B", frequencies)

    def _apply(self, fn, recurse: bool = True):
        # Arguments reach hundreds of radians: a half-precision B would be another encoding.
        frequencies = self.B
        super()._apply(fn, recurse)
        if self.B.element_size() < 4:
            self.B = frequencies.to(self.B.device)
        return self

    def forward(self, xyz: Tensor) -> Tensor:
        """[..., 3] to [..., 64]: 32 sines, then 32 cosines, in float32 (float64 for float64)."""
        x = xyz.to(self.B.dtype if xyz.element_size() < 4 else xyz.dtype) * (2.0 * math.pi)
        # Written out instead of a matrix product: TF32 or autocast would ruin arguments of this size.
        b = self.B
        angle = x[..., 0:1] * b[:, 0] + x[..., 1:2] * b[:, 1] + x[..., 2:3] * b[:, 2]
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Tokenizer(nn.Module):
    """Sampled points to tokens [B, T, 95] (``token_width(behind_emb_dim)``)."""

    def __init__(self, behind_emb_dim: int = 8) -> None:
        super().__init__()
        self.pos_enc = FourierFeatures()
        self.label_emb = Table(len(POINT_CLASSES), LABEL_DIM)
        self.src_emb = Table(SOURCES, SOURCE_DIM)
        self.behind_emb = Table(len(GESTALT_NAMES) + 1, behind_emb_dim)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Tokens of a batch.

        Args:
            batch: xyz_norm float32 [B, T, 3]; class_id uint8, source uint8, mask bool, behind int16,
                n_views_voted uint8, vote_frac float32 [B, T]. Other keys are ignored.

        Returns:
            float32 [B, T, 95]: xyz (3), Fourier features (64), embeddings of class_id (16), source (2) and
            behind (8; -1 reads row 0), (n_views_voted - 2.7) / 1.0, (vote_frac - 0.5) / 0.25.

        Raises:
            ValueError: a missing key, a wrong shape or (seen on the CPU only) a label out of its table.
        """
        check_batch(batch)
        xyz = batch["xyz_norm"]
        behind = batch["behind"].clamp_min(0)
        self._check_labels(batch, behind)
        views = (batch["n_views_voted"].to(xyz.dtype) - VIEWS_MEAN) / VIEWS_STD
        fraction = (batch["vote_frac"].to(xyz.dtype) - FRACTION_MEAN) / FRACTION_STD
        return torch.cat([
            xyz,
            self.pos_enc(xyz),
            self.label_emb(batch["class_id"].long()),
            self.src_emb(batch["source"].long()),
            self.behind_emb(behind.long()),
            views[..., None],
            fraction[..., None],
        ], dim=-1)

    def _check_labels(self, batch: Mapping[str, Tensor], behind: Tensor) -> None:
        # Reading a value back from a GPU would stop its queue (and is impossible while a graph is captured).
        if behind.device.type != "cpu" or torch.compiler.is_compiling():
            return
        tables = (("class_id", batch["class_id"], self.label_emb), ("source", batch["source"], self.src_emb),
                  ("behind", behind, self.behind_emb))
        for key, values, table in tables:
            if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < table.num_embeddings:
                raise ValueError(
                    f"batch[{key!r}] holds {int(values.min())} to {int(values.max())}; "
                    f"labels run from 0 to {table.num_embeddings - 1}"
                )


def check_batch(batch: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the key, where a batch does not hold sampled points [B, T]."""
    missing = [key for key in MODEL_INPUTS if key not in batch]
    if missing:
        raise ValueError(f"batch has no {missing[0]!r}; it needs {', '.join(MODEL_INPUTS)}")
    for key in MODEL_INPUTS:
        if not isinstance(batch[key], Tensor):
            raise ValueError(f"batch[{key!r}] must be a tensor, got {type(batch[key]).__name__}")
    xyz = batch["xyz_norm"]
    if xyz.dim() != 3 or xyz.shape[2] != 3 or not xyz.is_floating_point():
        raise ValueError(f"batch['xyz_norm'] must be float [B, T, 3], got {xyz.dtype} {list(xyz.shape)}")
    for key in MODEL_INPUTS[1:]:
        if batch[key].shape != xyz.shape[:2]:
            raise ValueError(f"batch[{key!r}] must be {list(xyz.shape[:2])}, got {list(batch[key].shape)}")
    if batch["mask"].dtype != torch.bool:
        raise ValueError(f"batch['mask'] must be bool, got {batch['mask'].dtype}")
