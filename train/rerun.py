"""``wireframe verify --rerun``: train twice in fresh processes, compare every stage, and give the bits a name.

The fingerprint says what the bits were after so many steps of each stage on this device; two owners of one kind of card
get the same one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import wireframe
from wireframe.errors import WireframeError, one_line
from wireframe.samples import write_parquet, write_sample
from wireframe.train.checkpoints import folder, read
from wireframe.train.config import TrainConfig, load_config
from wireframe.train.made_rows import made_rows
from wireframe.train.verify import Comparison, compare_stored, format_comparison

# Scenes of the rows that stand in where no data are given.
_MADE_SCENES = 24
# Hexadecimal digits of a hash in a table: 64 bits.
_SHORT = 16


class StageBits(NamedTuple):
    """A stage's name, and how its checkpoints of both runs compare."""

    name: str
    comparison: Comparison


class Rerun(NamedTuple):
    """What came of training twice.

    config: its name. overrides: as given. steps: of every stage. ranks: processes of a run. data: what it was trained
    on. environment: versions, device and threads of the runs. stages: in order.
    """

    config: str
    overrides: tuple[str, ...]
    steps: int
    ranks: int
    data: str
    environment: dict
    stages: tuple[StageBits, ...]

    @property
    def equal(self) -> bool:
        """Whether weights and optimiser were the same bits at the end of every stage."""
        return all(stage.comparison.equal for stage in self.stages)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def rerun(
    config_path: str | os.PathLike,
    overrides: Sequence[str],
    steps: int,
    *,
    data: Sequence[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    ranks: int = 1,
    say: Callable[[str], None] = _say,
) -> Rerun:
    """Trains ``steps`` steps of every stage, twice, each time in processes of its own, and compares the bits.

    Args:
        config_path, overrides: as for ``wireframe train``.
        data: sampled sets; None for rows made of hashes, which are the same on every machine.
        device: "auto", "cpu" or "cuda".
        threads: CPU threads of a process; None for torch's choice.
        ranks: processes of each run, by torchrun.
        say: gets a line when a run begins.

    Raises:
        ConfigError: the configuration cannot be. WireframeError: a run failed; its last line is given. Nothing is left
        in the temporary folder.
    """
    overrides = tuple(overrides)
    changes = [*overrides, f"save_every={steps}"]
    changes += [f"stages.{i}.steps={steps}" for i in range(len(load_config(config_path, overrides).stages))]
    with tempfile.TemporaryDirectory(prefix="wireframe-rerun-") as place:
        if data is None:
            # They are few: none is held out.
            changes.append("dev_val=0")
        config = load_config(config_path, changes)
        sources = list(data) if data is not None else _write_rows(config, Path(place))
        runs = [Path(place) / name for name in ("first", "second")]
        for number, out in enumerate(runs, 1):
            say(f"run {number} of 2: {steps} steps of each of {len(config.stages)} stages")
            command = train_command(config_path, changes, sources, out, device, threads, ranks)
            _run(command, number)
        stages, state = [], {}
        for index, stage in enumerate(config.stages):
            first, second = (read(folder(out, config.stage_start(index + 1))) for out in runs)
            stages.append(StageBits(stage.name, compare_stored(first, second)))
            state = first.state or {}
    name = Path(config_path).stem
    what = "made rows" if data is None else _name_data(state["data"])
    return Rerun(name, overrides, steps, ranks, what, state["environment"], tuple(stages))


def train_command(
    config_path: str | os.PathLike,
    changes: Sequence[str],
    data: Sequence[str],
    out: Path,
    device: str,
    threads: int | None,
    ranks: int,
) -> list[str]:
    """The arguments of a fresh process that trains without scoring."""
    command = [sys.executable, "-m"]
    if ranks > 1:
        command += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    command += ["wireframe", "train", "--quiet", "--no-eval", "--device", device]
    command += ["--config", os.fspath(config_path), "--out", os.fspath(out)]
    command += [argument for source in data for argument in ("--data", source)]
    command += [argument for change in changes for argument in ("--set", change)]
    return command + (["--threads", str(threads)] if threads else [])


def _run(command: list[str], number: int) -> None:
    root = str(Path(wireframe.__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, errors="replace"
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        # torchrun adds its own lines behind those of the ranks.
        ours = [line for line in said if line.startswith("wireframe train:")] or said
        raise WireframeError(f"run {number} ended with status {done.returncode}: {one_line(ours[-1], 600)}")


def _write_rows(config: TrainConfig, place: Path) -> list[str]:
    paths = []
    for points in sorted({stage.points for stage in config.stages}):
        path = place / f"made-{points}.parquet"
        write_parquet([write_sample(scene) for scene in made_rows(points, _MADE_SCENES)], path)
        paths.append(str(path))
    return paths


def _name_data(fingerprints: dict[str, str]) -> str:
    return "rows " + ", ".join(f"{points}: {digest[:_SHORT]}" for points, digest in sorted(fingerprints.items()))


def format_rerun(result: Rerun) -> str:
    """What ``wireframe verify --rerun`` prints: where the runs were equal and where not, and the fingerprint."""
    lines = []
    for stage in result.stages:
        if stage.comparison.equal:
            lines.append(f"stage {stage.name}: both runs equal bit for bit")
        else:
            lines += [f"stage {stage.name}:", format_comparison(stage.comparison)]
    if not result.equal:
        return "\n".join([*lines, "", "the two runs DIFFER: there is no fingerprint"])
    return "\n".join([*lines, "", format_fingerprint(result)])


def format_fingerprint(result: Rerun) -> str:
    """The hashes after each stage with what they depend on, and the same as a row of the README's table."""
    found = result.environment
    settings = " ".join([result.config, *result.overrides])
    lines = [
        f"device         {found['device']}",
        f"versions       torch {found['torch']}, triton {found['triton'] or 'none'}, wireframe {found['wireframe']}",
        f"processes      {result.ranks}, {found['threads']} threads each",
        f"configuration  {settings}",
        f"data           {result.data}",
        f"after {result.steps} steps of each stage:",
    ]
    short = []
    for stage in result.stages:
        hashes = stage.comparison.hashes_a
        lines += [f"  {stage.name}: {section:9} {hashes[section]}" for section in ("model", "optimizer")]
        short.append(f"{stage.name}: `{hashes['model'][:_SHORT]}` `{hashes['optimizer'][:_SHORT]}`")
    cells = [found["device"], found["torch"], found["triton"] or "none", found["threads"], settings, result.data]
    row = " | ".join(one_line(cell, 4000).replace("|", "/") for cell in [*cells, result.steps, "; ".join(short)])
    head = "| device | torch | triton | threads | configuration | data | steps a stage | weights and optimiser |"
    return "\n".join([*lines, "", head, "|---" * 8 + "|", f"| {row} |"])
