"""``wireframe bench report``: its tables say what the rows say, and what cannot be read is named."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from bench_rows import MASKED, attention, every, made, pipeline, rows_of, steps, write

from wireframe.bench import report, report_readme, report_rows
from wireframe.bench.report_rows import newest, races, read_rows
from wireframe.bench.report_tables import TABLES, blocks
from wireframe.cli import main
from wireframe.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SLOWER = made(provider="eager, float32", p50=20.0)


def table_of(name, found, folder):
    return report_readme.markdown(blocks(TABLES[name], newest(rows_of(found, folder))))


def test_a_table_puts_rivals_beside_ours_and_says_wins_and_losses_alike(tmp_path):
    assert table_of("attention", attention(), tmp_path) == (
        "Made CPU; threads 2; torch 2.13.0; triton 3.7.1; NumPy 2.4.6; commit abc1234; 2026-11-28; load 0.5 to 0.5. "
        "Medians in ms; x: time of the rival / ours, in brackets its 95 % interval; below 1 ours is slower. "
        "Measured by `wireframe bench kernels --threads 2`.\n\n"
        "| operation | shape | ours | eager | eager, deterministic | torch.compile | "
        "beside the fastest |\n|---|---|---|---|---|---|---|\n"
        f"| forward | {MASKED} | 2 | 5, 2.50 x (2.40-2.60) | 6, 3.00 x (2.90-3.10) | "
        "1.6, 0.80 x (0.78-0.83) | lost, 0.80 x: torch.compile |"
    )


def test_the_command_is_shown_with_all_that_decides_what_is_measured(tmp_path):
    chosen = "wireframe bench kernels --threads 2 -k 'qk_norm and not graph' --seconds 60"
    rows = [{**row, "command": chosen} for row in attention()]
    assert f" Measured by `{chosen}`.\n" in table_of("attention", rows, tmp_path)


def test_rivals_without_a_column_have_one_together(tmp_path):
    rows = [{**row, "op": "sinkhorn", "shape": "64 x 64 x 64, 20 iterations"} for row in attention()]
    assert (
        "| FlexAttention: not timed: does not run on a CPU; flash, no mask (not the same): 1, 0.50 x (0.49-0.51) | "
    ) in table_of("transport", rows, tmp_path)


@pytest.mark.parametrize(
    ("ratio", "said"),
    [((1.3, 1.1, 1.5), "won, 1.30 x"), ((1.05, 0.9, 1.2), "level, 1.05 x"), ((0.9, 0.8, 0.99), "lost, 0.90 x")],
)
def test_level_means_that_the_interval_holds_one(ratio, said, tmp_path):
    assert f"| {said}" in table_of("attention", [made(), made(provider="eager", ratio=ratio), SLOWER], tmp_path)


def test_rows_without_an_interval_are_level_where_their_times_overlap(tmp_path):
    for p50, said in ((1.1, "level, 1.10 x: eager"), (1.5, "won, 1.50 x"), (0.7, "lost, 0.70 x")):
        table = table_of("attention", [made(), made(provider="eager", p50=p50), SLOWER], tmp_path)
        assert f"{said}" in table and f"{p50}, {p50:.2f} x |" in table


def test_a_single_rival_is_not_called_the_fastest(tmp_path):
    alone = [made(), made(provider="eager", p50=9.0), made(provider="flash, no mask", p50=2.0, error=None)]
    assert table_of("attention", alone, tmp_path).endswith("| 9, 9.00 x | only one timed |")


def test_too_few_pairs_have_a_ratio_and_no_interval(tmp_path):
    few = made(provider="eager", p50=2.0, ratio=(2.0, None, None))
    assert "| 2, 2.00 x | won, 2.00 x: eager |" in table_of("attention", [made(), few, SLOWER], tmp_path)
    # Both ends or none.
    half = json.dumps(made(provider="eager", ratio=(2.0, None, 2.1)))
    (write(tmp_path, []) / "made.jsonl").write_text(half)
    with pytest.raises(ConfigError, match="ratio cannot be"):
        read_rows([tmp_path / "rows"])


def test_launches_that_no_pause_hides_are_marked(tmp_path):
    table = table_of("attention", [made(), made(provider="eager", p50=9.0, host_bound=True)], tmp_path)
    assert "| 9§, 9.00 x |" in table
    assert table.endswith("§ with launches that took the host longer than any pause hides")


def test_a_rival_that_was_not_tried_replaces_no_time_and_one_that_is_wrong_now_does(tmp_path):
    later = {"p50": None, "date": "2026-11-29 10:00 UTC"}
    for failed, kept in (
        ("left out, the time is over", 3.0), ("POT cannot be imported (no): pip install POT", 3.0),
        ("off the reference by 0.1, budget 0.0001", None), ("out of memory", None),
    ):  # fmt: skip
        found = [made(provider="a", p50=3.0), made(provider="a", failed=failed, **later)]
        for rows in (found, found[::-1]):
            assert [row.p50_ms for row in newest(rows_of(rows, tmp_path))] == [kept]


def test_marks_say_what_is_not_committed_and_what_is_of_another_run(tmp_path):
    later = {"commit": "def5678-dirty", "date": "2026-11-29 10:00 UTC"}
    table = table_of("attention", [made(**later), made(provider="eager", p50=3.0, ratio=(3.0, 2.9, 3.1))], tmp_path)
    assert "| 1† | 3, 3.00 x (2.90-3.10)‡ |" in table and "commits def5678-dirty, abc1234" in table
    assert "2026-11-28 to 2026-11-29" in table
    notes = ("† measured with changes that no commit holds", "‡ against ours of another run than the one beside it")
    assert table.endswith("\n\n".join(notes))
    assert "†" not in table_of("attention", attention(), tmp_path)


def test_parts_have_their_share_and_growth_is_no_part(tmp_path):
    table = table_of("pipeline", pipeline(), tmp_path)
    assert "| read_scene | 6 x 768 x 576 | 50 | 45-60 | 20 % of raw bytes -> wireframe |  |" in table
    assert "| 5 % of raw bytes -> wireframe | NumPy reference: 75, 7.50 x (7.00-8.00) |" in table
    assert len(table.splitlines()) == 2 + 2 + 3 and "threads |" not in table


def test_a_ratio_of_two_runs_is_marked_in_every_table(tmp_path):
    other = {"date": "2026-11-27 10:00 UTC", "ratio": None}
    for name, rows, marked in (
        ("attention", attention(), "5, 2.50 x‡"), ("pipeline", pipeline(), "NumPy reference: 75, 7.50 x‡"),
        ("prepare", pipeline(), "| 4000 | 2.00 x‡ |"), ("step", steps(), "| 2.00 x‡ |"),
    ):  # fmt: skip
        apart = [row if row["provider"] == "ours" else {**row, **other} for row in rows]
        assert marked in table_of(name, apart, tmp_path) and "‡" not in table_of(name, rows, tmp_path), name


def test_prepare_is_in_scenes_a_second(tmp_path):
    table = table_of("prepare", pipeline(), tmp_path)
    assert "| ours | 48 scenes, full size | 24 | 2000 |  |" in table
    assert "| ours, 1 worker | 48 scenes, full size | 12 | 4000 | 2.00 x (1.90-2.10) |" in table


def test_steps_have_what_the_profiler_said(tmp_path):
    table = table_of("step", steps(), tmp_path)
    assert "| ours | 8 | 7.2-9.6 |  | 40.0% of 989 TFLOP/s | 643 | 1.0% | 2 |" in table
    assert "| torch.compile | 16 | 14.4-19.2 | 2.00 x (1.98-2.02) |  | 1071 | 10.0% | 2 |" in table
    assert "`wireframe bench step`" in table and "CUDA 13.0; driver 580.1" in table


def test_determinism_costs_what_pairs_that_differ_in_it_alone_say(tmp_path):
    table = table_of("determinism-step", steps(), tmp_path)
    # Of ours the interval of the race, turned around; of others the quotient of medians.
    assert "| ours | 7.9 | 8 | 1.02 x (1.01-1.03) | 8 |" in table
    assert "| torch.compile | 16 | 20 | 1.25 x | 8 |" in table
    assert table_of("determinism-kernels", attention(), tmp_path).count("\n|") == 2 + 1
    assert blocks(TABLES["determinism-kernels"], rows_of([made(), made(provider="eager")], tmp_path)) == []


def test_the_newest_row_of_each_wins_and_of_equal_dates_the_later_line(tmp_path):
    old = {"date": "2026-11-27 10:00 UTC"}
    found = [made(p50=1.0), made(p50=2.0, **old), made(p50=3.0), made(p50=4.0, threads=1),
             made(p50=5.0, dtype="bfloat16"), made(p50=6.0, deterministic=False),
             made(p50=7.0, cache="cold")]  # fmt: skip
    assert [row.p50_ms for row in newest(rows_of(found, tmp_path))] == [3.0, 4.0, 5.0, 6.0, 7.0]
    # What does not know its threads gives way to what does, if that is newer.
    unknown = [made(p50=1.0, threads=None, **old), made(p50=2.0)]
    assert [row.p50_ms for row in newest(rows_of(unknown, tmp_path))] == [2.0]
    unknown = [made(p50=1.0, threads=None), made(p50=2.0, **old)]
    assert [row.p50_ms for row in newest(rows_of(unknown, tmp_path))] == [1.0, 2.0]


def test_rivals_of_another_precision_stay_in_the_race(tmp_path):
    found = [made(), made(provider="ours, bfloat16", dtype="bfloat16", p50=0.5), made(provider="eager", p50=2.0)]
    (race,) = races(rows_of(found, tmp_path))
    assert race.ours.dtype == "float32" and [row.provider for row in race.others] == ["ours, bfloat16", "eager"]
    both = [*found, made(dtype="bfloat16", p50=0.4)]
    assert [(race.ours.p50_ms, len(race.others)) for race in races(rows_of(both, tmp_path))] == [(1.0, 1), (0.4, 1)]


DOCUMENT = (
    "# A\n\n<!-- bench:attention -->\nold\n<!-- /bench -->\ntext | `code`\n\n"
    "<!-- bench:step nvidia-h200 -->\n<!-- /bench -->\nend"
)


def test_a_readme_gets_its_tables_and_keeps_all_else(tmp_path, capsys):
    folder, path = write(tmp_path, every()), tmp_path / "README.md"
    path.write_text(DOCUMENT)
    command = ["bench", "report", "--rows", str(folder)]
    assert main([*command, "--check", str(path)]) == 1
    assert "line 3: bench:attention is not as the rows make it" in capsys.readouterr().err
    assert path.read_text() == DOCUMENT
    assert main([*command, "--readme", str(path)]) == 0
    assert "2 of 2 tables changed" in capsys.readouterr().out
    found = path.read_text()
    first, second = (table_of(name, every(), tmp_path) for name in ("attention", "step"))
    assert found == DOCUMENT.replace("old\n", f"\n{first}\n\n").replace(
        "h200 -->\n", f"h200 -->\n\n{second}\n\n"
    )  # fmt: skip
    assert main([*command, "--check", str(path)]) == 0 == main([*command, "--readme", str(path)])
    assert path.read_text() == found
    # One digit typed by hand is found.
    path.write_text(found.replace("| 2 | 5, 2.50 x", "| 2 | 5, 2.60 x"))
    assert main([*command, "--check", str(path)]) == 1


def test_line_ends_of_a_document_stay(tmp_path):
    rows = newest(rows_of(every(), tmp_path))
    text, _, _ = report_readme.filled(DOCUMENT.replace("\n", "\r\n"), rows)
    assert text.count("\n") == text.count("\r\n")
    assert text.replace("\r\n", "\n") == report_readme.filled(DOCUMENT, rows)[0]


def test_markers_in_code_are_none(tmp_path):
    fenced = f"````md\n```\n<!-- bench:nothing -->\n````\n{DOCUMENT}\n~~~\n<!-- /bench -->\n"
    text, found, _ = report_readme.filled(fenced, newest(rows_of(every(), tmp_path)))
    assert [place.name for place in found] == ["attention", "step"] and text.startswith(fenced[:45])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- bench:speed -->\n<!-- /bench -->", "line 1: there is no table speed; there are attention, transport"),
        ("a\n<!-- bench:attention -->\nb", "line 2: bench:attention is not closed"),
        ("<!-- bench:attention -->\n<!-- bench:step -->\n<!-- /bench -->", "line 1: bench:attention is not closed"),
        ("a\n<!-- /bench -->", "line 2: <!-- /bench --> closes nothing"),
        ("<!-- bench attention -->\n<!-- /bench -->", "line 1: <!-- bench attention --> is no marker"),
        ("<!-- bench:transport -->\n<!-- /bench -->", "there are no rows for bench:transport: not measured yet"),
        ("<!-- bench:step made-cpu -->\n<!-- /bench -->", "there are no rows of made-cpu for bench:step"),
        ("text alone", "there is no table; put <!-- bench:NAME -->"),
        (b"\xff", "is no UTF-8 text"),
    ],
)
def test_a_document_that_cannot_be_filled_stays_as_it_is(text, said, tmp_path, capsys):
    path, page = tmp_path / "README.md", tmp_path / "page.html"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    command = ["bench", "report", "--rows", str(write(tmp_path, [*attention(), *steps()])), "--readme", str(path)]
    assert main([*command, "--out", str(page)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and str(path) in error
    assert path.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "rows"]


LACKING = {name: value for name, value in made().items() if name not in ("sizes", "load")}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"op": 1', "line 3: this is no JSON"),
        ("[" * 100_000, "line 3: this is no JSON"),
        ("[]", "line 3: this is no JSON object"),
        (json.dumps(LACKING), "line 3: the row lacks sizes, load"),
        (json.dumps(made(p50_ms="1")), 'line 3: p50_ms cannot be "1"'),
        (json.dumps(made(p50_ms=-1.0)), "line 3: p50_ms cannot be -1.0"),
        (json.dumps(made(p50_ms=float("nan"))), "line 3: p50_ms cannot be NaN"),
        (json.dumps(made(flops=10**400)), "line 3: flops cannot be 1000"),
        (json.dumps(made(ratio=None) | {"ratio": {"p50": 1.0}}), 'line 3: ratio cannot be {"p50": 1.0}'),
        (json.dumps(made(sizes={"batch": "4"})), "line 3: sizes cannot be"),
        (json.dumps(made(threads=True)), "line 3: threads cannot be true"),
        (json.dumps(made(commit=None)), "line 3: commit cannot be null"),
    ],
)
def test_a_line_that_is_no_row_is_named(line, said, tmp_path, capsys):
    folder = write(tmp_path, [made()])
    (folder / "made.jsonl").write_text(f"{json.dumps(made())}\n\n{line}\n")
    assert main(["bench", "report", "--rows", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert f"{folder / 'made.jsonl'}, {said}" in error and error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_files_that_are_no_rows_are_refused(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path, [])
    assert main(["bench", "report", "--rows", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    assert "there are no rows in" in capsys.readouterr().err
    monkeypatch.setattr(report_rows, "_MOST_BYTES", 100)
    folder = write(tmp_path, [made()])
    assert main(["bench", "report", "--rows", str(folder), "--out", str(tmp_path / "page.html")]) == 2
    assert "made.jsonl has more than 0 MiB" in capsys.readouterr().err
    assert main(["bench", "report", "--rows", "/dev/null", "--out", str(tmp_path / "page.html")]) == 2
    assert "is no regular file" in capsys.readouterr().err
    assert main(["bench", "report", "--rows", str(folder)]) == 2
    monkeypatch.setattr(report, "RESULTS", tmp_path / "nowhere")
    capsys.readouterr()
    assert main(["bench", "report", "--out", str(tmp_path / "page.html")]) == 2
    assert "nowhere; measure with wireframe bench kernels, or give --rows" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_rows_given_by_name_write_only_what_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "_PLOTS", tmp_path / "docs" / "bench")
    monkeypatch.setattr(report, "_PAGE", tmp_path / "report.html")
    monkeypatch.setattr(report, "RESULTS", write(tmp_path, attention()))
    assert main(["bench", "report", "--rows", str(report.RESULTS), "--plots", str(tmp_path / "plots")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plots", "rows"]
    assert main(["bench", "report"]) == 0
    assert [path.name for path in (tmp_path / "docs" / "bench").iterdir()] == [
        path.name for path in (tmp_path / "plots").iterdir()
    ]
    assert (tmp_path / "report.html").is_file()
    assert "no rows of wireframe bench step: not measured yet" in capsys.readouterr().out
    assert main(["bench", "report", "--check", "x.md", "--readme", "x.md"]) == 2


def test_the_readme_holds_the_committed_rows(capsys):
    assert (ROOT / "README.md").read_text().count("<!-- bench:") >= 7
    status = main(["bench", "report", "--rows", str(ROOT / "bench" / "results"), "--check", str(ROOT / "README.md")])
    assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_race_of_the_suite_has_a_table(device):
    from wireframe.bench import runner
    from wireframe.bench.race import How

    how = How(device, small=False, repeats=9, threads=2)
    missing = [
        race.title
        for part in runner.PARTS
        for race in runner.races(part, how)
        if not any(
            table.holds(SimpleNamespace(part=part, op=race.op, shape=race.shape)) for table in TABLES.values()
        )
    ]
    assert missing == []
