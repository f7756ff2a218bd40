"""Tables inside Markdown: what stands between ``<!-- bench:NAME -->`` and ``<!-- /bench -->`` is made from rows.

A marker takes a line of its own. Behind the name of a table may stand a device as its file of rows is named
(``<!-- bench:attention nvidia-h200 -->``): then its rows alone count. Lines inside code fences are no markers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from wireframe.bench.report_rows import Row
from wireframe.bench.report_tables import TABLES, Block, blocks
from wireframe.errors import ConfigError, one_line
from wireframe.files import read_capped

_MOST_BYTES = 16 << 20
_OPENING = re.compile(r"<!-- bench:([\w-]+)(?: ([\w-]+))? -->", re.ASCII)
_CLOSING = "<!-- /bench -->"
_LOOKS_LIKE_ONE = re.compile(r"<!--\s*/?\s*bench\b")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Place(NamedTuple):
    """A table in a document. begin, end: positions of the lines between its markers; line: of the opening one."""

    name: str
    device: str | None
    begin: int
    end: int

    @property
    def line(self) -> int:
        """Counted from 1."""
        return self.begin


def read_text(path: Path) -> str:
    """The document.

    Raises:
        ConfigError: it is too large or no UTF-8. OSError: it cannot be read.
    """
    data = read_capped(path, _MOST_BYTES, "a Markdown file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise ConfigError(f"{path} is no UTF-8 text ({one_line(problem, 80)})") from None


def places(lines: Sequence[str]) -> list[Place]:
    """The tables of a document's lines.

    Raises:
        ConfigError: a marker is not closed, closes nothing, names no table or looks like one and is none; it names
            the line.
    """
    found, opened, fence = [], None, None
    for number, line in enumerate(map(str.strip, lines), 1):
        mark = _FENCE.match(lines[number - 1])
        if opened is None and mark:
            fence = mark[1] if fence is None else None if _ends(line, fence) else fence
        if fence is not None or not _LOOKS_LIKE_ONE.match(line):
            continue
        match = _OPENING.fullmatch(line)
        if not match and line != _CLOSING:
            raise ConfigError(
                f"line {number}: {one_line(line, 60)} is no marker; write <!-- bench:NAME --> or {_CLOSING}"
            )
        if match and opened:
            raise ConfigError(f"line {opened[2]}: bench:{opened[0]} is not closed; put {_CLOSING} behind its table")
        if not match and not opened:
            raise ConfigError(f"line {number}: {_CLOSING} closes nothing; no table begins before it")
        if match:
            if match[1] not in TABLES:
                raise ConfigError(f"line {number}: there is no table {match[1]}; there are {', '.join(TABLES)}")
            opened = (match[1], match[2], number)
        else:
            found.append(Place(*opened, number - 1))
            opened = None
    if opened:
        raise ConfigError(f"line {opened[2]}: bench:{opened[0]} is not closed; put {_CLOSING} behind its table")
    return found


def _ends(line: str, fence: str) -> bool:
    """Whether a stripped line ends a fence: as many of its characters or more, and nothing else."""
    return len(line) >= len(fence) and set(line) == {fence[0]}


def filled(text: str, rows: Sequence[Row]) -> tuple[str, list[Place], list[Place]]:
    """A document with its tables as rows make them and all else as it was; its tables, and those that changed.

    Args:
        rows: the newest of each.

    Raises:
        ConfigError: see ``places``; or there are no tables, or no rows of one.
    """
    # Of line ends those alone that editors and git know.
    lines = re.findall(r"[^\n]*\n|[^\n]+", text)
    wanted = places(lines)
    if not wanted:
        raise ConfigError("there is no table; put <!-- bench:NAME --> and <!-- /bench --> where one is to be")
    parts, reached, changed = [], 0, []
    for place in wanted:
        found = blocks(TABLES[place.name], rows, place.device)
        if not found:
            of = f" of {place.device}" if place.device else ""
            raise ConfigError(f"line {place.line}: there are no rows{of} for bench:{place.name}: not measured yet")
        end = "\r\n" if lines[place.begin - 1].endswith("\r\n") else "\n"
        made = f"\n{markdown(found)}\n\n".replace("\n", end)
        if made != "".join(lines[place.begin : place.end]):
            changed.append(place)
        parts += [*lines[reached : place.begin], made]
        reached = place.end
    return "".join([*parts, *lines[reached:]]), wanted, changed


def markdown(found: Sequence[Block]) -> str:
    """Blocks one below the other."""
    return "\n\n".join(map(_block, found))


def _block(block: Block) -> str:
    commands = ", ".join(f"`{_code(command)}`" for command in block.commands)
    head, *body = (f"| {' | '.join(map(_text, cells))} |" for cells in [block.head, *(x.cells for x in block.lines)])
    lines = [f"{_text(block.caption)} Measured by {commands}.", "", head, f"|{'---|' * len(block.head)}", *body]
    return "\n".join([*lines, *(f"\n{_text(note)}" for note in block.notes)])


def _text(text: str) -> str:
    """Text that Markdown and HTML take as it is; no part of it ends a cell or begins a comment."""
    text = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|`*\[\]~$])", r"\\\1", text)


def _code(text: str) -> str:
    return text.replace("`", "'").replace("<", "(").replace("|", "/")
