"""``wireframe report``: one self-contained HTML page about a run, readable offline and without scripts."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import numpy as np

import wireframe
from wireframe.files import atomic_write
from wireframe.sharing import TERMS, count_guarded
from wireframe.train import curves
from wireframe.train.curves import SERIES_COLORS, Mark, Span, number
from wireframe.train.report_style import STYLE
from wireframe.train.run_record import LOSSES, RunRecord, Stage, StageScores, read_run, stages_of

_TITLES = {
    "total": "Loss",
    "match": "Matching",
    "conf": "Confidence",
    "endpoint": "Endpoint L1",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
}
_MAX_ROWS = 100
_MAX_PIXELS = 1 << 26


def write_report(run: str | os.PathLike, out: str | os.PathLike | None = None) -> Path:
    """Writes the page, whole or not at all, the same bytes for the same files; it says what is missing in the run.

    Args:
        run: the folder of a run, finished or not (``log.jsonl``, ``checkpoints/``, ``evaluation/``).
        out: the HTML file; None for ``report.html`` in the folder.

    Raises:
        ConfigError: the folder is none of a run. OSError: the page cannot be written.
    """
    run = Path(run)
    page = _page(read_run(run))
    out = run / "report.html" if out is None else Path(out)
    with atomic_write(out) as file:
        # A name in the log may hold half a surrogate pair.
        file.write(page.encode("utf-8", "replace"))
    return out


def _page(record: RunRecord) -> str:
    body = [
        _header(record),
        _section("Stages", _stage_table(record)),
        _section("Curves", _charts(record)),
        _section("Worst scenes", _worst_scenes(record)),
        _section("Events", _events(record)),
        _section("Settings", _settings(record)),
        _section("Fingerprints", _fingerprints(record)),
    ]
    # Nothing outside the file may be fetched, and nothing in it may run, whatever the names in a run hold.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(record.name)}: training run</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{''.join(body)}</main>\n<footer>wireframe {escape(wireframe.__version__)}</footer>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    if not content:
        return ""
    return f'<section id="{title.lower().replace(" ", "-")}">\n<h2>{title}</h2>\n{content}\n</section>\n'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], style: str = "") -> str:
    """A table of texts; its columns but the first are set as numbers, unless ``style`` is "text"."""
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    head_row = f"<thead><tr>{titles}</tr></thead>\n" if any(head) else ""
    return f'<div class="wide"><table class="{style}">{head_row}<tbody>\n{lines}</tbody></table></div>'


def _header(record: RunRecord) -> str:
    config, tiles = record.config, []
    if record.scores:
        last = record.scores[-1]
        s = last.summary
        more = f"95 % {s['hss_low']:.3f} to {s['hss_high']:.3f}, {s['scenes']:.0f} scenes"
        tiles.append((f"HSS after stage {last.name}", f"{s['hss']:.3f}", more))
    finished = config is not None and record.step >= config.steps
    more = "finished" if finished else f"of {config.steps:,}" if config is not None else ""
    tiles.append(("Steps", f"{record.step:,}", more))
    seconds = _seconds(record, 0, math.inf)
    if seconds > 0:
        tiles.append(("Time in steps", _duration(seconds), f"{_finite_last(_pace(record)):.3g} steps/s at the end"))
    if "device" in record.environment:
        more = ", ".join(f"{k} {record.environment[k]}" for k in ("torch", "triton") if record.environment.get(k))
        tiles.append(("Device", str(record.environment["device"]), more))
    boxes = "".join(
        f'<div class="tile"><span>{escape(title)}</span><strong{"" if len(value) < 12 else " class=text"}>'
        f"{escape(value)}</strong><small>{escape(more)}</small></div>"
        for title, value, more in tiles
    )
    about = f"<p>{escape(config.description)}</p>" if config is not None and config.description else ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in record.notes[:_MAX_ROWS])
    return (
        f"<header>\n<h1>{escape(record.name)}</h1>{about}\n"
        f'<div class="tiles">{boxes}</div>\n{f"<aside><ul>{notes}</ul></aside>" if notes else ""}\n</header>\n'
    )


def _stage_table(record: RunRecord) -> str:
    scores = {found.position: found for found in record.scores}
    stages = stages_of(record)
    rows = [_stage_row(record, i, stage, scores.pop(i, None)) for i, stage in enumerate(stages, 1)]
    # Scores of stages that neither the settings nor the log know.
    rows += [_stage_row(record, i, Stage(found.name, 0, 0, None), found) for i, found in scores.items()]
    if not rows:
        return ""
    head = ["Stage", "Points", "Steps", "Batch", "Rate", "Endpoint", "Time", "Loss at end", "HSS", "95 %", "F1", "IoU",
            "Best threshold"]  # fmt: skip
    lines = [
        f"{found.position}-{found.name}: {count} x {reason}"
        for found in record.scores
        for reason, count in [*found.failures.items(), *_count(reason for _, reason in found.not_scored)][:_MAX_ROWS]
    ]
    unscored = "".join(f"<li>{escape(line)}</li>" for line in lines)
    said = '<p class="soft">Scenes that scored 0, or were not scored, for a reason:</p>'
    said = f'{said}<ul class="list">{unscored}</ul>' if unscored else ""
    return f'<div class="card">{_table(head, rows)}</div>{said}'


def _count(reasons: Iterable[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for reason in reasons:
        counts[reason] = counts.get(reason, 0) + 1
    return list(counts.items())


def _stage_row(record: RunRecord, position: int, stage: Stage, scores: StageScores | None) -> list[str]:
    settings, known = stage.settings, [""] * 5
    if settings is not None:
        weight = f"{settings.endpoint_weight:g}" if settings.endpoint_weight else "off"
        known = [str(settings.points), f"{settings.steps:,}", str(settings.batch_size), number(settings.lr), weight]
    seconds = _seconds(record, stage.start, stage.end)
    # The last twentieth of the stage, once it has come that far.
    end = stage.end - 0.05 * (stage.end - stage.start)
    inside = (record.steps.step > end) & (record.steps.step <= stage.end)
    total = record.steps.terms["total"][inside]
    total = total[np.isfinite(total)]
    row = [f"{position}. {stage.name}", *known, _duration(seconds) if seconds > 0 else "",
           f"{total.mean():.4f}" if len(total) else ""]  # fmt: skip
    if scores is None:
        return [*row, "", "", "", "", ""]
    s = scores.summary
    best = max(scores.thresholds, key=lambda at: at[1], default=None)
    return [
        *row, f"{s['hss']:.3f}", f"{s['hss_low']:.3f} to {s['hss_high']:.3f}", f"{s['f1']:.3f}", f"{s['iou']:.3f}",
        f"{best[1]:.3f} at {best[0]:g}" if best else "",
    ]  # fmt: skip


def _pace(record: RunRecord) -> np.ndarray:
    """Steps a second, NaN where the log has none."""
    seconds = record.steps.terms["seconds_per_step"]
    return np.divide(1.0, seconds, out=np.full(len(seconds), np.nan), where=seconds > 0)


def _seconds(record: RunRecord, start: float, end: float) -> float:
    """Time in the logged steps after ``start`` up to ``end``."""
    step, pace = record.steps.step, record.steps.terms["seconds_per_step"]
    taken = np.diff(step, prepend=0.0) * np.where(np.isfinite(pace), pace, 0.0)
    return float(taken[(step > start) & (step <= end)].sum())


def _finite_last(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else math.nan


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def _charts(record: RunRecord) -> str:
    steps = record.steps
    if not len(steps.step) and not record.scores:
        return ""
    spans = [Span(stage.name, stage.start, stage.end) for stage in stages_of(record)]
    marks = [Mark(event.step, f"step {event.step}: {event.name}") for event in record.events if "bad" in event.name]
    figures = []
    for term in LOSSES:
        values = steps.terms[term]
        nothing = "No values."
        if term == "endpoint" and len(values) and (values == 0).any():
            # A term that is switched off is logged as 0.
            values, nothing = np.where(values == 0, np.nan, values), "Switched off in these steps."
        figures.append(_step_figure(record, _TITLES[term], values, spans, marks[:_MAX_ROWS], nothing=nothing))
    figures.append(_step_figure(record, _TITLES["grad_norm"], steps.terms["grad_norm"], spans, marks[:_MAX_ROWS]))
    figures.append(_step_figure(record, _TITLES["lr"], steps.terms["lr"], spans, log=False, from_zero=True))
    figures.append(_step_figure(record, "Steps a second", _pace(record), spans, log=False, from_zero=True))
    figures += _score_figures(record)
    note = "" if len(steps.step) <= curves.COLUMNS else (
        '<p class="soft">Lines are means of the logged steps, bands their lowest and highest.</p>'
    )  # fmt: skip
    return f'{note}<div class="curves">{"".join(figures)}</div>'


def _step_figure(
    record: RunRecord, title: str, values: np.ndarray, spans, marks=(), nothing="No values.", **how
) -> str:
    chart = curves.step_chart(f"{title} over steps", record.steps.step, values, spans, marks, **how)
    last = f"last {number(_finite_last(values))}" if chart else ""
    return _figure(title, last, chart or f"<p>{nothing}</p>")


def _score_figures(record: RunRecord) -> list[str]:
    if not record.scores:
        return []
    rows = [(s.name, s.summary["hss"], s.summary["hss_low"], s.summary["hss_high"]) for s in record.scores]
    figures = [_figure("HSS by stage", "with 95 % interval", curves.interval_chart("HSS by stage", rows[-12:]))]
    series = [(s.name, [(at[0], at[1]) for at in s.thresholds]) for s in record.scores]
    used = record.scores[-1].confidence
    chart = curves.point_chart("HSS by confidence threshold", series, used)
    key = "".join(
        f'<span><i class="s{i % SERIES_COLORS}"></i>{escape(name)}</span>' for i, (name, at) in enumerate(series) if at
    )
    scenes = max((at[2] for s in record.scores for at in s.thresholds), default=0)
    dashed = f", dashed: used ({used:g})" if used is not None else ""
    chart = f'{chart}<div class="key">{key}</div>' if chart else "<p>No values.</p>"
    return [*figures, _figure("HSS by threshold", f"{scenes} scenes{dashed}", chart)]


def _figure(title: str, more: str, content: str) -> str:
    return f"<figure><figcaption>{escape(title)}<span>{escape(more)}</span></figcaption>{content}</figure>\n"


def _worst_scenes(record: RunRecord) -> str:
    """The stages' worst scenes, the last stage first and open."""
    return "".join(
        _worst(scores, opened=i == 0) for i, scores in enumerate(s for s in record.scores[::-1] if s.worst or s.sheet)
    )


