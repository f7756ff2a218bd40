"""Holds what can be counted without a clock against committed values; a gain that is not kept fails as a loss does.

    python -m wireframe.bench.guard [extension] [static] [step] [--update]

extension: instructions of the native operations (``guard_extension``). static: registers, shared memory, instructions
of the Triton kernels (``guard_static``). step: launches, products and bytes of a training step (``guard_step``).
Figures that are of another compiler, torch or Triton than the committed ones are not compared, and a line says so.

Exit status: 0, or 1 where something differs, or 2 where something cannot be counted at all.
"""

from __future__ import annotations

import argparse
import sys
from typing import Protocol

from wireframe.bench.guard_values import COMMAND, NotComparable
from wireframe.errors import WireframeError

PARTS = ("extension", "static", "step")


class Part(Protocol):
    """Both give one line for each figure that is not the committed one."""

    def check(self) -> list[str]: ...

    def update(self) -> list[str]: ...


def part(name: str) -> Part:
    """What counts one of ``PARTS``."""
    # torch and Triton are imported for those that need them.
    if name == "extension":
        from wireframe.bench.guard_extension import EXTENSION

        return EXTENSION
    if name == "step":
        from wireframe.bench.guard_step import STEP

        return STEP
    from wireframe.bench import guard_static

    return guard_static


def main(argv: list[str] | None = None) -> int:
    """Prints what differs, or with ``--update`` what has been changed, and a last line for each part."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--update", action="store_true", help="commit what is counted now: rewrite the values")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}: one of {', '.join(PARTS)}")
    statuses = [_run(name, arguments.update) for name in arguments.parts or PARTS]
    return max(statuses)


def _run(name: str, update: bool) -> int:
    try:
        lines = part(name).update() if update else part(name).check()
    except NotComparable as problem:
        print(f"{name}: not compared: {problem}", flush=True)
        return 2 if update else 0
    except (WireframeError, OSError) as problem:
        print(f"{name}: {problem}", file=sys.stderr, flush=True)
        return 2
    print(*lines, sep="\n", end="\n" if lines else "")
    print(verdict(name, lines, update), flush=True)
    return 1 if lines and not update else 0


def verdict(name: str, lines: list[str], updated: bool = False) -> str:
    """The last line of a part: that all is well, or how to accept what differs."""
    if not lines:
        return f"{name}: as committed"
    differences = f"{name}: {len(lines)} difference{'s' * (len(lines) > 1)}"
    return f"{differences}, now committed" if updated else f"{differences}; to accept: {COMMAND} {name} --update"


if __name__ == "__main__":
    sys.exit(main())
