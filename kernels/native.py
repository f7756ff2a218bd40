"""The compiled modules ``wireframe._C`` (CPU) and ``wireframe._C_cuda``, or why there is none."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from wireframe.kernels.dispatch import ImplementationError


@functools.lru_cache(maxsize=2)
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"wireframe.{name}"), ""
    except ImportError as problem:
        return None, f"wireframe.{name} does not import ({problem})"


def problem(name: str = "_C") -> str | None:
    """Why the module cannot be used, None where it can."""
    module, reason = _load(name)
    return None if module is not None else reason


def module(name: str = "_C") -> ModuleType:
    """The compiled module.

    Raises:
        ImplementationError: it is not there; the message says why.
    """
    found, reason = _load(name)
    if found is None:
        raise ImplementationError(reason)
    return found
