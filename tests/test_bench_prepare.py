import json

import pytest

from wireframe.bench import prepare


def test_the_bench_measures_the_whole_and_every_part(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    arguments = ["--size", "small", "--scenes", "3", "--part-scenes", "2", "--repeats", "1", "--reference"]
    assert prepare.main([*arguments, "--workers", "1", "2", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    whole = [row for row in rows if row["op"] == "prepare"]
    assert [row["workers"] for row in whole] == [1, 2]
    for row in whole:
        assert row["shape"] == "3 scenes, small size" and row["scenes_per_s"] > 0
        assert row["scenes_per_s"] == pytest.approx(3000 / row["p50_ms"], rel=1e-2)
        # CPU time over wall time, as the two other figures say it.
        assert 0 < row["cores_busy"] < 16
    parts = [row for row in rows if row["op"] != "prepare"]
    assert [row["op"] for row in parts if row["provider"] == "reference"][-4:] == list(prepare.CHOICES)
    assert {row["op"] for row in parts} == set(prepare.PARTS)
    assert all(row["mean_ms"] > 0 and {"commit", "date", "torch"} <= row.keys() for row in rows if "mean_ms" in row)
    text = capsys.readouterr().out
    assert "| PNG decode | shared |" in text and "bound by" in text and "| 3 scenes, small size | 2 |" in text


def test_the_table_compares_the_reference_with_ours():
    ours = {"op": "fusion", "provider": "native", "shape": "16 scenes", "mean_ms": 30.0}
    other = {"op": "npz", "provider": "shared", "shape": "16 scenes", "mean_ms": 10.0}
    lines = prepare.format_parts([ours, other, {**ours, "provider": "reference", "mean_ms": 300.0}]).splitlines()
    assert lines[2] == "| fusion | native | 30 | 75 % | 300 | 10.0 x |"
    assert lines[3] == "| npz | shared | 10 | 25 % | | |"
    assert lines[4] == "| sum | | 40 | bound by fusion | | |"


def test_cores_busy_counts_the_cpu_time_of_the_runs_that_count(monkeypatch, tmp_path):
    from wireframe.synth import write_shards

    write_shards(tmp_path, 0, 0, 2, prepare.SIZES["small"], shard_size=2)
    rows = prepare.throughput_rows("small", tmp_path, 2, [1], 2, {})
    # One worker cannot keep more than one core busy.
    assert 0.05 < rows[0]["cores_busy"] < 1.3
    with pytest.raises(RuntimeError, match="2 of 5"):
        prepare.throughput_rows("small", tmp_path, 5, [1], 1, {})
