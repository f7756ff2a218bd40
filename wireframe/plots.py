"""A contact sheet: what the points of some scenes look like, and the wireframes found in them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wireframe.classes import POINT_CLASSES
from wireframe.errors import MissingPackageError, ScoreError
from wireframe.files import atomic_write
from wireframe.graph import Wireframe
from wireframe.scoring import Score

_PAGE, _CARD, _INK, _SOFT_INK = "#ffffff", "#f5f7fa", "#1b2330", "#66717f"
_TRUTH, _PREDICTED = "#a9bdd6", "#e4572e"
# In the order of POINT_CLASSES: corners warm, edges saturated, surfaces pale.
_CLASS_COLORS = (
    "#e63946", "#ff7f11", "#f4b400",
    "#2a9d8f", "#7b2cbf", "#1d4ed8", "#0891b2", "#16a34a", "#be185d", "#db2777",
    "#b08968", "#aab4c0", "#cfd6de",
)
_POINT_SIZES = (8, 8, 8, 2.6, 2.6, 2.6, 2.6, 2.6, 2.6, 2.6, 1.6, 1.2, 0.8)
_ELEVATION, _AZIMUTH = 22, -60
# Inches: a card holds a title line over two panels; gaps lie between cards and around them.
_PANEL_WIDTH, _PANEL_HEIGHT, _TITLE, _GAP, _LEGEND = 2.6, 2.0, 0.34, 0.12, 0.6
_DPI = 160
# Characters of a title that leave room for the scores beside it.
_MAX_TITLE = 32
# How much of a panel the building's box takes; found by eye.
_FILL = 1.22


@dataclass(frozen=True)
class SheetItem:
    """One scene of a contact sheet.

    Attributes:
        order_id: the title.
        points: float [P, 3], world metres, y up.
        class_id: integer [P], positions in ``classes.POINT_CLASSES``.
        truth, predicted: wireframes in world metres.
        score: the score of ``predicted``, None to leave it out of the title.
    """

    order_id: str
    points: np.ndarray
    class_id: np.ndarray
    truth: Wireframe
    predicted: Wireframe
    score: Score | None = None


def contact_sheet(items: Sequence[SheetItem], path: str | os.PathLike, columns: int = 2) -> None:
    """Draws scenes side by side and writes a PNG (always the same bytes for the same scenes and versions).

    Each scene takes two panels, seen from the same side: its points coloured by class, and the prediction
    drawn over the ground truth. Points far from the ground truth are left out.

    Args:
        items: the scenes, row by row; 6 to 12 make a good sheet.
        path: of the PNG; appears only when it is whole.
        columns: scenes per row.

    Raises:
        ScoreError: there are no scenes to draw, or no columns.
        MissingPackageError: matplotlib is not installed.
    """
    if not items or columns < 1:
        raise ScoreError("a contact sheet needs at least one scene and one column")
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(items))
    rows = math.ceil(len(items) / columns)
    card_width, card_height = 2 * _PANEL_WIDTH, _PANEL_HEIGHT + _TITLE
    width, height = columns * (card_width + _GAP) + _GAP, rows * (card_height + _GAP) + _GAP + _LEGEND
    # A figure of its own: pyplot's global state and backend stay as they are.
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=_PAGE)
    FigureCanvasAgg(figure)
    for index, item in enumerate(items):
        left = _GAP + (card_width + _GAP) * (index % columns)
        bottom = height - (card_height + _GAP) * (index // columns + 1)
        _draw_card(figure, item, (left, bottom, card_width, card_height))
    _draw_legend(figure, items)
    with atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def require_matplotlib() -> None:
    """Raises MissingPackageError where matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(f"the sheet needs matplotlib ({error}): pip install matplotlib") from error


def _to_plot(vertices: np.ndarray) -> np.ndarray:
    """World (x right, y up, z) to the plot's axes (z up), without mirroring."""
    x, y, z = np.asarray(vertices, dtype=np.float64).reshape(-1, 3).T
    return np.stack([x, -z, y], axis=1)


