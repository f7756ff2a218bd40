"""What the training step asks of a GPU, by kind of operation: the traces of ``wireframe bench step --model``.

Every stage of the published recipe, ours and plain PyTorch. The figures follow from shapes: they repeat exactly.
"""

from __future__ import annotations

import importlib.metadata

from wireframe.bench.guard_values import Counted, Figures, NotComparable

STAGES = (1, 2, 3)


def made_with() -> dict[str, str]:
    """ATen's own operations, and what they decompose to, are those of a version of torch."""
    from wireframe.kernels import dispatch

    if dispatch.choose("qk_norm_attention", "auto", "meta") != "triton":
        raise NotComparable("our launches are planned by triton, which is not installed; run: pip install triton")
    # Without what is behind a plus: which build it is does not count.
    return {"torch": importlib.metadata.version("torch").partition("+")[0]}


def measure(stages: tuple[int, ...] = STAGES) -> Figures:
    """Launches, products and bytes of every kind of operation of a step."""
    from wireframe.bench.step_cases import STEPS, traced

    found: Figures = {}
    for of in STEPS:
        for stage in stages:
            for row in traced(of, stage).rows:
                name = f"{of}, stage {stage}, {row.part}: {row.name}"
                sums = found.setdefault(name, {"launches": 0, "flops": 0, "bytes": 0})
                sums["launches"] += row.launches
                # Whole numbers: every formula counts operations.
                sums["flops"] += int(row.flops)
                sums["bytes"] += row.moved
    return dict(sorted(found.items()))


STEP = Counted("step", made_with, measure)