def _worst(scores: StageScores, opened: bool) -> str:
    title = f"Stage {scores.name}: the {len(scores.worst)} lowest of {scores.summary['scenes']:.0f} scenes"
    picture = "<p>There is no picture.</p>"
    if scores.sheet is not None:
        data = base64.b64encode(_fewer_colors(scores.sheet)).decode()
        alt = f"Points, ground truth and prediction of the worst scenes after stage {scores.name}"
        picture = f'<div class="wide"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></div>'
        if count_guarded(scene.order_id for scene in scores.worst):
            picture += f"<p>Do not share this page: {escape(TERMS)}.</p>"
    shown = scores.worst[:_MAX_ROWS]
    rows = [[s.order_id, f"{s.hss:.3f}", f"{s.f1:.3f}", f"{s.iou:.3f}", s.failure or ""] for s in shown]
    why = "Scored 0 because" if any(s.failure for s in shown) else ""
    table = _table(["Scene", "HSS", "F1", "IoU", why], rows)
    table = f"<details><summary>The scores</summary>\n{table}</details>" if rows else ""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>\n{picture}\n{table}</details>\n"


def _fewer_colors(png: bytes) -> bytes:
    """The picture with a palette, a third of the size; as it was where that cannot be."""
    try:
        from PIL import Image

        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                return png
            smaller = image.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        buffer = io.BytesIO()
        smaller.save(buffer, "PNG", optimize=True)
    # Pillow raises many types for a picture that is damaged.
    except Exception:
        return png
    return min(buffer.getvalue(), png, key=len)


