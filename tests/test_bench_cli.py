"""The command ``wireframe bench``: its parts, their options, and the command lines that are written down."""

import re
import shlex
from pathlib import Path

import pytest
from bench_rows import attention, write

from wireframe import cli
from wireframe.bench.report_rows import read_rows
from wireframe.cli import main
from wireframe.errors import WireframeError
from wireframe.kernels import native

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["kernels", "--stage", "3"], "unrecognized arguments: --stage 3"),
        (["pipeline", "--table"], "unrecognized arguments: --table"),
        (["kernels", "--rows", "x"], "unrecognized arguments: --rows x"),
        (["report", "-k", "x"], "unrecognized arguments: -k x"),
        (["static", "--model"], "unrecognized arguments: --model"),
        (["step", "--check", "x"], "unrecognized arguments: --check x"),
        (["static", "--check", "x", "--out", "y"], "argument --out: not allowed with argument --check"),
        ([], "the following arguments are required: part"),
        (["kernel"], "argument part: invalid choice: 'kernel'"),
    ],
)
def test_an_option_of_another_part_and_no_part_are_refused(given, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *given])
    assert stop.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_options_of_every_command_count_before_and_behind_the_part(tmp_path, capsys):
    for given in (["--debug", "report"], ["report", "--debug"]):
        with pytest.raises(WireframeError, match="there are no rows"):
            main(["bench", *given, "--rows", str(tmp_path), "--out", str(tmp_path / "page.html")])


@pytest.mark.parametrize("file", ["README.md", "bench/NOTES.md", "bench/results"])
def test_every_command_that_is_written_down_is_one(file):
    path = ROOT / file
    if path.is_dir():
        said = {row.command for row in read_rows([path])}
    else:
        said = set(re.findall(r"`(wireframe bench [^`]+)`", path.read_text()))
    commands = [shlex.split(line) for line in said if line.startswith("wireframe bench ")]
    assert commands
    for command in commands:
        assert cli._parser().parse_args(command[1:]).part == command[2]


@pytest.mark.parametrize("command, word", [
    ("report --rows rows --out rows/made.jsonl", "--out rows/made.jsonl would replace the rows"),
    ("report --rows rows --readme R.md --out R.md", "--out and --readme are both R.md"),
    ("kernels --small -k house_mask --out R.md", "R.md, line 1: this is no JSON"),
    ("kernels --small -k house_mask --json rows/made.jsonl", "would replace a file of rows"),
    ("kernels --small -k house_mask --out new --json new", "--json new would replace a file of rows"),
    ("kernels --small -k house_mask --json no/x.json", "no is no folder"),
    ("kernels --small -k house_mask --seconds nan", "must be a number of seconds"),
])  # fmt: skip
def test_no_option_replaces_what_it_was_not_given_for(tmp_path, monkeypatch, capsys, command, word):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, attention())
    (tmp_path / "R.md").write_text("# A title\n<!-- bench:attention made-cpu -->\n<!-- /bench -->\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    try:
        status = main(["bench", *command.split()])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2 and re.search(word, said) and "Traceback" not in said
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_on_a_cpu_nothing_is_timed_under_the_name_of_what_is_not_built(monkeypatch, capsys):
    monkeypatch.setattr(native, "_load", lambda name="_C": (None, "csrc/ has changed since wireframe._C was built"))
    assert main(["bench", "pipeline", "--small", "-k", "raw"]) == 2
    assert "csrc/ has changed since wireframe._C was built" in capsys.readouterr().err
