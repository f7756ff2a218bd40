"""Rows of ``bench/results/*.jsonl`` as the report takes them: read with care, and the newest of each kept."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wireframe.bench.names import ABSENT, LEFT_OUT, OURS, is_ours
from wireframe.errors import ConfigError, one_line, printable
from wireframe.files import read_capped

_MOST_BYTES = 64 << 20
# No time, byte count or product comes near it, and floats hold it.
_MOST = 1e24
DIRTY = "-dirty"


@dataclasses.dataclass(frozen=True)
class Row:
    """One rival in one race; ``None`` where something is not known, the times also where the rival ``failed``.

    Attributes:
        ratio: its time over that of ours in the same race: median, low and high end of the 95 % interval, both None
            where pairs were too few for one.
        error: relative to the reference; None where the rival computes something else.
        value: what was measured where that is no time; the operation says its unit.
    """

    part: str | None
    op: str
    provider: str
    mode: str | None
    shape: str
    sizes: dict[str, int]
    dtype: str | None
    deterministic: bool | None
    p20_ms: float | None
    p50_ms: float | None
    p80_ms: float | None
    ratio: tuple[float, float | None, float | None] | None
    cache: str | None
    error: float | None
    peak_mib: float | None
    flops: float | None
    bytes: float | None
    device: str
    threads: int | None
    torch: str | None
    triton: str | None
    cuda: str | None
    driver: str | None
    numpy: str | None
    python: str | None
    commit: str
    date: str
    load: float | None
    whole: str | None = None
    failed: str | None = None
    command: str | None = None
    value: float | None = None
    mfu: float | None = None
    mfu_of: float | None = None
    launches: float | None = None
    idle: float | None = None
    host_bound: bool | None = None

    @property
    def of_ours(self) -> bool:
        """Whether it is an implementation of ours, in whichever setting."""
        return is_ours(self.provider)

    @property
    def dirty(self) -> bool:
        return self.commit.endswith(DIRTY)

    @property
    def tried(self) -> bool:
        """False of a rival that was left out or is not installed."""
        return self.failed is None or not (self.failed == LEFT_OUT or ABSENT in self.failed)

    @property
    def exact(self) -> bool:
        """Whether it computes what the operation is, and was found to."""
        return self.error is not None

    @property
    def measured_by(self) -> str:
        """The command, as the row says it."""
        return self.command or "unknown"


_KINDS: dict[str, str] = {field.name: str(field.type) for field in dataclasses.fields(Row)}
_REQUIRED = tuple(f.name for f in dataclasses.fields(Row) if f.default is dataclasses.MISSING)


def read_rows(paths: Iterable[str | os.PathLike]) -> list[Row]:
    """The rows of files, and of the ``*.jsonl`` of folders, in their order.

    Raises:
        ConfigError: there are none, or a file is too large or holds a line that is no row; it names file and line.
        OSError: a file cannot be read.
    """
    paths = [Path(path) for path in paths]
    rows: list[Row] = []
    for path in paths:
        for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
            rows += _read(file)
    if not rows:
        where = ", ".join(map(str, paths))
        raise ConfigError(f"there are no rows in {where}; measure with wireframe bench kernels, or give --rows")
    return rows


def _read(path: Path) -> list[Row]:
    data = read_capped(path, _MOST_BYTES, "files of rows of wireframe bench, or their folder")
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                rows.append(_row(line))
            except ConfigError as problem:
                raise ConfigError(f"{path}, line {number}: {problem}") from None
    return rows


def _row(line: bytes) -> Row:
    try:
        found = json.loads(line)
    # Nesting that is too deep, digits that are too many, and bytes that are no UTF-8.
    except (ValueError, RecursionError) as problem:
        raise ConfigError(f"this is no JSON ({one_line(problem, 80)})") from None
    if not isinstance(found, dict):
        raise ConfigError("this is no JSON object")
    missing = [name for name in _REQUIRED if name not in found]
    if missing:
        raise ConfigError(f"the row lacks {', '.join(missing)}")
    return Row(**{name: _value(name, kind, found[name]) for name, kind in _KINDS.items() if name in found})


def _value(name: str, kind: str, value: Any) -> Any:
    if name == "sizes":
        value = {} if value is None else value
        if isinstance(value, dict) and all(_is_whole(size) for size in value.values()):
            return {printable(size): number for size, number in value.items()}
    elif name == "ratio":
        if value is None:
            return None
        middle, *ends = [value.get(end, 0) for end in ("p50", "low", "high")] if isinstance(value, dict) else [None]
        if all(_is_number(end) and end > 0 for end in (middle, *(ends if ends != [None, None] else ()))):
            return float(middle), *(end if end is None else float(end) for end in ends)
    elif value is None:
        if "None" in kind:
            return None
    elif kind.startswith("str"):
        if isinstance(value, str):
            return printable(value)
    elif kind.startswith("bool"):
        if isinstance(value, bool):
            return value
    elif name == "threads":
        if _is_whole(value):
            return value
    # What is off by an infinite error, or by no number, failed and says so.
    elif name == "error" and isinstance(value, float):
        return value
    elif _is_number(value) and (value > 0 or not name.endswith("_ms")):
        return float(value)
    raise ConfigError(f"{name} cannot be {one_line(json.dumps(value), 60)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _MOST


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MOST


def newest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of every device, operation, provider, mode, shape, dtype, determinism, threads and cache.

    Of equal dates the later one counts, and one of a rival that was tried before all where it was not. Where the
    threads are not known, any newer row that agrees otherwise does.
    """
    kept: dict[tuple, tuple[str, int, Row]] = {}
    for position, row in enumerate(rows):
        key = (*_beside_threads(row), row.threads)
        if key not in kept or (kept[key][2].tried, kept[key][0]) <= (row.tried, row.date):
            kept[key] = (row.date, position, row)
    latest: dict[tuple, str] = {}
    for date, _, row in kept.values():
        key = _beside_threads(row)
        latest[key] = max(latest.get(key, ""), date)
    found = sorted(kept.values(), key=lambda item: item[1])
    return [row for date, _, row in found if row.threads is not None or date == latest[_beside_threads(row)]]


