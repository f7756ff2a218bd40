"""Points for ``ops.point_features``, and how far their features may lie from those in double precision."""

import math

import torch

from kernel_budget import check
from wireframe.kernels import ops

LABELS = (13, 2, 29)
INTEGERS = {"class_id": torch.uint8, "source": torch.uint8, "behind": torch.int16, "n_views_voted": torch.uint8}


def random_points(scenes=2, points=65, bands=32, labels=LABELS, spread=0.3, seed=0):
    """Arguments by name; a third of the points masked, labels over the whole of their tables, some behind nothing."""
    g = torch.Generator().manual_seed(seed)
    shape = (scenes, points)
    limits = {"class_id": (0, labels[0]), "source": (0, labels[1]), "behind": (-1, labels[2]), "n_views_voted": (0, 9)}
    return {
        "xyz": torch.randn(*shape, 3, generator=g) * spread,
        **{name: torch.randint(*limits[name], shape, generator=g).to(dtype) for name, dtype in INTEGERS.items()},
        "vote_frac": torch.rand(shape, generator=g),
        "mask": torch.rand(shape, generator=g) > 0.3,
        "frequencies": torch.randn(bands, 3, generator=g) * 10,
    }


def features(inputs, impl="triton", labels=LABELS, dtype=torch.float32):
    return ops.point_features(**inputs, labels=labels, dtype=dtype, impl=impl)


def double(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


def exactly(inputs, labels=LABELS):
    return features(double(inputs), "reference", labels, torch.float64)


def rounded_angles(inputs):
    """float32 [B, T, F], rounded one operation after the other, of the points that are not masked, else 0."""
    x = torch.where(inputs["mask"][..., None], inputs["xyz"], 0.0) * torch.tensor(2 * math.pi)
    terms = x[..., None, :] * inputs["frequencies"]
    return terms[..., 0] + terms[..., 1] + terms[..., 2]


def budget(inputs, found, labels=LABELS):
    """Used share of the budget. One rounding of every operation moves an angle by eps(float32) times its terms."""
    exact, eager = exactly(inputs, labels), features(inputs, "reference", labels, found.dtype)
    eps, bands = torch.finfo(found.dtype).eps, len(inputs["frequencies"])
    x = torch.where(inputs["mask"][..., None], inputs["xyz"].double(), 0.0)
    terms = 2 * math.pi * x.abs() @ inputs["frequencies"].double().abs().T
    scale = exact.abs()
    # A wave's own rounding counts 1.
    moved = torch.where(inputs["mask"][..., None], (terms + 1) * torch.finfo(torch.float32).eps / eps, 0.0)
    scale[..., : 2 * bands] += moved.repeat(1, 1, 2)
    # The mean is near 2.7 and 0.5.
    scale[..., 2 * bands + 3 : 2 * bands + 5] += 3 * inputs["mask"][..., None] * torch.finfo(torch.float32).eps / eps
    return check("features", found, exact, eager, scale, eps)


def same(first, second):
    return first.dtype == second.dtype and torch.equal(first, second)
