import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from wireframe.bench import tune_tiles
from wireframe.bench.tune_tiles import Candidate
from wireframe.kernels import tiles
from wireframe.kernels.launch import ARCHITECTURES
from wireframe.kernels.tiles import Tile, Tiles

ROOT = Path(__file__).resolve().parent.parent
A, B, C, D = Tile(32, 32, 4, 1), Tile(64, 32, 4, 1), Tile(64, 64, 8, 2, 128), Tile(16, 32, 4, 1)


def test_without_times_enough_warps_come_first_then_the_shortest_loop():
    found = [
        Candidate(A, "", warps=4, work=100.0),
        Candidate(B, "", warps=12, work=300.0),
        Candidate(C, "", warps=8, work=200.0),
        Candidate(D, "spills"),
        Candidate(Tile(32, 64, 4, 1), "", warps=16),
    ]
    assert [candidate.tile for candidate in tune_tiles.rank(found, {})] == [C, B, Tile(32, 64, 4, 1), A]
    assert [candidate.tile for candidate in tune_tiles.rank(found, {A: 1.0, B: 1.5})] == [A, B]


def test_the_table_is_as_before_after_a_trial():
    before = {arch: dict(entries) for arch, entries in tiles.TABLE.items()}
    with pytest.raises(KeyError), tune_tiles.using(89, torch.bfloat16, 64, "dq", D):
        assert tiles.lookup(89, torch.bfloat16, 64) == before[89][torch.bfloat16, 64]._replace(dq=D)
        assert tiles.lookup(90, torch.bfloat16, 64).dq != D
        raise KeyError
    assert before == tiles.TABLE


def test_a_printed_entry_is_code_of_the_table():
    name, value = tune_tiles.entry(torch.float16, 64, Tiles(A, B, C, D)).removesuffix(",").split(": ")
    assert eval(name, vars(tiles)) == (torch.float16, 64) and eval(value, vars(tiles)) == Tiles(A, B, C, D)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_tiles_of_the_table_are_among_the_candidates(arch):
    every = tune_tiles.candidates((16, 32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3), (None, 128))
    assert {tile for entry in tiles.TABLE[arch].values() for tile in entry} <= set(every)


@pytest.mark.parametrize("kernel", tune_tiles.KERNELS)
def test_a_trial_tile_is_what_the_kernel_is_launched_with(kernel):
    described = tune_tiles.KERNELS[kernel]
    for shape in described.shapes:
        for tile in (B, C):
            with tune_tiles.using(90, torch.bfloat16, 64, kernel, tile):
                launches = tune_tiles.plan(shape, torch.bfloat16, 64, 90, described.backward)
            launch = tune_tiles._wanted(launches, described)
            sizes = [launch.arguments[name] for name in ("BM", "BN")]
            assert Tile(*sizes, launch.num_warps, launch.num_stages, launch.max_registers) == tile


def test_times_decide_where_there_are_any(monkeypatch, capsys):
    monkeypatch.setattr(tune_tiles, "examine", lambda kernel, dtype, dim, arch, tile: Candidate(tile, "", 1, 1, 8, 1.0))
    monkeypatch.setattr(tune_tiles, "_device", lambda arch: "cuda")
    monkeypatch.setattr(tune_tiles, "time_tiles", lambda *_: {A: 1.2, B: 1.0, C: 1.1})
    assert tune_tiles.tune("dq", "bf16", 64, 89, [A, B, C], None, 1) == B
    printed = capsys.readouterr().out
    assert "ranked by time" in printed and re.search(r"1\.100 x the fastest.*\n.*1\.200 x the fastest", printed)


def test_a_proposal_is_compiled_and_says_what_it_rests_on():
    what = {"--arch": "89", "--dtype": "bf16", "--dim": "32", "--kernel": "dq", "--workers": "1"}
    sizes = ["--rows", "32", "128", "--keys", "32", "--warps", "4", "--stages", "2"]
    command = ["-m", "wireframe.bench.tune_tiles", *(part for option in what.items() for part in option)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command, *sizes], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "2 candidates" in lines[1] and "static estimate, nothing was timed" in lines[1]
    assert "instructions for 1000 logits" in lines[2] and "resident warps" in lines[2]
    assert lines[-1].startswith("sm_89: (_BF16, 32): Tiles(")
