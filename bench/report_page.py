"""The HTML page of ``wireframe bench report``: tables, plots and every row in one file, which fetches nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape

import wireframe
from wireframe.bench.report_layouts import times_said
from wireframe.bench.report_plots import Picture
from wireframe.bench.report_rows import Row
from wireframe.bench.report_tables import TABLES, Block, blocks
from wireframe.bench.timing import milliseconds
from wireframe.train.report_style import STYLE

_STYLE = f"""{STYLE}
form {{ position: sticky; top: 0; z-index: 1; background: var(--page); padding: 10px 0; display: flex; gap: 18px;
  flex-wrap: wrap; border-bottom: 1px solid var(--rule); }}
select {{ font: inherit; color: inherit; background: var(--card); border: 1px solid var(--rule); border-radius: 6px;
  padding: 3px 6px; max-width: 100%; }}
[hidden] {{ display: none !important; }}
.block {{ margin: 0 0 18px; }}
.card {{ padding: 10px 14px; }}
td.long {{ white-space: normal; min-width: 36em; text-align: left; }}
figure {{ margin: 0 0 12px; }}
code {{ font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }}
p {{ overflow-wrap: anywhere; }}
"""
# Hides what is of another device or operation, then blocks and sections in which nothing is left.
_SCRIPT = """"use strict";
const wanted = {device: document.getElementById("device"), op: document.getElementById("op")};
function filter() {
  const other = (part, name) => wanted[name].value && name in part.dataset && part.dataset[name] !== wanted[name].value;
  for (const part of document.querySelectorAll("[data-device], [data-op]"))
    part.hidden = other(part, "device") || other(part, "op");
  for (const block of document.querySelectorAll(".block"))
    block.hidden = other(block, "device") || !block.querySelector("tbody tr:not([hidden])");
  for (const section of document.querySelectorAll("section"))
    section.hidden = !section.querySelector(".block:not([hidden]), figure:not([hidden])");
}
for (const select of Object.values(wanted)) select.addEventListener("change", filter);
document.getElementById("filter").hidden = false;
filter();
"""
_HEAD = ("operation", "mode", "provider", "shape", "dtype", "det.", "cache", "threads", "p20", "p50 ms", "p80",
         "time / ours", "error", "MiB", "device", "commit", "date", "measured by", "remark")  # fmt: skip


def page(rows: Sequence[Row], kept: Sequence[Row], pictures: Sequence[Picture], missing: Sequence[str]) -> str:
    """The page.

    Args:
        rows: all of them. kept: the newest of each, of which the tables are made. missing: what no plot was made of.
    """
    body = [
        _header(rows, kept, missing),
        _filter(rows),
        *(_section(table.title, map(_block, blocks(table, kept))) for table in TABLES.values()),
        _section("Plots", map(_figure, pictures)),
        _section("Every row", [_every(rows, kept)]),
    ]
    # Whatever the names in the rows hold: no request leaves, and only these two texts count as style and script.
    policy = (
        f"default-src 'none'; script-src {_source(_SCRIPT)}; style-src {_source(_STYLE)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>wireframe: benchmarks</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}</main>\n"
        f"<footer>wireframe {escape(wireframe.__version__)}</footer>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _source(text: str) -> str:
    """The text as a source of the Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _section(title: str, parts: Iterable[str]) -> str:
    content = "".join(parts)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}</section>\n" if content else ""


def _header(rows: Sequence[Row], kept: Sequence[Row], missing: Sequence[str]) -> str:
    days = sorted({row.date.split(" ")[0] for row in rows})
    said = (
        f"{len(rows)} rows of {len({row.device for row in rows})} devices, measured from {days[0]} to {days[-1]}. "
        f"Tables and plots are made of the newest of each, {len(kept)}."
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in missing)
    aside = f"<aside><ul>{notes}</ul></aside>" if notes else ""
    return f"<header>\n<h1>Benchmarks</h1>\n<p>{escape(said)}</p>\n{aside}\n</header>\n"


def _filter(rows: Sequence[Row]) -> str:
    selects = ""
    for name, title in (("device", "Device"), ("op", "Operation")):
        values = map(escape, sorted({getattr(row, name) for row in rows}))
        options = "".join(f'<option value="{value}">{value}</option>' for value in values)
        selects += f'<label>{title} <select id="{name}"><option value="">all</option>{options}</select></label>'
    return f'<form id="filter" hidden autocomplete="off">{selects}</form>\n'


def _block(block: Block) -> str:
    commands = ", ".join(f"<code>{escape(command)}</code>" for command in block.commands)
    lines = "".join(_line(line.cells, op=line.op) for line in block.lines)
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in block.notes)
    return (
        f'<div class="block card" data-device="{escape(block.device)}">\n'
        f'<p class="soft">{escape(block.caption)} Measured by {commands}.</p>\n'
        f"{_table(block.head, lines)}{notes}</div>\n"
    )


def _table(head: Sequence[str], lines: str) -> str:
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>\n'


def _line(cells: Iterable[str], style: str = "", **data: str) -> str:
    names = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    shown = "".join(f"<td{' class=long' if len(cell) > 60 else ''}>{escape(cell)}</td>" for cell in cells)
    return f"<tr{f' class={style}' if style else ''}{names}>{shown}</tr>\n"


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure data-device="{escape(picture.device)}"><div class="wide">'
        f'<img alt="{escape(picture.title)}" src="data:image/png;base64,{data}"></div></figure>\n'
    )


def _every(rows: Sequence[Row], kept: Sequence[Row]) -> str:
    # By identity: rows may be equal.
    current = set(map(id, kept))
    lines = "".join(
        _line(_cells(row, id(row) in current), "" if id(row) in current else "ahead", device=row.device, op=row.op)
        for row in rows
    )
    return f'<div class="block card">\n{_table(_HEAD, lines)}</div>\n'


def _cells(row: Row, current: bool) -> Iterable[str]:
    ratio = ""
    if row.ratio is not None:
        ratio = times_said(row.ratio)
    remark = [row.failed, None if row.value is None else f"{row.value:g}", None if current else "superseded"]
    known = {None: "", True: "yes", False: "no"}
    return (
        row.op, row.mode or "", row.provider, row.shape, row.dtype or "", known[row.deterministic], row.cache or "",
        "" if row.threads is None else str(row.threads),
        *("" if value is None else milliseconds(value) for value in (row.p20_ms, row.p50_ms, row.p80_ms)),
        ratio, "" if row.error is None else f"{row.error:.2g}", "" if row.peak_mib is None else f"{row.peak_mib:g}",
        row.device, row.commit, row.date, row.measured_by, "; ".join(filter(None, remark)),
    )  # fmt: skip
