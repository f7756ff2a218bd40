"""Errors that name what is wrong with the user's input and how to mend it, in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

_SHOWN = 20


class Failure(NamedTuple):
    """A scene that gave nothing, or a source that breaks off there, and why."""

    order_id: str
    reason: str


def printable(text: str) -> str:
    """The text with its unprintable characters (ESC, line ends, lone surrogates) written as escapes.

    Names out of a stranger's file go to the terminal through this, so that they cannot steer it.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(error: object, limit: int = 200) -> str:
    """The text of an error on one printable line of at most ``limit`` characters; its type where it has no text."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


class WireframeError(Exception):
    """Base of every error this package raises about its input; ``str(error)`` is one line."""


class SceneError(WireframeError, ValueError):
    """A raw scene cannot be used."""


class ShardError(WireframeError, ValueError):
    """A tar or Parquet file cannot be read or written."""


class SampleError(WireframeError, ValueError):
    """A sampled row does not hold the arrays of a sampled scene."""


class CheckpointError(WireframeError, ValueError):
    """A checkpoint does not fit the model, or is not safe to read."""


class ConfigError(WireframeError, ValueError):
    """A configuration holds an unknown key or an impossible value."""


class ScoreError(WireframeError, ValueError):
    """A wireframe cannot be scored."""


class SubmissionError(WireframeError, ValueError):
    """A file of predictions does not follow the challenge's schema."""


class MissingPackageError(WireframeError, ImportError):
    """An optional package is needed for this call and is not installed."""


def print_failures(what: str, failures: Sequence[Failure]) -> None:
    """At most 20 scenes and why they failed, a line each on stderr."""
    for scene in failures[:_SHOWN]:
        print(one_line(f"{what} {scene.order_id}: {scene.reason}"), file=sys.stderr)
    if len(failures) > _SHOWN:
        print(f"... and {len(failures) - _SHOWN} more", file=sys.stderr)
