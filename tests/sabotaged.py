"""``python sabotaged.py WHAT ...``: the command ``wireframe ...`` with one clause of the determinism contract broken.

What the tests of the contract must notice, they are shown here; WHAT "nothing" breaks nothing.
"""

import os
import sys

import torch

from wireframe.cli import main
from wireframe.kernels import ops
from wireframe.train import checkpoints, loop, step


def unseeded_dropout():
    ops.step_keys = lambda keys, *_: torch.tensor(
        [int.from_bytes(os.urandom(8), "little", signed=True) for _ in keys], device=keys.device
    )


def shuffled_sum():
    def total(parts):
        order = sorted(range(len(parts)), key=lambda _: os.urandom(8))
        result = parts[order[0]]
        for index in order[1:]:
            result = result + parts[index]
        return result

    step.tree_sum = total


def sum_by_rank():
    """Every rank rounds its own sum to bfloat16 before the others see it, as a compressing network would."""
    gather = loop.Ranks.gather

    def rounded(self, mine):
        total = mine.sum(0, keepdim=True).bfloat16().float() if mine.dim() == 2 else mine
        return gather(self, total)

    loop.Ranks.gather = rounded


def own_folders():
    """Every rank has a folder of its own, as on machines that share no disk."""
    out = sys.argv.index("--out") + 1
    sys.argv[out] += "-" + os.environ["RANK"]


def forgotten_moments():
    load = checkpoints.load

    def forget(path, optimizer, *arguments):
        state = load(path, optimizer, *arguments)
        optimizer.exp_avg.zero_()
        return state

    checkpoints.load = forget


if __name__ == "__main__":
    faults = (unseeded_dropout, shuffled_sum, sum_by_rank, own_folders, forgotten_moments)
    what = {fault.__name__: fault for fault in faults}
    if sys.argv[1] != "nothing":
        what[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
