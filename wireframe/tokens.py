"""Tokens of a labelled point: position, Fourier features, embeddings of its labels and its votes.

Source: S23DR 2026 baseline (``behind_emb_dim=8, vote_features=True``). The first linear map has one column a number of
a token, in the order

    xyz 3 | sin 32 | cos 32 | embedding of class_id 16 | of source 2 | of behind 8 | views 1 | fraction 1

Tokens themselves are never made: an embedding is a one-hot row times a table, so the map is folded with the tables and
multiplies ``ops.point_features``, which depend on no parameter. The gradients of tables and bias then are columns of
that of the folded map, one product with sums in a fixed order instead of a scattered one over all points.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from wireframe.classes import GESTALT_NAMES, POINT_CLASSES
from wireframe.kernels import ops
from wireframe.kernels.point_features_reference import feature_width
from wireframe.kernels.tensors import without_autocast
from wireframe.layers import Table

FOURIER_BANDS = 32
FOURIER_SIGMA = 10.0
LABEL_DIM = 16
SOURCES = 2
SOURCE_DIM = 2

# Rows of the tables: class_id, source, behind (0: nothing).
LABELS = (len(POINT_CLASSES), SOURCES, len(GESTALT_NAMES) + 1)

# The arrays of a sampled row that the model reads.
MODEL_INPUTS = ("xyz_norm", "class_id", "source", "mask", "behind", "n_views_voted", "vote_frac")


def token_width(behind_emb_dim: int) -> int:
    """Numbers per token: 95 with the published ``behind_emb_dim`` of 8."""
    return 3 + 2 * FOURIER_BANDS + LABEL_DIM + SOURCE_DIM + behind_emb_dim + 2


class Frequencies(nn.Module):
    """Fixed random frequencies B [32, 3] of the Fourier features, in cycles per unit of length."""

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


class Tokenizer(nn.Module):
    """Frequencies and tables of the tokens; what the first linear map reads, and that map as it reads it."""

    def __init__(self, behind_emb_dim: int = 8) -> None:
        super().__init__()
        classes, sources, behind = LABELS
        self.pos_enc = Frequencies()
        self.label_emb = Table(classes, LABEL_DIM)
        self.src_emb = Table(sources, SOURCE_DIM)
        self.behind_emb = Table(behind, behind_emb_dim)

    def features(self, batch: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows of a batch's points, whose product with ``fold``'s weight is that of the tokens with the map.

        Args:
            batch: xyz_norm float32 [B, T, 3]; class_id uint8, source uint8, mask bool, behind int16 (-1 reads row 0),
                n_views_voted uint8, vote_frac float32 [B, T]. Other keys are ignored.
            dtype: of the result.

        Returns:
            [B, T, 128], columns as ``ops.point_features`` says; zeros for a masked point, whatever it holds.

        Raises:
            ValueError: a missing key, a wrong shape or (seen on the CPU only) a label out of its table.
        """
        check_batch(batch)
        self._check_labels(batch)
        return ops.point_features(
            batch["xyz_norm"], batch["class_id"], batch["source"], batch["behind"], batch["n_views_voted"],
            batch["vote_frac"], batch["mask"], self.pos_enc.B, labels=LABELS, dtype=dtype,
        )  # fmt: skip

    def fold(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The first linear map as a weight for ``features``: rows x weight^T = tokens x W^T + bias.

        Args:
            weight: [ff, 95] (``token_width(behind_emb_dim)``). bias: [ff] or None.
            dtype: of the result; computed in float32 (in float64 for float64) and rounded once.

        Returns:
            [ff, 128], differentiable in weight, bias and the tables.
        """
        working = torch.float64 if torch.float64 in (weight.dtype, dtype) else torch.float32
        tables = [table.weight.to(working) for table in (self.label_emb, self.src_emb, self.behind_emb)]
        dims = sum(table.shape[1] for table in tables)
        xyz, waves, embedded, votes = weight.to(working).split([3, 2 * FOURIER_BANDS, dims, 2], 1)
        bias = weight.new_zeros(len(weight), dtype=working) if bias is None else bias.to(working)
        columns = [waves, xyz, votes, bias[:, None]]
        # Rows without an embedding become the columns of zeros at the end.
        rest = feature_width(FOURIER_BANDS, LABELS) - sum(part.shape[1] for part in columns) - sum(LABELS)
        rows = torch.block_diag(*tables, tables[0].new_zeros(rest, 0))
        with without_autocast(weight.device.type):
            columns.append(embedded @ rows.T)
        return torch.cat(columns, 1).to(dtype)

    def _check_labels(self, batch: Mapping[str, Tensor]) -> None:
        # Reading a value back from a GPU would stop its queue (and is impossible while a graph is captured).
        if batch["behind"].device.type != "cpu" or torch.compiler.is_compiling():
            return
        behind = batch["behind"].clamp_min(0)
        tables = (("class_id", batch["class_id"], self.label_emb), ("source", batch["source"], self.src_emb),
                  ("behind", behind, self.behind_emb))
        for key, values, table in tables:
            # Comparisons are vectorised; minima of such whole numbers are not.
            if bool(((values < 0) | (values >= table.num_embeddings)).any()):
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
