"""What was never published, and what is ours to choose, on held-out scenes: ``python -m wireframe.bench.choices WHAT``.

``loss``: cost weights and the target of the confidence. ``precision``: float32 against bfloat16 products; a CPU without
instructions for them rounds to bfloat16 around float32 products, which gives what they give but for the order of sums.

Trains a configuration with each choice and each seed, several runs at once, scores the model of every stage on held-out
rows, and prints two tables: HSS by choice, and HSS by stage for the first one. A run or a score that is there already
is not made again: training and scoring can be done on two machines; without hoho2025 it trains alone.

    python -m wireframe.bench.choices loss --data rows/512 --data rows/1024 --out out/choices --jobs 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from wireframe.arguments import positive
from wireframe.bench.timing import describe_machine, heading
from wireframe.errors import MissingPackageError, WireframeError
from wireframe.scoring import require_hoho
from wireframe.train.config import TrainConfig, load_config
from wireframe.train.data import load_training_sets


def _loss(weights: tuple[float, float, float], targets: tuple[str, str, str]) -> list[str]:
    """Weights of midpoint, direction and length in the cost; the confidence target by stage."""
    named = [f"loss.{name}={value}" for name, value in zip(("w_mid", "w_dir", "w_len"), weights)]
    return [*named, *(f"stages.{i}.conf_target={target}" for i, target in enumerate(targets))]


# What is compared, by name: what ``--set`` gets for it. The first is the one we keep.
CHOICES = {
    "loss": {
        "3, 0.3, 1.5; mass, in the last stage rank": _loss((3.0, 0.3, 1.5), ("mass", "mass", "rank")),
        "3, 0.3, 1.5; mass": _loss((3.0, 0.3, 1.5), ("mass", "mass", "mass")),
        "1, 1, 1; mass": _loss((1.0, 1.0, 1.0), ("mass", "mass", "mass")),
        "6, 0.6, 3; mass": _loss((6.0, 0.6, 3.0), ("mass", "mass", "mass")),
    },
    "precision": {"bfloat16": ["precision=bfloat16"], "float32": ["precision=float32"]},
}
_HEADINGS = {"loss": "cost weights (mid, dir, len); confidence target", "precision": "precision of products"}
SEEDS = (353, 354, 355)


def run_folder(out: Path, what: str, choice: str, seed: int) -> Path:
    return out / f"{what}-{list(CHOICES[what]).index(choice)}-seed-{seed}"


def stage_folder(run: Path, config: TrainConfig, index: int) -> Path:
    """The model at the end of a stage."""
    return run / "stages" / f"{index + 1}-{config.stages[index].name}"


def train_all(arguments: argparse.Namespace, config: TrainConfig) -> None:
    """Trains what is not trained to its end yet, ``--jobs`` runs at once; the threads only wait for processes."""

    def one(run: tuple[str, int]) -> None:
        choice, seed = run
        out = run_folder(arguments.out, arguments.what, choice, seed)
        if stage_folder(out, config, len(config.stages) - 1).exists():
            return
        command = [sys.executable, "-m", "wireframe", "train", "--config", arguments.config, "--no-eval", "--quiet"]
        for source in arguments.data:
            command += ["--data", source]
        for setting in (*arguments.set, *CHOICES[arguments.what][choice], f"seed={seed}"):
            command += ["--set", setting]
        if arguments.init:
            command += ["--init", arguments.init]
        threads = ["--threads", str(arguments.threads), "--device", arguments.device]
        subprocess.run([*command, *threads, "--out", str(out)], check=True, stdout=subprocess.DEVNULL)

    runs = [(choice, seed) for seed in arguments.seeds for choice in CHOICES[arguments.what]]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for _ in pool.map(one, runs):
            pass


def score(out: Path, config: TrainConfig, source: str, index: int, scenes: int) -> float:
    """HSS of the model of stage ``index`` on held-out rows, at the threshold of the configuration that scores best."""
    from wireframe.evaluate import evaluate
    from wireframe.perceiver import Perceiver
    from wireframe.scoring_pool import usable_cores

    path = out / f"scores-{index + 1}.json"
    if not path.exists():
        evaluate(
            source,
            Perceiver.from_checkpoint(stage_folder(out, config, index)),
            config.graph,
            split="dev-val",
            dev_val=config.dev_val,
            limit=scenes,
            workers=usable_cores(),
            out=path,
            thresholds=config.evaluation.thresholds,
            threshold_scenes=scenes,
        )
    return max(row["hss"] for row in json.loads(path.read_text())["at_thresholds"])


def held_out_loss(out: Path, config: TrainConfig, source: str, index: int, scenes: int) -> float:
    """Mean matching loss of the model of stage ``index`` on held-out rows, in float32: what HSS cannot tell yet."""
    import torch

    from wireframe.perceiver import Perceiver
    from wireframe.predict import model_inputs
    from wireframe.samples import iter_sample_rows, read_sample
    from wireframe.splits import dev_val_ids
    from wireframe.train.loss import scene_losses

    wanted = set(dev_val_ids(source, config.dev_val)[:scenes])
    model = Perceiver.from_checkpoint(stage_folder(out, config, index))
    losses = []
    for row in iter_sample_rows(source, split="train"):
        if row["order_id"] in wanted:
            scene = read_sample(row)
            target = torch.from_numpy(scene.gt_segments)[None]
            with torch.inference_mode():
                found = model(model_inputs([scene]))
                losses.append(scene_losses(found, target, torch.ones(1, len(target[0])) > 0, config.loss, 0.0).match)
    return torch.cat(losses).mean().item()


def choice_table(heading: str, scores: dict[str, list[float]], losses: dict[str, list[float]]) -> str:
    """Markdown: HSS and matching loss of the last stage by choice; each: choice -> that of each seed."""
    lines = [f"| {heading} | HSS, mean of seeds | each seed | held-out matching loss | each |", "|---|---|---|---|---|"]
    for choice, values in scores.items():
        cells = [f"{statistics.mean(found):.3f} | {_each(found)}" for found in (values, losses[choice])]
        lines.append(f"| {choice} | {' | '.join(cells)} |")
    return "\n".join(lines)


def stage_table(scores: list[list[float]], config: TrainConfig) -> str:
    """Markdown: HSS after every stage; ``scores``: of each seed, by stage."""
    lines = ["| stage | points | steps | batch | HSS, mean of seeds | each seed |", "|---|---|---|---|---|---|"]
    for index, (stage, values) in enumerate(zip(config.stages, scores)):
        about = f"{index + 1} {stage.name} | {stage.points} | {stage.steps} | {stage.batch_size}"
        lines.append(f"| {about} | {statistics.mean(values):.3f} | {_each(values)} |")
    return "\n".join(lines)


def _each(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


def _trained_on(out: Path) -> str:
    """Devices and versions of torch that the runs name."""
    states = [json.loads(path.read_text())["environment"] for path in out.glob("*/checkpoints/*/state.json")]
    return ", ".join(sorted({f"{state['device']} (torch {state['torch']})" for state in states}))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m wireframe.bench.choices", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=tuple(CHOICES), help="what is compared")
    parser.add_argument("--config", default="small", help="configuration of the runs (default: small)")
    parser.add_argument("--data", action="append", required=True, help="sampled rows, for each number of points")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--init", help="checkpoint that every run starts from (default: fresh weights)")
    parser.add_argument("--jobs", type=positive, default=1, help="runs at once (default 1)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of a run (default 1)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--scenes", type=positive, default=100, help="held-out scenes to score (default 100)")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--set", action="append", default=[], metavar="a.b=value", help="a setting of every run")
    arguments = parser.parse_args(argv)
    # So that runs find the package whether it is installed or not.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    try:
        return compare_choices(arguments)
    except WireframeError as problem:
        parser.exit(2, f"{parser.prog}: {problem}\n")
    except subprocess.CalledProcessError as problem:
        # It has said why.
        parser.exit(problem.returncode, f"{parser.prog}: a run ended with status {problem.returncode}\n")


def compare_choices(arguments: argparse.Namespace) -> int:
    """Trains, scores and prints the tables."""
    config = load_config(arguments.config, arguments.set)
    load_training_sets(arguments.data, config)
    train_all(arguments, config)
    try:
        require_hoho()
    except MissingPackageError as problem:
        print(f"trained, not scored: {problem}")
        return 0
    sources = {found.points: found.source for found in load_training_sets(arguments.data, config).values()}

    def of_seeds(choice: str, index: int, measure: Callable[..., float] = score) -> list[float]:
        source = sources[config.stages[index].points]
        folders = (run_folder(arguments.out, arguments.what, choice, seed) for seed in arguments.seeds)
        return [measure(folder, config, source, index, arguments.scenes) for folder in folders]

    last = len(config.stages) - 1
    choices = CHOICES[arguments.what]
    scores, losses = ({c: of_seeds(c, last, measure) for c in choices} for measure in (score, held_out_loss))
    print(choice_table(_HEADINGS[arguments.what], scores, losses))
    ours = next(iter(choices))
    print(f"\n{ours}:\n\n{stage_table([of_seeds(ours, index) for index in range(last + 1)], config)}")
    print(f"\n{arguments.scenes} held-out scenes, each model at its best threshold of {config.evaluation.thresholds}")
    print(f"trained on {_trained_on(arguments.out)}; scored on {heading(describe_machine())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
