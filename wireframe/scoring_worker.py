"""A process that scores scenes for a ``ScorePool``: one JSON line in, one JSON line out.

After importing hoho2025 it writes ``{"ready": true}``, or ``{"error": reason}`` and ends. Then, per line
``{"request": [vertices, edges, true_vertices, true_edges], "timeout": seconds}``, it writes ``{"score": [3
numbers]}`` or ``{"failure": reason}``. Floats cross as their shortest decimal form, which reads back to the
same bits. It ends when its input does.
"""

from __future__ import annotations

import faulthandler
import json
import os
from collections.abc import Callable

import numpy as np

from wireframe import child
from wireframe.errors import one_line
from wireframe.scoring import Score, hoho_score


def main(scorer: Callable[..., Score] = hoho_score) -> None:
    """Serves requests until the input ends. ``scorer`` gets the four arrays of a request."""
    requests, answers = child.pipes()
    try:
        import hoho2025.metric_helper  # noqa: F401
    except Exception as error:
        _send(answers, {"error": f"{type(error).__name__}: {one_line(error)}"})
        return
    _send(answers, {"ready": True})
    with open(os.devnull, "w") as nothing:
        for line in requests:
            message = json.loads(line)
            # A parent that was killed cannot stop a hung scene; this can, from within.
            limit = min(2.0 * message["timeout"] + 10.0, 1e6)
            faulthandler.dump_traceback_later(limit, exit=True, file=nothing)
            answer = _answer(message["request"], scorer)
            faulthandler.cancel_dump_traceback_later()
            _send(answers, answer)


def _send(answers, message: dict) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def _answer(request: list, scorer: Callable[..., Score]) -> dict:
    vertices, edges, true_vertices, true_edges = request
    try:
        values = scorer(
            np.array(vertices, dtype=np.float64).reshape(-1, 3),
            np.array(edges, dtype=np.int64).reshape(-1, 2),
            np.array(true_vertices, dtype=np.float64).reshape(-1, 3),
            np.array(true_edges, dtype=np.int64).reshape(-1, 2),
        )
        return {"score": [float(value) for value in values]}
    except Exception as error:
        return {"failure": f"raised {type(error).__name__}: {one_line(error)}"}
