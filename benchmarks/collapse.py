"""Check whether a recipe keeps what it has learned: report the least return after it passed a goal.

    python -m benchmarks.collapse navigation-quick --seeds 0,1,2,3,4
    python -m benchmarks.collapse navigation --goal 0.85 --collection.total-frames 500000

The program trains for a million frames by default, and evaluates every three iterations on the 128 episodes of
`python -m benchmarks.returns`. The exit status is 1 if a seed never passes the goal.
"""

import argparse
import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.contenders import EVALUATION
from mappo.cli.arguments import add_config_arguments, changes_from_arguments, dashed
from mappo.config import ExperimentConfig, override
from mappo.recipes import RECIPES, recipe
from mappo.runs.run import Run
from mappo.training.history import HistoryFile, IterationReport
from mappo.training.training import train


def main() -> None:
    """Print a line for each seed when its training ends."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.collapse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser, with_recipe=False)
    parser.usage = "%(prog)s RECIPE [--seeds N,N,...] [--goal RETURN] [--SECTION.FIELD VALUE ...]"
    parser.add_argument("recipe", choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--seeds", default="0", metavar="N,N,...", help="training seeds (default: 0)")
    parser.add_argument("--goal", type=float, default=0.9, metavar="RETURN", help="return to pass (default: 0.9)")
    arguments = parser.parse_args(dashed(sys.argv[1:]))
    million = {"collection": {"total_frames": 1_000_000}}
    base = override(
        recipe(arguments.recipe),
        million,
        *changes_from_arguments(arguments),
        {"selection": {**EVALUATION, "interval_iterations": 3}},
    )
    torch.set_num_threads(base.threads or 1)
    print(f"{'seed':<6} {'frames':>10} {'passed at':>10} {'least after':>12} {'at':>10} {'last':>6}", flush=True)
    has_failed = False
    for seed in map(int, arguments.seeds.split(",")):
        returns = _returns(override(base, {"seed": seed}))
        passed = [(value, frames) for frames, value in returns]
        while passed and passed[0][0] < arguments.goal:
            passed.pop(0)
        has_failed |= not passed
        cells = (
            f"{passed[0][1]:>10,} {min(passed)[0]:>12.3f} {min(passed)[1]:>10,}" if passed else f"{'never':>10}"
        )
        print(f"{seed:<6} {returns[-1][0]:>10,} {cells:<34} {returns[-1][1]:>6.3f}", flush=True)
    sys.exit(has_failed)


def _returns(config: ExperimentConfig) -> list[tuple[int, float]]:
    """Train and return the frames so far and the mean return of each evaluation."""
    returns: list[tuple[int, float]] = []

    def on_report(report: IterationReport) -> None:
        if not math.isnan(report.evaluation_return_mean):
            returns.append((report.progress.frames, report.evaluation_return_mean))

    with TemporaryDirectory() as directory:
        train(config, Run.at(Path(directory) / "run"), HistoryFile(Path(directory) / "history.csv"), on_report)
    return returns


if __name__ == "__main__":
    main()
