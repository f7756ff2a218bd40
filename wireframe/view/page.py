"""The HTML page of ``wireframe view``: everything in one file, nothing fetched, nothing run but its own script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import wireframe
from wireframe.classes import POINT_CLASSES
from wireframe.scoring import Score

_ASSETS = Path(__file__).resolve().parents[1] / "assets" / "view"
# In the order in which they need one another.
_SCRIPTS = ("dom.js", "orbit.js", "painter.js", "flat.js", "scene.js", "list.js", "layers.js", "page.js")

NOTICE = (
    "These scenes are not known to be synthetic. Scenes of the S23DR challenge, and pages made from them, may not be "
    "redistributed."
)


class PageEntry(NamedTuple):
    """A line of the page's list: the scene, its position in the source, its score and what is odd about it."""

    order_id: str
    position: int
    score: Score | None
    note: str | None


def page_parts(
    title: str, about: Sequence[str], entries: Sequence[PageEntry], blocks: Mapping[int, str], warn: bool
) -> Iterator[str]:
    """The page, piece by piece.

    Args:
        title: what the scenes are.
        about: short remarks below it.
        entries: the list, worst first.
        blocks: by position JSON of every scene, from ``data_block``.
        warn: whether the page says that it must not be handed on.
    """
    style = (_ASSETS / "style.css").read_text("utf-8")
    script = '"use strict";\n' + "\n".join((_ASSETS / name).read_text("utf-8") for name in _SCRIPTS)
    # Whatever the names in the data hold: no request leaves, and only these two texts count as style and script.
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'; require-trusted-types-for 'script'"
    )
    index = {
        "source": title,
        "about": list(about),
        "classes": [name.replace("_", " ") for name in POINT_CLASSES],
        "scenes": [
            {"id": e.order_id, "at": e.position, "score": e.score and [round(x, 6) for x in e.score], "note": e.note}
            for e in entries
        ],
    }
    notice = f'<p id="notice" role="note"><strong>Do not share this page.</strong> {escape(NOTICE)}</p>\n'
    yield (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<meta name="generator" content="wireframe {escape(wireframe.__version__)}">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}: wireframe view</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n{notice if warn else ''}"
        "<noscript><p>The scenes are drawn by a script of this page, which does not run here.</p></noscript>\n"
        f"{(_ASSETS / 'body.html').read_text('utf-8')}"
        f'<script type="application/json" id="index">{data_block(index)}</script>\n<script>{script}</script>\n'
    )
    for position, block in blocks.items():
        yield f'<script type="application/json" id="scene-{position}">{block}</script>\n'
    yield "</body>\n</html>\n"


def data_block(value: object) -> str:
    """JSON that may stand inside a script element: no character in it can end the element or begin a comment."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source(text: str) -> str:
    """The text as a source of the Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
