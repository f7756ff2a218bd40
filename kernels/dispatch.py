"""Which implementations each operation has, and the choice among them.

An explicit choice is obeyed or refused, never replaced; only ``impl="auto"`` lets this file decide.
"""

from __future__ import annotations

from wireframe.errors import WireframeError

NAMES = ("auto", "reference", "native", "triton")

# Best first: "auto" takes the first entry that can run.
BUILT = {
    "qk_norm_attention": ("reference",),
    "sinkhorn": ("reference",),
    "segment_cost": ("reference",),
    "segment_matching": ("reference",),
}


class ImplementationError(WireframeError, RuntimeError):
    """The implementation that the caller named cannot run."""


def choose(op: str, impl: str) -> str:
    """The name of the implementation of ``op`` to run for the caller's ``impl``.

    Raises:
        ValueError: ``impl`` is not one of ``NAMES``.
        ImplementationError: ``impl`` is named explicitly and is not built for this operation.
    """
    if impl not in NAMES:
        raise ValueError(f"{op}: unknown impl {impl!r}; choose one of {', '.join(NAMES)}")
    built = BUILT[op]
    if impl == "auto":
        return built[0]
    if impl not in built:
        raise ImplementationError(
            f"{op}: impl {impl!r} is not built into this version; available: {', '.join(built)}, or 'auto'"
        )
    return impl


def why(op: str) -> list[str]:
    """Lines that say what ``impl="auto"`` runs for ``op`` and why, for ``wireframe doctor``."""
    if BUILT[op] == ("reference",):
        return [f"{op}: reference (PyTorch): no other implementation is built into this version"]
    return [f"{op}: {BUILT[op][0]} (auto); also built: {', '.join(BUILT[op][1:])}"]
