"""``wireframe bench report``: the README's tables, plots and one HTML page, all of them from rows that were measured.

Rows come from ``bench/results/*.jsonl`` of the checkout, where ``wireframe bench`` puts them, or from ``--rows``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wireframe.bench import timing
from wireframe.bench.report_readme import Place, filled, read_text
from wireframe.bench.report_rows import Row, newest, read_rows
from wireframe.errors import ConfigError
from wireframe.files import atomic_write, check_target

RESULTS = timing.ROOT / "bench" / "results"
_PLOTS, _PAGE = timing.ROOT / "docs" / "bench", RESULTS / "report.html"


def run(options: argparse.Namespace) -> int:
    """The command; of its files either all are written or, where input is bad, none.

    Args:
        options: rows (files or folders, None for the checkout's), readme (Markdown whose tables are rewritten), check
            (Markdown whose tables are compared, nothing written), plots (folder), out (HTML file).

    Returns:
        1 where ``check`` found a table that is not as the rows make it.

    Raises:
        ConfigError: rows, markers or options are bad. MissingPackageError: matplotlib is not installed. OSError.
    """
    if not options.rows and not RESULTS.is_dir():
        raise ConfigError(f"there is no {RESULTS}; measure with wireframe bench kernels, or give --rows")
    rows = read_rows(options.rows or [RESULTS])
    kept = newest(rows)
    if options.check:
        if options.readme or options.plots or options.out:
            raise ConfigError("--check writes nothing: leave out --readme, --plots and --out")
        return _check(options.check, kept)
    readme = None
    if options.readme:
        readme = _filled(check_target(options.readme), kept)
    of_checkout = not options.rows
    plots = options.plots or (_PLOTS if of_checkout else None)
    page = options.out or (_PAGE if of_checkout else None)
    if not (plots or page or readme):
        raise ConfigError("--rows needs one of --out, --plots, --readme and --check")
    sources = {path.resolve() for given in options.rows or [RESULTS] for path in (given, *given.glob("*.jsonl"))}
    for name, target in (("--out", page), ("--readme", options.readme)):
        if target and target.resolve() in sources:
            raise ConfigError(f"{name} {target} would replace the rows; give another")
    if page and options.readme and page.resolve() == options.readme.resolve():
        raise ConfigError(f"--out and --readme are both {page}; give two files")
    if plots or page:
        _draw(rows, kept, plots, page)
    if readme:
        _write_readme(options.readme, *readme)
    return 0


def _draw(rows: list[Row], kept: list[Row], plots: Path | None, page: Path | None) -> None:
    """Plots and page."""
    from wireframe.bench import report_page, report_plots

    pictures, missing = report_plots.pictures(kept)
    content = report_page.page(rows, kept, pictures, missing)
    if plots:
        plots.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            with atomic_write(plots / picture.name) as file:
                file.write(picture.png)
            print(plots / picture.name)
    if page:
        with atomic_write(page) as file:
            file.write(content.encode("utf-8"))
        print(page)
    print(*missing, sep="\n", end="\n" if missing else "")


def _filled(path: Path, kept: list[Row]) -> tuple[str, list[Place], list[Place]]:
    """See ``report_readme.filled``; problems name the file."""
    text = read_text(path)
    try:
        return filled(text, kept)
    except ConfigError as problem:
        raise ConfigError(f"{path}: {problem}") from None


def _write_readme(path: Path, text: str, found: list[Place], changed: list[Place]) -> None:
    if changed:
        with atomic_write(path) as file:
            file.write(text.encode("utf-8"))
    print(f"{path}: {len(changed)} of {len(found)} tables changed")


def _check(path: Path, kept: list[Row]) -> int:
    _, found, changed = _filled(path, kept)
    for place in changed:
        message = f"{path}, line {place.line}: bench:{place.name} is not as the rows make it"
        print(f"{message}; run: wireframe bench report --readme {path}", file=sys.stderr)
    if not changed:
        print(f"{path}: {len(found)} tables are as the rows make them")
    return int(bool(changed))