def _events(record: RunRecord) -> str:
    if not record.events:
        return ""
    shown = record.events[-_MAX_ROWS:]
    rows = [[f"step {event.step:,}", event.name, event.details] for event in shown]
    count = f"the last {len(shown)} of {len(record.events)}" if len(shown) < len(record.events) else f"{len(shown)}"
    return f"<details><summary>What happened: {count}</summary>\n{_table(['', '', ''], rows, 'text')}</details>"


def _settings(record: RunRecord) -> str:
    if record.config is None:
        return ""
    values = dataclasses.asdict(record.config)
    stages = values.pop("stages")
    groups = {"run": {name: value for name, value in values.items() if not isinstance(value, dict)}}
    groups["run"].pop("description")
    groups |= {name: value for name, value in values.items() if isinstance(value, dict)}
    tables = "".join(
        f"<div><h3>{escape(group)}</h3>{_table(('', ''), [[k, _plain(v)] for k, v in pairs.items()], 'text')}</div>"
        for group, pairs in groups.items()
    )
    of_stages = _table(list(stages[0]), [[_plain(value) for value in stage.values()] for stage in stages])
    return (
        f"<details><summary>All settings</summary>\n<h3>stages</h3>{of_stages}"
        f'<div class="groups">{tables}</div></details>'
    )


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)


def _fingerprints(record: RunRecord) -> str:
    rows = [[f"{section}, {record.checkpoint}", digest] for section, digest in record.hashes.items()]
    rows += [[f"model scored after stage {s.name}", s.model] for s in record.scores if s.model]
    rows += [[f"rows of {points} points", digest] for points, digest in record.data.items()]
    if record.start is not None:
        rows.append([f"began from {record.start.get('source', 'a checkpoint')}", str(record.start.get("sha256", ""))])
    rows += [[name, _plain(value)] for name, value in record.environment.items()]
    if not rows:
        return ""
    note = "SHA-256 of tensors (no clock, host or path in them): equal where two runs are equal bit for bit."
    return f'<p class="soft">{note}</p><div class="card">{_table(("", ""), rows, "text hash")}</div>'
