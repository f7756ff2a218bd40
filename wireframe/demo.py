"""``wireframe demo``: held-out synthetic scenes through the demo model, its dummies and the handcrafted rival."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from wireframe.assets import DEMO_MODEL
from wireframe.comparison import Comparison, compare_on_made_scenes, format_table
from wireframe.plots import SheetItem, contact_sheet
from wireframe.scoring import require_hoho

# The demo model was trained with seed 1; no scene of this seed was seen in training or tuning.
HELD_OUT_SEED = 20260520
SHEET_SCENES = 8
# As many COLMAP points as the demo model was trained with, so that it sees clouds of the kind it knows.
COLMAP_POINTS = 8000


def run_demo(out: str | os.PathLike, scenes: int, *, workers: int = 1, progress: bool = True) -> str:
    """Makes, predicts, scores and draws held-out scenes.

    Writes ``scenes/*.tar``, ``results.json`` and ``contact_sheet.png`` into ``out``.

    Args:
        out: folder; finished tars in it are used again.
        scenes: how many scenes.
        workers: processes.
        progress: whether to show progress bars on stderr.

    Returns:
        The table, as text.

    Raises:
        MissingPackageError: hoho2025 is not installed.
    """
    from wireframe.synth import SynthConfig

    require_hoho()
    out = Path(out)
    config = SynthConfig(colmap_points=COLMAP_POINTS)
    found = compare_on_made_scenes(
        out, HELD_OUT_SEED, scenes, config, DEMO_MODEL, workers=workers, progress=progress
    )  # fmt: skip
    contact_sheet(_sheet(found), out / "contact_sheet.png")
    about = f"{scenes} held-out synthetic scenes, 768 x 576, {COLMAP_POINTS} COLMAP points, seed {HELD_OUT_SEED}"
    return (
        f"{about}\n\n{format_table(found)}\n\npicture: {out / 'contact_sheet.png'}\n"
        f"scores of every scene: {out / 'results.json'}"
    )


def _sheet(found: Comparison) -> list[SheetItem]:
    """Scenes evenly spread over our scores, best first, so that the picture flatters nobody."""
    scenes, outcomes = found.scenes, found.outcomes["ours"]
    order = sorted(range(len(scenes)), key=lambda i: -outcomes[i].score.hss)
    picked = [order[round(i)] for i in np.linspace(0, len(order) - 1, min(SHEET_SCENES, len(order)))]
    return [
        SheetItem(s.order_id, s.points, s.class_id, s.truth, s.predicted["ours"], outcomes[i].score)
        for i, s in ((i, scenes[i]) for i in picked)
    ]
