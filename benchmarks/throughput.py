"""Measure frames per second at equal hyperparameters: BenchMARL, TorchRL's loop, and mappo in several ways.

    python -m benchmarks.throughput benchmarl-base                 3 iterations each, the first not counted
    python -m benchmarks.throughput benchmarl-fine-tuned --iterations 2
    python -m benchmarks.throughput navigation --learner.epochs 5  any recipe of navigation; flags change it
    python -m benchmarks.throughput navigation --contenders "mappo plain,mappo 2 processes"
    python -m benchmarks.throughput navigation --contenders "mappo plain,plain memory"     what a memory costs

Contenders take turns, iteration by iteration; a ratio compares iterations of the same turn. At the end, the
same code evaluates all contenders on the same 128 episodes, while the clock is stopped. At equal
hyperparameters, returns differ only by chance. If returns differ by more than `--tolerance`, speed is not
compared (exit status 1). Each contender may use all CPU cores; `--threads 1` limits each to one. If there is
a GPU, all contenders use it, and the table shows its utilisation.
"""

import argparse
import os
import statistics
import sys
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.contenders import EVALUATION, FAST, MIXED, PLAIN, Contender, Iteration, contenders
from mappo.cli.arguments import add_config_arguments, changes_from_arguments, dashed
from mappo.config import ExperimentConfig, merged, override
from mappo.recipes import RECIPES, recipe

_MEMORY = {"networks": {"memory": "gru"}}
_CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {  # program, changes
    "BenchMARL": ("BenchMARL", {}),
    "TorchRL": ("TorchRL", {}),
    "mappo": ("mappo", {}),  # as `auto` chooses for a long training
    "mappo plain": ("mappo", PLAIN),
    "mappo fast": ("mappo", FAST),
    "mappo mixed": ("mappo", MIXED),
    "mappo 2 processes": ("mappo", merged(PLAIN, {"collection": {"processes": 2}})),
    "plain memory": ("mappo", merged(PLAIN, _MEMORY)),
    "fast memory": ("mappo", merged(FAST, _MEMORY)),
}
_DEFAULT_CONTENDERS = ("BenchMARL", "TorchRL", "mappo", "mappo plain", "mappo fast", "mappo mixed")


def main() -> None:
    """Print a table of medians over iterations and ratios to the first contender."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser, with_recipe=False)
    parser.usage = "%(prog)s RECIPE [--iterations N] [--contenders NAME,...] [--SECTION.FIELD VALUE ...]"
    parser.add_argument("recipe", choices=RECIPES, metavar="RECIPE")
    parser.add_argument(
        "--iterations",
        type=int,
        default=3,
        metavar="N",
        help="iterations of each contender, at least 2 (default: 3)",
    )
    parser.add_argument(
        "--contenders",
        default=",".join(_DEFAULT_CONTENDERS),
        metavar="NAME,...",
        help=f"some of {', '.join(_CONTENDERS)} (default: {', '.join(_DEFAULT_CONTENDERS)})",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.2,
        metavar="RETURN",
        help="largest difference of the last returns (default: 0.2)",
    )
    arguments = parser.parse_args(dashed(sys.argv[1:]))
    last = max(2, arguments.iterations)
    base = override(
        recipe(arguments.recipe),
        {"threads": 0},
        *changes_from_arguments(arguments),
        {
            "collection": {"total_frames": 10**9},
            "selection": {**EVALUATION, "interval_iterations": last},
            "learner": {"learning_rate_schedule": "constant"},
        },
    )
    names = arguments.contenders.split(",")
    configs = {name: (_CONTENDERS[name][0], override(base, _CONTENDERS[name][1])) for name in names}
    with (
        TemporaryDirectory() as cache,
        contenders(configs, {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}) as by_name,
    ):
        turns = [_turn(by_name, number == last) for number in range(1, last + 1)]
    _require_agreement(turns[-1], arguments.tolerance)
    _print_table(arguments.recipe, base, turns)


def _turn(by_name: dict[str, Contender], is_evaluated: bool) -> dict[str, Iteration]:
    return {name: contender.run_iteration(is_evaluated) for name, contender in by_name.items()}


def _require_agreement(turn: dict[str, Iteration], tolerance: float) -> None:
    """Exit with a message if the returns of contenders differ by more than the tolerance."""
    returns = {name: iteration.evaluation_return or 0.0 for name, iteration in turn.items()}
    if not all(abs(one - other) <= tolerance for one in returns.values() for other in returns.values()):
        listing = ", ".join(f"{name} {value:.2f}" for name, value in returns.items())
        sys.exit(f"returns differ by more than {tolerance}, so speed is not compared: {listing}")


def _print_table(recipe_name: str, config: ExperimentConfig, turns: list[dict[str, Iteration]]) -> None:
    collection, learner = config.collection, config.learner
    print(
        f"{recipe_name}: {collection.num_envs} x {collection.rollout_frames} frames, {learner.epochs} epochs, "
        f"minibatches of {learner.minibatch_frames}; medians of {len(turns) - 1} iterations"
    )
    print(
        f"{'':<17} {'frames/s':>8} {'ratio':>6} {'least':>6} {'most':>6} {'collect s':>9} {'learn s':>8} "
        f"{'return':>7} {'GPU %':>6}"
    )
    first = next(iter(turns[0]))
    for name in turns[0]:
        ratios = [_seconds(turn[first]) / _seconds(turn[name]) for turn in turns[1:]]
        iterations = [turn[name] for turn in turns[1:]]
        rate = collection.frames_per_batch / statistics.median(_seconds(iteration) for iteration in iterations)
        print(
            f"{name:<17} {rate:>8,.0f} {statistics.median(ratios):>6.2f} {min(ratios):>6.2f} {max(ratios):>6.2f} "
            f"{statistics.median(iteration.collect_seconds for iteration in iterations):>9.2f} "
            f"{statistics.median(iteration.learn_seconds for iteration in iterations):>8.2f} "
            f"{iterations[-1].evaluation_return:>7.2f} {_utilisation(iterations):>6}"
        )


def _utilisation(iterations: list[Iteration]) -> str:
    values = [iteration.gpu_utilisation for iteration in iterations if iteration.gpu_utilisation is not None]
    return f"{statistics.median(values):.0f}" if values else "-"


def _seconds(iteration: Iteration) -> float:
    return iteration.collect_seconds + iteration.learn_seconds


if __name__ == "__main__":
    main()
