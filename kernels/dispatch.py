"""Which implementations each operation has, and the choice among them.

An explicit choice is obeyed or refused, never replaced; only ``impl="auto"`` lets this file decide.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from wireframe.errors import WireframeError

NAMES = ("auto", "reference", "native", "triton")

# Best first: "auto" takes the first entry that can run.
BUILT = {
    "parse_points3d": ("native", "reference"),
    "colors_to_ids": ("native", "reference"),
    "house_mask": ("native", "reference"),
    "clip_limits": ("native", "reference"),
    "depth_points": ("native", "reference"),
    "vote_labels": ("native", "reference"),
    "point_tiers": ("native", "reference"),
    "centre_and_scale": ("native", "reference"),
    "priority_sample": ("native", "reference"),
    "farthest_point_sample": ("native", "reference"),
    "voxel_sample": ("native", "reference"),
    "merge_vertices": ("native", "reference"),
    "qk_norm_attention": ("reference",),
    "sinkhorn": ("reference",),
    "segment_cost": ("reference",),
    "segment_matching": ("reference",),
}

# What "native" runs on a CUDA device; the other operations bring such tensors to the CPU and back.
NATIVE_ON_CUDA = (
    "house_mask", "clip_limits", "depth_points", "vote_labels", "point_tiers", "centre_and_scale", "priority_sample",
)

_WORDS = {
    ("native", "cpu"): "C++", ("native", "cuda"): "CUDA",
    ("reference", "cpu"): "NumPy", ("reference", "cuda"): "NumPy, on the CPU",
}  # fmt: skip


class ImplementationError(WireframeError, RuntimeError):
    """The implementation that the caller named cannot run."""


def choose(op: str, impl: str, device: str = "cpu") -> str:
    """The name of the implementation of ``op`` to run for the caller's ``impl``.

    Args:
        device: type of the device that holds the inputs.

    Raises:
        ValueError: ``impl`` is not one of ``NAMES``.
        ImplementationError: ``impl`` is named explicitly and is not built for this operation, or cannot run here.
    """
    if impl not in NAMES:
        raise ValueError(f"{op}: unknown impl {impl!r}; choose one of {', '.join(NAMES)}")
    built = BUILT[op]
    if impl == "auto":
        return next(name for name in built if _problem(op, name, device) is None)
    if impl not in built:
        raise ImplementationError(
            f"{op}: impl {impl!r} is not built into this version; available: {', '.join(built)}, or 'auto'"
        )
    problem = _problem(op, impl, device)
    if problem is not None:
        raise ImplementationError(f"{op}: impl {impl!r} cannot run: {problem}")
    return impl


def _problem(op: str, name: str, device: str) -> str | None:
    """Why implementation ``name`` of ``op`` cannot run on the device, None where it can."""
    if name != "native":
        return None
    from wireframe.kernels import native

    if device == "cpu" or op not in NATIVE_ON_CUDA:
        return native.problem("_C")
    if device == "cuda":
        return native.problem("_C_cuda")
    return f"it has no native implementation for {device} tensors"


def fusion_module(impl: str, device: str) -> ModuleType:
    """The module with the resolved implementation of fusion and sampling: all three have the same functions."""
    name = {"reference": "numpy_reference", "native": "native_cuda" if device == "cuda" else "native_cpu"}[impl]
    return importlib.import_module(f"wireframe.kernels.{name}")


def why(op: str, devices: tuple[str, ...] = ("cpu",)) -> list[str]:
    """Lines that say what ``impl="auto"`` runs for ``op`` and why, for ``wireframe doctor``.

    Args:
        devices: the types of the devices to say it for; those that the operation has no implementation for are left
            out.
    """
    if BUILT[op] == ("reference",):
        return [f"{op}: reference (PyTorch): no other implementation is built into this version"]
    lines = []
    for device in devices:
        if device == "cpu":
            lines.append(f"{op}: {_choice(op, device)}")
        elif op in NATIVE_ON_CUDA:
            lines.append(f"{op} on {device} tensors: {_choice(op, device)}")
    return lines


def _choice(op: str, device: str) -> str:
    chosen = choose(op, "auto", device)
    others = [name for name in BUILT[op] if name != chosen]
    problems = {name: _problem(op, name, device) for name in others}
    text = f"{chosen} ({_WORDS[chosen, device]})"
    runs = [name for name in others if problems[name] is None]
    if runs:
        text += f"; also runs: {', '.join(runs)}"
    return "; ".join([text, *(f"not {name}: {problems[name]}" for name in others if problems[name])])
