"""Holds the committed report of the Triton kernels against their sources, and compiles only what has changed.

The hash of a binary in the report is of its sources and specialisation, so a kernel that was changed without its report
is noticed without compiling anything; its binaries are then compiled, to say what the change does to their figures.
(``wireframe bench static --check`` compiles sm_89 whole as well, to see that the report itself is true.)
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from wireframe.bench import static
from wireframe.bench.compile_ahead import require_compiler
from wireframe.bench.guard_values import NotComparable
from wireframe.errors import WireframeError


def check(path: Path = static.REPORT, module: str = static.CASES) -> list[str]:
    """One line for each source that is newer than the report, each limit broken, and each row not as reported.

    Raises:
        NotComparable: the report is of another version of Triton. WireframeError: nothing can be compiled here.
    """
    return _lines(_now(path, module))


def update(path: Path = static.REPORT, module: str = static.CASES) -> list[str]:
    """Puts the binaries that have changed into the report; what has changed.

    Raises:
        NotComparable: as ``check``. WireframeError: likewise, or a binary breaks a limit: the report stays as it is.
    """
    now = _now(path, module)
    if now.broken:
        raise WireframeError(f"{path} stays as it is: {now.broken[0]}")
    static.write_report(path, require_compiler(), now.rows)
    return _lines(now)


def _now(path: Path, module: str) -> static.Comparison:
    version, report = require_compiler(), static.read_report(path)
    if report["triton"] != version:
        raise NotComparable(
            f"the report is of triton {report['triton']}, here {version}; for this one: "
            f"wireframe bench static --out {path}"
        )
    return static.compare(report, module)


def _lines(now: static.Comparison) -> list[str]:
    found = [*now.broken, *now.changed]
    measured = "" if found else ", which measure the same"
    newer = sorted(Counter(file for c in now.newer for file in static.source_files(c.launch)).items())
    return [f"{file}: newer than the report of {number} binaries{measured}" for file, number in newer] + found