def _limits(item: SheetItem) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest plot coordinates shown: the true building with a margin, else most points."""
    anchor = _to_plot(item.truth.vertices)
    if len(anchor) == 0:
        points = _to_plot(item.points)
        points = points[np.isfinite(points).all(axis=1)]
        anchor = np.percentile(points, (5, 95), axis=0) if len(points) else np.array([[-1.0] * 3, [1.0] * 3])
    low, high = anchor.min(axis=0), anchor.max(axis=0)
    margin = 0.08 * max(float((high - low).max()), 1.0)
    return low - margin, high + margin


def _add_axes(figure, item: SheetItem, left: float, bottom: float):
    """3D axes over the panel at (left, bottom), without decoration and with the building filling it."""
    # Matplotlib fits the scene into a square; the square is centred on the panel.
    lift = (_PANEL_HEIGHT - _PANEL_WIDTH) / 2
    box = _fraction(figure, left, bottom + lift, _PANEL_WIDTH, _PANEL_WIDTH)
    axes = figure.add_axes(box, projection="3d", computed_zorder=False)
    low, high = _limits(item)
    axes.set_axis_off()
    axes.patch.set_visible(False)
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(low[1], high[1])
    axes.set_zlim(low[2], high[2])
    axes.set_box_aspect(high - low, zoom=_zoom(high - low))
    axes.set_proj_type("persp", focal_length=1.2)
    axes.view_init(elev=_ELEVATION, azim=_AZIMUTH)
    return axes


def _clip(figure, axes, left: float, bottom: float) -> None:
    """Keeps what is drawn inside the panel: a prediction may reach far out."""
    from matplotlib.transforms import Bbox, TransformedBbox

    panel = Bbox.from_bounds(*_fraction(figure, left, bottom, _PANEL_WIDTH, _PANEL_HEIGHT))
    for artist in axes.collections:
        artist.set_clip_box(TransformedBbox(panel, figure.transFigure))


def _zoom(size: np.ndarray) -> float:
    """The zoom at which a box of this size fills the panel; Matplotlib scales it by its diagonal."""
    azimuth, elevation = math.radians(_AZIMUTH), math.radians(_ELEVATION)
    right = np.array([math.sin(azimuth), math.cos(azimuth), 0.0])
    tilt = math.sin(elevation)
    up = np.array([tilt * math.cos(azimuth), tilt * math.sin(azimuth), math.cos(elevation)])
    width, height = (float(np.abs(axis) @ size) for axis in (right, up))
    return _FILL * float(np.linalg.norm(size)) * min(1.0 / width, _PANEL_HEIGHT / _PANEL_WIDTH / height)


def _fraction(figure, left: float, bottom: float, width: float, height: float) -> tuple[float, ...]:
    """Inches as fractions of the figure."""
    across, along = figure.get_size_inches()
    return left / across, bottom / along, width / across, height / along


def _draw_points(axes, item: SheetItem) -> None:
    low, high = _limits(item)
    points = _to_plot(item.points)
    class_id = np.minimum(np.asarray(item.class_id).astype(np.int64), len(POINT_CLASSES) - 1)
    shown = ((points >= low) & (points <= high)).all(axis=1)
    points, class_id = points[shown], class_id[shown]
    # Surfaces first, corners last, so that what matters is on top.
    for cls in reversed(range(len(POINT_CLASSES))):
        chosen = points[class_id == cls]
        if len(chosen):
            axes.scatter(*chosen.T, s=_POINT_SIZES[cls], c=_CLASS_COLORS[cls], linewidths=0, depthshade=False)


def _draw_wireframes(axes, item: SheetItem) -> None:
    _draw_graph(axes, item.truth, _TRUTH, width=4.2, size=0, zorder=2)
    _draw_graph(axes, item.predicted, _PREDICTED, width=1.5, size=11, zorder=3)


def _draw_graph(axes, wireframe: Wireframe, color: str, width: float, size: float, zorder: int) -> None:
    from mpl_toolkits.mplot3d.art3d import Line3DCollection

    vertices = _to_plot(wireframe.vertices)
    edges = np.asarray(wireframe.edges, dtype=np.int64).reshape(-1, 2)
    edges = edges[((edges >= 0) & (edges < len(vertices))).all(axis=1)]
    edges = edges[np.isfinite(vertices[edges]).all(axis=(1, 2))]
    if len(edges) == 0:
        return
    vertices = np.where(np.isfinite(vertices), vertices, np.nan)
    lines = Line3DCollection(vertices[edges], colors=color, linewidths=width, zorder=zorder, capstyle="round")
    axes.add_collection3d(lines, autolim=False)
    if size:
        axes.scatter(*vertices.T, s=size, c=color, linewidths=0, depthshade=False, zorder=zorder)


def _draw_card(figure, item: SheetItem, box: tuple[float, float, float, float]) -> None:
    from matplotlib.patches import Rectangle

    left, bottom, width, height = _fraction(figure, *box)
    style = {"color": _CARD, "linewidth": 0, "zorder": -1}
    figure.add_artist(Rectangle((left, bottom), width, height, transform=figure.transFigure, **style))
    line = bottom + height * (1.0 - 0.68 * _TITLE / box[3])
    title = item.order_id if len(item.order_id) <= _MAX_TITLE else item.order_id[: _MAX_TITLE - 1] + "\u2026"
    # An id may hold dollar signs, which is no mathematics.
    figure.text(left + 0.03 * width, line, title, color=_INK, fontsize=9, weight="bold", parse_math=False)
    if item.score is not None:
        text = f"HSS {item.score.hss:.2f}   F1 {item.score.f1:.2f}   IoU {item.score.iou:.2f}"
        figure.text(left + 0.97 * width, line, text, color=_SOFT_INK, fontsize=8.5, ha="right")
    for panel, draw in enumerate((_draw_points, _draw_wireframes)):
        corner = (box[0] + panel * _PANEL_WIDTH, box[1])
        axes = _add_axes(figure, item, *corner)
        draw(axes, item)
        _clip(figure, axes, *corner)


def _draw_legend(figure, items: Sequence[SheetItem]) -> None:
    from matplotlib.lines import Line2D

    present = np.unique(np.concatenate([np.asarray(item.class_id).reshape(-1) for item in items]))
    handles = [
        Line2D([], [], color=_TRUTH, linewidth=4.2, label="ground truth"),
        Line2D([], [], color=_PREDICTED, linewidth=1.5, marker="o", markersize=3.5, label="prediction"),
    ]
    for cls, name in enumerate(POINT_CLASSES):
        if cls in present:
            dot = {"marker": "o", "markersize": 5, "linestyle": "none", "label": name.replace("_", " ")}
            handles.append(Line2D([], [], color=_CLASS_COLORS[cls], **dot))
    figure.legend(
        handles=handles, loc="lower center", ncols=math.ceil(len(handles) / 2), frameon=False, fontsize=8,
        labelcolor=_INK, handletextpad=0.4, columnspacing=1.4,
    )
