"""A trained model as the package ships it: ``python -m wireframe.train.export MODEL ROWS FOLDER``.

Writes ``model.safetensors`` (float16 or bfloat16) and ``config.json``, the model's ``graph.json`` where it has
one, and ``dummies.npz``: what the dummies know of the rows it was trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from wireframe.perceiver import Perceiver
from wireframe.pretrained import read_graph, save_graph
from wireframe.rivals import save_dummies
from wireframe.samples import iter_sample_rows, read_sample

# The nearest-wireframe dummy knows this many training scenes: enough to be fair, small enough to ship.
DUMMY_SCENES = 1000


def export(model: Path, rows: Path, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes a trained model, its graph and its dummies into a folder."""
    Perceiver.from_pretrained(model).save_pretrained(folder, dtype=dtype)
    graph = read_graph(model)
    if graph:
        save_graph(graph, folder)
    scenes = (read_sample(row) for _, row in zip(range(DUMMY_SCENES), iter_sample_rows(rows)))
    save_dummies(folder / "dummies.npz", scenes)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m wireframe.train.export", description=export.__doc__)
    parser.add_argument("model", type=Path, help="folder of a trained model")
    parser.add_argument("rows", type=Path, help="what it was trained on")
    parser.add_argument("folder", type=Path, help="where the files go; others in it stay")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16", help="of the weights")
    arguments = parser.parse_args(argv)
    export(arguments.model, arguments.rows, arguments.folder, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
