"""What the plots of ``wireframe bench report`` share: their sheet, colours and names.

A white sheet of its own is readable on a light page and on a dark one. The colours are those of Okabe and Ito (2008),
which colour-blind readers can tell apart; markers and hatches differ too.
"""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from wireframe.errors import MissingPackageError, one_line

PAGE, INK, SOFT_INK, RULE = "#ffffff", "#1b2330", "#66717f", "#dfe4ea"
# Okabe and Ito: blue, vermillion, green, purple, orange, sky blue; then grey.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")
OURS_COLOR = COLORS[0]
MARKERS, HATCHES = ("o", "s", "^", "D", "v", "P", "X"), ("", "//", "..", "xx")
_DPI, _WIDTH = 160, 8.6


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib's defaults and the house's look, whatever the user's own settings are, which would change bytes.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib.style
    except ImportError as error:
        raise MissingPackageError(f"the plots need matplotlib ({error}): pip install matplotlib") from error
    changes = {
        "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": SOFT_INK, "axes.titlesize": 9,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": RULE, "xtick.color": SOFT_INK,
        "ytick.color": SOFT_INK, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False,
        "axes.spines.right": False, "figure.titlesize": 11, "figure.titleweight": "bold", "legend.frameon": False,
        "legend.fontsize": 8, "hatch.linewidth": 0.6, "figure.facecolor": PAGE,
    }  # fmt: skip
    with matplotlib.style.context("default"), matplotlib.rc_context(changes), warnings.catch_warnings():
        # Of names in a script that the font does not have.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        yield


def new_figure(height: float, columns: int = 1, panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure of its own (pyplot's state stays as it is) and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    lines = -(-panels // columns)
    return figure, [figure.add_subplot(lines, columns, i + 1) for i in range(panels)]


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def label(text: str, limit: int = 64) -> str:
    # A legend leaves out what begins with an underscore.
    return re.sub("^_", " _", one_line(text, limit)) if text else ""


def tick_labels(axis: Any, places: Sequence[float], labels: Sequence[str]) -> None:
    """Names may hold dollar signs, which are no mathematics."""
    axis.set_ticks(places)
    axis.set_ticklabels(labels, parse_math=False)


def legend(of: Any, **how: Any) -> None:
    """The legend of axes or of a figure."""
    for text in of.legend(**how).get_texts():
        text.set_parse_math(False)


def plain_log(axis: Any) -> None:
    """A log axis whose ticks are plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
