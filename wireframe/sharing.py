"""Which scenes' pictures and pages may be handed on: those of synthetic scenes; the challenge's may not (NOTICE)."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

TERMS = "scenes of the challenge, and pages and pictures made from them, may not be redistributed (see NOTICE)"
_SYNTHETIC = re.compile(r"synth-\d+-\d{6,}", re.ASCII)


def is_synthetic(order_id: str) -> bool:
    """Whether an id is of the kind that ``wireframe synth`` gives its scenes, and so of no scene of the challenge."""
    return _SYNTHETIC.fullmatch(order_id) is not None


def count_guarded(order_ids: Iterable[str]) -> int:
    """How many scenes are not known to be synthetic."""
    return sum(not is_synthetic(order_id) for order_id in order_ids)


def warn(path: Path, guarded: int) -> None:
    """Says on stderr that a file that shows so many guarded scenes must not be shared; nothing where it shows none."""
    if guarded:
        print(f"do not share {path}: {guarded} of its scenes are not known to be synthetic; {TERMS}", file=sys.stderr)
