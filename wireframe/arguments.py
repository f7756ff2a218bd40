"""Types of command line arguments, and arguments that several commands share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from wireframe.errors import ConfigError


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return Path(text)


def threads(text: str) -> int:
    value = positive(text)
    # More than any pool here starts; thousands take the process down before it can say so.
    if value > 256:
        raise argparse.ArgumentTypeError(f"must be at most 256, got {value}")
    return value


def nonempty(text: str) -> str:
    """Text that is not empty, as an unset variable of a shell would be."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def non_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def size(text: str) -> tuple[int, int]:
    width, separator, height = text.lower().partition("x")
    if not separator or not width.isdigit() or not height.isdigit():
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, got {text!r}")
    return int(width), int(height)


def fraction(text: str) -> tuple[int, int]:
    index, separator, count = text.partition("/")
    if not separator or not index.isdigit() or not count.isdigit() or not int(index) < int(count):
        raise argparse.ArgumentTypeError(f"must be i/n with 0 <= i < n, got {text!r}")
    return int(index), int(count)


def probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {value}")
    return value


def stage_range(text: str) -> tuple[int, int]:
    """First and last stage, from 0, of "2" or "2-3"."""
    first, separator, last = text.partition("-")
    last = last if separator else first
    if not (first + last).isascii() or not (first.isdecimal() and last.isdecimal()) or not 1 <= int(first) <= int(last):
        raise argparse.ArgumentTypeError(f"must be a stage or a range of them, like 2 or 2-3, got {text!r}")
    return int(first) - 1, int(last) - 1


def shared_arguments(default: object = False) -> argparse.ArgumentParser:
    """The parent of every command."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")
    shared.add_argument("--quiet", action="store_true", default=default, help="no progress bars")
    return shared


def add_workers(command: argparse.ArgumentParser, what: str = "processes") -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command.add_argument("--workers", type=positive, default=cores, help=f"{what} (default {cores})")


def model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", type=nonempty, help="folder, published .pt or hf://... (default: the shipped model)"
    )
    command.add_argument(
        "--config", type=path,
        help="JSON whose graph section counts (default: graph.json beside the model, else base)",
    )  # fmt: skip
    command.add_argument("--threshold", type=probability, help="confidence to exceed (default: that of the graph)")
    command.add_argument("--limit", type=positive, help="only the first scenes")


def split_arguments(command: argparse.ArgumentParser) -> None:
    splits = ("train", "validation", "test", "dev-val")
    command.add_argument("--split", choices=splits, help="of sampled rows; dev-val: the last rows of train")
    command.add_argument("--dev-val", type=positive, default=1024, help="how many rows dev-val is (default 1024)")


def share_cores(arguments: argparse.Namespace) -> None:
    """While scenes are read ahead, threads of the model that wait must sleep, not spin on a core that a reader needs.

    OpenMP reads this when torch loads it. (Measured: predict with the demo model, 2 cores: 17 scenes/s, spinning 11.)
    """
    if arguments.workers > 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def refuse(rules: Iterable[tuple[object, str, str]]) -> None:
    """Raises ConfigError for the first rule (whether it is broken, option, reason) that is."""
    for broken, option, reason in rules:
        if broken:
            raise ConfigError(f"{option} does not count here: {reason}")


# argparse names the type of a bad value by these.
for _check in (positive, non_negative, threads):
    _check.__name__ = "whole number"
probability.__name__ = "number"
