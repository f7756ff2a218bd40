"""What a race found: rows for JSON lines, lines of a Markdown table, and its bars."""

from __future__ import annotations

from collections.abc import Sequence

from wireframe.bench.holding import Entry
from wireframe.bench.names import LEFT_OUT, OURS
from wireframe.bench.race import Race
from wireframe.bench.timing import milliseconds, paired_ratio, percentiles

TABLE_HEAD = "| provider | median | p20-p80 | time / ours (95 %) | error | peak MiB |\n|---|---|---|---|---|---|"


def rows(part: str, race: Race, entries: Sequence[Entry], machine: dict) -> list[dict]:
    """A row a rival; where one failed it has no times, and the reason under ``failed``."""
    ours = first_of_ours(entries)
    return [_row(part, race, entry, ours, machine) for entry in entries]


def first_of_ours(entries: Sequence[Entry]) -> Entry | None:
    """The entry that all others are compared with."""
    return next((e for e in entries if e.rival.provider == OURS and e.times and not e.failed), None)


def _row(part: str, race: Race, entry: Entry, ours: Entry | None, machine: dict) -> dict:
    ratio = None
    if not entry.failed and ours not in (None, entry):
        turns = sorted(entry.times.keys() & ours.times.keys())
        ratio = paired_ratio([entry.times[turn] for turn in turns], [ours.times[turn] for turn in turns])
    times = [] if entry.failed else list(entry.times.values())
    row = {
        "part": part, "op": race.op, "provider": entry.rival.provider, "mode": race.mode, "shape": race.shape,
        "sizes": race.sizes, "dtype": entry.rival.dtype or race.dtype, "deterministic": entry.rival.deterministic,
        **percentiles(times),
        "ratio": ratio, "cache": race.cache, "error": entry.error, "peak_mib": entry.peak_mib,
        "first_s": entry.first_s, "flops": race.flops, "bytes": race.bytes, "whole": race.whole,
    }  # fmt: skip
    bound = {"host_bound": True} if entry.host_bound and times else {}
    return {**row, **bound, **({"failed": entry.failed} if entry.failed else {}), **machine}


def table_line(row: dict) -> str:
    """The line of a row below ``TABLE_HEAD``."""
    if "failed" in row:
        return f"| {row['provider']} | not timed: {row['failed']} | | | | |"
    low, middle, high = (row[f"{name}_ms"] for name in ("p20", "p50", "p80"))
    if middle is None:
        return f"| {row['provider']} | not timed: pytest-benchmark is disabled | | | | |"
    # One unit for all three.
    factor, unit = (1e3, "us") if middle < 0.1 else (1, "ms")
    ratio = row["ratio"]
    cells = (
        row["provider"],
        f"{milliseconds(middle * factor)} {unit}",
        f"{milliseconds(low * factor)}-{milliseconds(high * factor)}",
        "" if ratio is None else f"{ratio['p50']:.2f}" + _interval(ratio),
        "" if row["error"] is None else f"{row['error']:.2g}",
        "" if row["peak_mib"] is None else f"{row['peak_mib']:g}",
    )
    return f"| {' | '.join(cells)} |"


def _interval(ratio: dict) -> str:
    return "" if ratio["low"] is None else f" ({ratio['low']:.2f}-{ratio['high']:.2f})"


def bar_lines(race: Race, found: Sequence[dict]) -> list[str]:
    """The bars of a race beside its rows; without rows all of them are not measured yet."""
    return [_bar_line(race, bar, found) for bar in race.bars]


def _bar_line(race: Race, bar: tuple, found: Sequence[dict]) -> str:
    timed = [row for row in found if row["p50_ms"] is not None and row["dtype"] == race.dtype]
    of_bar = [row for row in found if bar.rival and row["provider"].startswith(bar.rival)]
    left_out = [row["provider"] for row in of_bar if row.get("failed") == LEFT_OUT]
    ours = next((row for row in timed if row["provider"] == OURS), None)
    if bar.memory:
        wanted, value = f"MiB <= {bar.bound:g}", ours and ours["peak_mib"]
    elif bar.rival is None:
        wanted, value = f"ms <= {bar.bound:g}", ours and ours["p50_ms"]
    else:
        ratios = [row["ratio"]["p50"] for row in timed if row["ratio"] and row["provider"].startswith(bar.rival)]
        wanted, value = f"time of {bar.rival} / ours >= {bar.bound:.3g}", min(ratios, default=None)
    said = f"bar: {race.title}: {wanted}, "
    if value is None:
        return f"{said}not measured yet"
    met = value >= bar.bound if bar.rival else value <= bar.bound
    without = f", without {', '.join(left_out)}, for which the time was over" if left_out else ""
    return f"{said}measured {value:.3g}: {'met' if met else 'missed'}{without}"


def share_lines(found: Sequence[dict]) -> list[str]:
    """For every whole, its parts and their shares of its time, both measured in turn."""
    shares: dict[str, list[str]] = {}
    for row in found:
        if row["provider"] == row["whole"] and row["ratio"]:
            shares.setdefault(row["whole"], []).append(f"{row['op']} {1 / row['ratio']['p50']:.0%}")
    return [f"{whole}: {', '.join(parts)}" for whole, parts in shares.items()]
