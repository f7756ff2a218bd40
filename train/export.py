"""A trained model as the package ships it: ``python -m wireframe.train.export MODEL ROWS FOLDER [DTYPE]``.

Writes ``model.safetensors`` (float16, or DTYPE bfloat16) and ``config.json``, the model's ``graph.json`` where it has
one, and ``dummies.npz``: what the dummies know of the rows it was trained on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from wireframe.perceiver import Perceiver
from wireframe.pretrained import read_graph, save_graph
from wireframe.rivals import save_dummies
from wireframe.samples import iter_sample_rows, read_sample

# The nearest-wireframe dummy knows this many training scenes: enough to be fair, small enough to ship.
DUMMY_SCENES = 1000


def export(model: Path, rows: Path, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the files of the folder, others in it stay."""
    Perceiver.from_pretrained(model).save_pretrained(folder, dtype=dtype)
    graph = read_graph(model)
    if graph:
        save_graph(graph, folder)
    scenes = (read_sample(row) for _, row in zip(range(DUMMY_SCENES), iter_sample_rows(rows)))
    save_dummies(folder / "dummies.npz", scenes)


if __name__ == "__main__":
    *paths, name = sys.argv[1:] if len(sys.argv) > 4 else [*sys.argv[1:], "float16"]
    export(*map(Path, paths), getattr(torch, name))
