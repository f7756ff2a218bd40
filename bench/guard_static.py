"""Holds the committed report of the Triton kernels against their sources, and compiles only what has changed.

The hash of a binary in the report is of its sources and specialisation, so a kernel that was changed without its report
is noticed without compiling anything; its binaries are then compiled, to say what the change does to their figures.
(``wireframe bench static --check`` compiles sm_89 whole as well, to see that the report itself is true.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from wireframe.bench import static
from wireframe.bench.compile_ahead import require_compiler
from wireframe.bench.guard_values import Figures, NotComparable, differences
from wireframe.errors import WireframeError
from wireframe.kernels.launch import ARCHITECTURES

# What a binary is called by, and what is no figure of it.
_ASIDE = ("arch", "kernel", "dtype", "dim", "cases", "hash", "seconds")


class _Now(NamedTuple):
    """The reported rows, the rows as they are now, what limits these break, and in how many each source has changed."""

    before: list[dict]
    after: list[dict]
    broken: list[str]
    newer: Counter[str]

    def lines(self) -> list[str]:
        after = (row for row in self.after if "error" not in row)
        found = [*self.broken, *differences(_figures(self.before), _figures(after), 0.0)]
        measured = "" if found else ", which measure the same"
        newer = sorted(self.newer.items())
        return [f"{file}: newer than the report of {number} binaries{measured}" for file, number in newer] + found


def check(path: Path = static.REPORT, module: str = static.CASES) -> list[str]:
    """One line for each source that is newer than the report, each limit broken, and each figure not as reported.

    Raises:
        NotComparable: the report is of another version of Triton. WireframeError: nothing can be compiled here.
    """
    return _now(path, module).lines()


def update(path: Path = static.REPORT, module: str = static.CASES) -> list[str]:
    """Puts the binaries that have changed into the report; what has changed.

    Raises:
        NotComparable: as ``check``. WireframeError: likewise, or a binary breaks a limit: the report stays as it is.
    """
    now = _now(path, module)
    if now.broken:
        raise WireframeError(f"{path} stays as it is: {now.broken[0]}")
    static.write_report(path, require_compiler(), now.after)
    return now.lines()


def _now(path: Path, module: str) -> _Now:
    version, report = require_compiler(), static.read_report(path)
    if report["triton"] != version:
        raise NotComparable(
            f"the report is of triton {report['triton']}, here {version}; for this one: "
            f"wireframe bench static --out {path}"
        )
    known = {(row["arch"], row["hash"]): row for row in report["rows"]}
    planned = [c for arch in ARCHITECTURES for c in static.configurations(module, arch)]
    changed = [c for c in planned if (c.arch, c.hash) not in known]
    unchanged = [
        # What the report has of the plan may have changed with a list of cases.
        known[c.arch, c.hash] | {"cases": c.cases, "minimum_warps": c.minimum_warps}
        for c in planned
        if (c.arch, c.hash) in known
    ]
    compiled = static.measure_all(changed, module, workers=1)
    newer = Counter(file for c in changed for file in static.source_files(c.launch))
    return _Now(report["rows"], [*unchanged, *compiled], static.problems(compiled, version), newer)


def _figures(rows: Iterable[dict]) -> Figures:
    return {static.name(row): dict(_flat("", row)) for row in rows}


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    """Numbers and names of a row; those of its dicts and lists by a name of two words."""
    if not isinstance(value, (dict, list)):
        return [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [found for key, one in items if key not in _ASIDE for found in _flat(f"{name} {key}".strip(), one)]
