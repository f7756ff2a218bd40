"""Which implementations each operation has, and the choice among them.

An explicit choice is obeyed or refused, never replaced; only ``impl="auto"`` lets this file decide.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
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
    "qk_norm_attention": ("triton", "native", "reference"),
    "qk_norm_attention_kvpacked": ("triton", "native", "reference"),
    "sinkhorn": ("triton", "reference"),
    "segment_cost": ("triton", "reference"),
    "segment_matching": ("triton", "reference"),
    "dropout_add": ("triton", "reference"),
    "linear_gelu": ("triton", "reference"),
    "adamw_step": ("triton", "reference"),
    "point_features": ("triton", "reference"),
    "residual_norm": ("triton", "native", "reference"),
    "rms_norm": ("triton", "native", "reference"),
}

# What "native" runs on a CUDA device; the other operations bring such tensors to the CPU and back.
NATIVE_ON_CUDA = (
    "house_mask", "clip_limits", "depth_points", "vote_labels", "point_tiers", "centre_and_scale", "priority_sample",
)

# The model's operations: differentiable, on whatever device their inputs are.
MODEL_OPS = tuple(op for op, built in BUILT.items() if "triton" in built)

# Triton reads it when a kernel is decorated, so what it says at the first import holds for the process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

_WORDS = {
    ("native", "cpu"): "C++", ("native", "cuda"): "CUDA",
    ("reference", "cpu"): "NumPy", ("reference", "cuda"): "NumPy, on the CPU",
}  # fmt: skip


class ImplementationError(WireframeError, RuntimeError):
    """The implementation that the caller named cannot run."""


def choose(
    op: str, impl: str, device: str = "cpu", triton_limit: str | None = None, native_limit: str | None = None
) -> str:
    """The name of the implementation of ``op`` to run for the caller's ``impl``.

    Args:
        device: type of the device that holds the inputs. For "meta" tensors "auto" takes Triton where it is installed:
            the operations give shapes, and nothing is launched.
        triton_limit, native_limit: why these inputs are beyond that implementation, None where they are not.

    Raises:
        ValueError: ``impl`` is not one of ``NAMES``.
        ImplementationError: ``impl`` is named explicitly and is not built for this operation, or cannot run here.
    """
    if impl not in NAMES:
        raise ValueError(f"{op}: unknown impl {impl!r}; choose one of {', '.join(NAMES)}")
    built = BUILT[op]
    if impl == "auto":
        # The interpreter is there to test kernels, not to compute with.
        within = {"triton": device in ("cuda", "meta") and triton_limit is None, "native": native_limit is None}
        usable = [name for name in built if within.get(name, True)]
        return next(name for name in usable if _problem(op, name, device) is None)
    if impl not in built:
        raise ImplementationError(
            f"{op}: impl {impl!r} is not built into this version; available: {', '.join(built)}, or 'auto'"
        )
    problem = _problem(op, impl, device) or {"triton": triton_limit, "native": native_limit}.get(impl)
    if problem is not None:
        raise ImplementationError(f"{op}: impl {impl!r} cannot run: {problem}")
    return impl


def _problem(op: str, name: str, device: str) -> str | None:
    """Why implementation ``name`` of ``op`` cannot run on the device, None where it can."""
    if name == "reference":
        return None
    if name == "triton":
        return _triton_problem(device)
    from wireframe.kernels import native

    if device == "cpu" or (op not in NATIVE_ON_CUDA and op not in MODEL_OPS):
        return native.problem("_C")
    if device == "cuda" and op in NATIVE_ON_CUDA:
        return native.problem("_C_cuda")
    return f"it has no native implementation for {device} tensors"


def _triton_problem(device: str) -> str | None:
    if not _TRITON_INSTALLED:
        return "triton is not installed; run: pip install triton"
    if device == "meta":
        # Shapes alone: nothing is launched, so neither a GPU nor the interpreter matters.
        return None
    if device == "cpu":
        return None if INTERPRETED else "its tensors are on the CPU; move them to a GPU, or set TRITON_INTERPRET=1"
    if device != "cuda":
        return f"it has no Triton kernels for {device} tensors"
    if INTERPRETED:
        return "TRITON_INTERPRET is set, and interpreted kernels run on CPU tensors alone"
    import torch

    if torch.version.hip is not None:
        return "its kernels are for NVIDIA GPUs"
    # A constant to torch.compile, unlike get_device_capability.
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    if found.major >= 8:
        return None
    return f"its kernels need compute capability 8.0, and {found.name} has {found.major}.{found.minor}"


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
    lines = []
    for device in devices:
        if op in MODEL_OPS:
            found = f": {_model_choice(op)}" if device == "cpu" else f" on {device} tensors: {_triton(device)}"
            lines.append(op + found)
        elif device == "cpu":
            lines.append(f"{op}: {_choice(op, device)}")
        elif op in NATIVE_ON_CUDA:
            lines.append(f"{op} on {device} tensors: {_choice(op, device)}")
    return lines


def _model_choice(op: str) -> str:
    missing = _problem(op, "native", "cpu") if "native" in BUILT[op] else None
    native = "native" in BUILT[op] and missing is None
    problem = _triton_problem("cpu")
    text = "native (C++)" if native else "reference (PyTorch)"
    runs = (["reference"] if native else []) + (["triton (interpreted)"] if problem is None else [])
    text += f"; also runs: {', '.join(runs)}" if runs else ""
    if problem is not None:
        text += "; triton takes CUDA tensors" if _TRITON_INSTALLED else f"; not triton: {problem}"
    return text if missing is None else f"{text}; not native: {missing}"


def _triton(device: str) -> str:
    problem = _triton_problem(device)
    return "triton" if problem is None else f"reference (PyTorch); not triton: {problem}"


def _choice(op: str, device: str) -> str:
    chosen = choose(op, "auto", device)
    others = [name for name in BUILT[op] if name != chosen]
    problems = {name: _problem(op, name, device) for name in others}
    text = f"{chosen} ({_WORDS[chosen, device]})"
    runs = [name for name in others if problems[name] is None]
    if runs:
        text += f"; also runs: {', '.join(runs)}"
    return "; ".join([text, *(f"not {name}: {problems[name]}" for name in others if problems[name])])
