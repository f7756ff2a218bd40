"""The compiled modules ``wireframe._C`` (CPU) and ``wireframe._C_cuda``, or why they cannot be used."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType

import wireframe
from wireframe.kernels import build_info
from wireframe.kernels.dispatch import ImplementationError

NAMES = tuple(build_info.SOURCES)

_PACKAGE = Path(wireframe.__file__).resolve().parent
_CSRC = _PACKAGE.parent / "csrc"


@functools.lru_cache(maxsize=2)
def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        found = importlib.import_module(f"wireframe.{name}")
    except ImportError as problem:
        return None, _why_missing(name, problem)
    if Path(found.__file__).parent != Path(wireframe.__file__).parent:
        # Another installation's, which an editable install of it lends to every package of this name.
        return None, _why_missing(name, ModuleNotFoundError())
    # Beside an installed package there are no sources to compare with.
    if _in_checkout() and getattr(found, "sources", "") != build_info.digest(_CSRC, name):
        return None, f"csrc/ has changed since wireframe.{name} was built; run: pip install -e ."
    return found, ""


def _in_checkout() -> bool:
    return _CSRC.is_dir()


def _why_missing(name: str, problem: ImportError) -> str:
    said = note(name)
    if said and not said["built"]:
        return f"wireframe.{name} is not built: {said.get('reason', 'its note does not say why')}"
    if not isinstance(problem, ModuleNotFoundError):
        return f"wireframe.{name} does not import ({problem})"
    how = "pip install -e ." if _in_checkout() else "pip install --force-reinstall --no-deps wireframe"
    return f"wireframe.{name} is not built for this Python ({build_info.tag()}); run: {how}"


def note(name: str) -> dict:
    """What the last build said of module ``name``: built, compiler or reason, log. Empty where there was none."""
    try:
        said = json.loads((_PACKAGE / build_info.note_name()).read_text())[name]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return said if isinstance(said, dict) and "built" in said else {}


def problem(name: str = "_C") -> str | None:
    """Why the module cannot be used, None where it can."""
    module, reason = _load(name)
    return None if module is not None else reason


def module(name: str = "_C") -> ModuleType:
    """The compiled module.

    Raises:
        ImplementationError: it is not there or out of date; the message says why.
    """
    found, reason = _load(name)
    if found is None:
        raise ImplementationError(reason)
    return found


def describe(name: str) -> str:
    """One line on the module for ``wireframe doctor``."""
    found, reason = _load(name)
    if found is not None:
        return f"wireframe.{name}: built with {found.compiler}"
    log = note(name).get("log")
    return f"{reason} (log: {log})" if log and Path(log).is_file() else reason
