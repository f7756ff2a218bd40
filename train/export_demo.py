"""Puts a trained model and its dummies where the demo finds them: ``python -m wireframe.train.export_demo``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from wireframe.perceiver import Perceiver
from wireframe.rivals import save_dummies
from wireframe.samples import iter_sample_rows, read_sample

# The nearest-wireframe dummy knows this many training scenes: enough to be fair, small enough to ship.
DUMMY_SCENES = 1000


def export_demo(model: Path, rows: Path, assets: Path) -> None:
    """Writes ``assets/demo_model`` (float16 safetensors) and ``assets/demo_dummies.npz``."""
    Perceiver.from_pretrained(model).save_pretrained(assets / "demo_model", dtype=torch.float16)
    scenes = (read_sample(row) for _, row in zip(range(DUMMY_SCENES), iter_sample_rows(rows)))
    save_dummies(assets / "demo_dummies.npz", scenes)


if __name__ == "__main__":
    export_demo(*(Path(argument) for argument in sys.argv[1:4]))
