"""The training set in memory, and batches that are functions of (seed, step) alone."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import torch
from torch import Tensor

from wireframe import hashing
from wireframe.errors import SampleError
from wireframe.predict import model_inputs
from wireframe.samples import iter_sample_rows, read_sample
from wireframe.sampling import SampledScene
from wireframe.train.config import AugmentConfig


class TrainingSet:
    """Sampled scenes as stacked arrays.

    Attributes:
        order_ids: list of N scene ids, sorted, so that the order of files on disk does not matter.
        inputs: name -> tensor [N, T, ...] of every model input.
        segments: float32 [N, S, 2, 3] normalised, zero-padded; segment_mask: bool [N, S].
    """

    def __init__(self, scenes: list[SampledScene], max_segments: int):
        scenes = sorted(scenes, key=lambda scene: scene.order_id)
        if not scenes:
            raise SampleError("the training set is empty; make one with `wireframe prepare`")
        sizes = {len(scene.mask) for scene in scenes}
        if len(sizes) > 1:
            raise SampleError(f"rows of one training set must have one number of points, found {sorted(sizes)}")
        self.order_ids = [scene.order_id for scene in scenes]
        self.keys = np.array([hashing.scene_key(order_id) for order_id in self.order_ids], dtype=np.uint64)
        self.inputs = model_inputs(scenes)
        self.segments = torch.zeros(len(scenes), max_segments, 2, 3)
        self.segment_mask = torch.zeros(len(scenes), max_segments, dtype=torch.bool)
        for i, scene in enumerate(scenes):
            count = len(scene.gt_segments)
            self.segments[i, :count] = torch.from_numpy(scene.gt_segments)
            self.segment_mask[i, :count] = True

    def __len__(self) -> int:
        return len(self.order_ids)

    @property
    def points(self) -> int:
        return self.inputs["mask"].shape[1]

    def fingerprint(self) -> str:
        """SHA-256 of the scene ids, inputs and targets, in their order."""
        digest = hashlib.sha256("\n".join(self.order_ids).encode())
        for tensor in (*self.inputs.values(), self.segments, self.segment_mask):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def batch(
        self, seed: int, stage: int, step: int, start: int, size: int, augment: AugmentConfig
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The batch of one step.

        Args:
            seed, stage: the random key of the epochs' orders.
            step: global step; with the seed and the scene, the key of the augmentation.
            start: how many scenes the stage's earlier steps took; epochs follow one another without a gap.
            size: B.
            augment: which augmentations to use.

        Returns:
            inputs name -> [B, T, ...], target segments float32 [B, S, 2, 3], target mask bool [B, S].
        """
        index = self._order(seed, stage, start, size)
        inputs = {name: tensor[index] for name, tensor in self.inputs.items()}
        turn = self._turns(seed, step, index.numpy(), augment)
        inputs["xyz_norm"] = torch.einsum("btc,bdc->btd", inputs["xyz_norm"], turn)
        segments = torch.einsum("bsec,bdc->bsed", self.segments[index], turn)
        return inputs, segments, self.segment_mask[index]

    def _order(self, seed: int, stage: int, start: int, size: int) -> Tensor:
        """Scenes ``start .. start + size`` of the endless sequence of shuffled epochs."""
        positions = np.arange(start, start + size)
        index = np.empty(size, dtype=np.int64)
        for epoch in np.unique(positions // len(self)):
            keys = hashing.hash64(seed, int(epoch), hashing.EPOCH_ORDER + stage, self.keys)
            here = positions // len(self) == epoch
            index[here] = np.argsort(keys, kind="stable")[positions[here] % len(self)]
        return torch.from_numpy(index)

    def _turns(self, seed: int, step: int, index: np.ndarray, augment: AugmentConfig) -> Tensor:
        """float32 [B, 3, 3]: a rotation about y and perhaps a mirrored x, by (seed, step, scene)."""
        turn = np.zeros((len(index), 3, 3))
        for row, scene in enumerate(index):
            key = int(self.keys[scene])
            angle, coin = hashing.uniform(seed, key, hashing.AUGMENTATION + step, 2)
            angle = 2 * np.pi * angle if augment.rotate else 0.0
            mirror = -1.0 if augment.flip and coin < 0.5 else 1.0
            c, s = np.cos(angle), np.sin(angle)
            turn[row] = [[c * mirror, 0, s], [0, 1, 0], [-s * mirror, 0, c]]
        return torch.from_numpy(turn.astype(np.float32))


def load_training_set(source: str | os.PathLike, max_segments: int) -> TrainingSet:
    """All sampled rows of ``source`` with 1 to ``max_segments`` ground-truth edges.

    Raises:
        ShardError, SampleError: nothing readable is there, or rows of different sizes are mixed.
    """
    scenes = [read_sample(row) for row in iter_sample_rows(source)]
    return TrainingSet([scene for scene in scenes if 0 < len(scene.gt_segments) <= max_segments], max_segments)
