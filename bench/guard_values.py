"""Committed figures, how they are read and written, and what has changed against them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from wireframe.errors import WireframeError
from wireframe.files import atomic_write

VALUES = Path(__file__).resolve().parent / "guard_values.json"
COMMAND = "python -m wireframe.bench.guard"

# By name of what is counted: what of it, and how many (seldom a name).
Figures = dict[str, dict[str, Any]]


class NotComparable(WireframeError):
    """Figures cannot be counted here, or are of other tools than the committed ones."""


class Counted(NamedTuple):
    """Figures of one kind.

    made_with: the tools that the figures depend on. measure: counts them. Both raise NotComparable where that cannot
    be done. tolerance: relative, of a change in either direction.
    """

    name: str
    made_with: Callable[[], dict[str, Any]]
    measure: Callable[[], Figures]
    tolerance: float = 0.0

    def check(self, path: Path = VALUES) -> list[str]:
        """One line for each figure that is not the committed one.

        Raises:
            NotComparable: see above. WireframeError: the file holds no such figures.
        """
        committed = _read(path).get(self.name)
        if committed is None:
            raise WireframeError(f"{path} has no figures of {self.name}; run: {COMMAND} {self.name} --update")
        here, there = self.made_with(), committed["made_with"]
        if here != there:
            others = [key for key in {**there, **here} if there.get(key) != here.get(key)]
            said = ", ".join(f"{key} {there.get(key)} (here {here.get(key)})" for key in others)
            raise NotComparable(f"the figures are of {said}; for those of here: {COMMAND} {self.name} --update")
        return differences(committed["figures"], self.measure(), self.tolerance)

    def update(self, path: Path = VALUES) -> list[str]:
        """Puts what is counted now into the file; what has changed."""
        values = _read(path) if path.exists() else {}
        before = values.get(self.name, {"figures": {}})["figures"]
        values[self.name] = {"made_with": self.made_with(), "figures": self.measure()}
        with atomic_write(path) as file:
            file.write(_text(values).encode())
        return differences(before, values[self.name]["figures"], 0.0)


def differences(committed: Figures, found: Figures, tolerance: float) -> list[str]:
    """A line ``name, what: committed -> found (+x %)`` for each figure that differs by more than a share of itself."""
    lines = []
    for name in {**committed, **found}:
        before, after = committed.get(name), found.get(name)
        if before is None or after is None:
            lines.append(f"{name}: {_all(before)} -> {_all(after)}")
            continue
        for what in {**before, **after}:
            old, new = before.get(what), after.get(what)
            if not _alike(old, new, tolerance):
                lines.append(f"{name}, {what}: {old} -> {new}{_share(old, new)}")
    return lines


def _alike(old: Any, new: Any, tolerance: float) -> bool:
    numbers = isinstance(old, (int, float)) and isinstance(new, (int, float))
    return abs(new - old) <= tolerance * abs(old) if numbers else old == new


def _share(old: Any, new: Any) -> str:
    numbers = isinstance(old, (int, float)) and isinstance(new, (int, float))
    return f" ({100 * (new - old) / old:+.3g} %)" if numbers and old else ""


def _all(figures: dict[str, Any] | None) -> str:
    return "none" if figures is None else ", ".join(f"{what} {figure}" for what, figure in figures.items())


def _read(path: Path) -> dict[str, Any]:
    """By kind: {"made_with": {...}, "figures": Figures}."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {
            kind: {"made_with": dict(of["made_with"]), "figures": {n: dict(f) for n, f in of["figures"].items()}}
            for kind, of in values.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise WireframeError(f"{path} holds no figures of {COMMAND}") from None


def _text(values: dict[str, Any]) -> str:
    """JSON, a line for each name: a change of one operation is a change of one line."""
    kinds = []
    for kind, of in sorted(values.items()):
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in of["figures"].items())
        kinds.append(f'{json.dumps(kind)}: {{"made_with": {json.dumps(of["made_with"])}, "figures": {{\n{lines}\n}}}}')
    return "{" + ",\n".join(kinds) + "}\n"