def _beside_threads(row: Row) -> tuple:
    return row.device, row.op, row.provider, row.mode, row.shape, row.dtype, row.deterministic, row.cache


def machines(rows: Sequence[Row]) -> list[tuple[str, int | None]]:
    """Devices with their threads, in order of their names; what was measured last comes first of a device."""
    last: dict[tuple[str, int | None], str] = {}
    for row in rows:
        key = (row.device, row.threads)
        last[key] = max(last.get(key, ""), row.date)
    by_date = sorted(last, key=last.__getitem__, reverse=True)
    return sorted(by_date, key=lambda machine: machine[0])


@dataclasses.dataclass(frozen=True)
class Held:
    """The rows of one race: the first of ours, which ratios refer to, the others, and the whole where it is a part."""

    ours: Row | None
    others: list[Row]
    whole: Row | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """All of them, that of ours first."""
        return tuple(filter(None, (self.ours, *self.others, self.whole)))

    @property
    def any(self) -> Row:
        return self.rows[0]


def races(rows: Iterable[Row]) -> list[Held]:
    """Rows of one machine by race. Rivals of another dtype than all of ours belong to the first race of that name."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.part, row.op, row.mode, row.shape, row.cache), []).append(row)
    found = []
    for group in groups.values():
        ours: dict[str | None, Row] = {}
        for row in group:
            if row.provider == OURS and (row.dtype not in ours or ours[row.dtype].date <= row.date):
                ours[row.dtype] = row
        for dtype in ours or {group[0].dtype: None}:
            first = next(iter(ours), dtype)
            own = ours.get(dtype)
            mine = [row for row in group if row.dtype == dtype or (row.dtype not in ours and dtype == first)]
            whole = next((row for row in mine if row.provider == row.whole), None)
            others = [row for row in mine if row.provider not in (OURS, row.whole)]
            found.append(Held(own, others, whole))
    return [race for race in found if race.ours or race.others]


def time_ratio(row: Row, ours: Row | None) -> tuple[float, float | None, float | None] | None:
    """Time of a row over that of ours; its interval is None where the row does not state it."""
    if row.p50_ms is None:
        return None
    if row.ratio is not None:
        return row.ratio
    return None if ours is None or ours.p50_ms is None else (row.p50_ms / ours.p50_ms, None, None)
