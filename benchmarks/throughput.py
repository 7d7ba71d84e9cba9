"""Frames a second at equal hyperparameters: BenchMARL, TorchRL's loop, and mappo plain,
fast and mixed.

    python -m benchmarks.throughput benchmarl-base                 3 iterations each, the first not counted
    python -m benchmarks.throughput benchmarl-fine-tuned --iterations 2
    python -m benchmarks.throughput navigation --learner.epochs 5  any recipe of navigation, changed by flags
    python -m benchmarks.throughput navigation --contenders "mappo plain,mappo 2 processes"

Contenders take turns, iteration by iteration; ratios are those of iterations of the same turn. At last, returns
are evaluated by the same code on the same 128 episodes, off the clock: at equal hyperparameters they agree but for
chance, and where they are further apart than `--tolerance`, speed is not compared (exit status 1). Each contender
may use all CPU cores; `--threads 1` gives each one. Where there is a GPU, all use it; its utilisation is shown.
"""

import argparse
import os
import statistics
import sys
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.contenders import EVALUATION, Contender, Iteration, contenders
from mappo.cli.arguments import add_config_arguments, changes_from_arguments, dashed
from mappo.config import ExperimentConfig, override
from mappo.recipes import RECIPES, recipe

_CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {  # program, changes
    "BenchMARL": ("BenchMARL", {}),
    "TorchRL": ("TorchRL", {}),
    "mappo plain": ("mappo", {}),
    "mappo fast": ("mappo", {"collection": {"simulation": "fast"}, "learner": {"update": "fast"}}),
    "mappo mixed": ("mappo", {"collection": {"simulation": "fast"}, "learner": {"update": "mixed"}}),
    "mappo 2 processes": ("mappo", {"collection": {"processes": 2}}),
}
_BESIDE_PEERS = ("BenchMARL", "TorchRL", "mappo plain", "mappo fast", "mappo mixed")


def main() -> None:
    """Print a table: medians over iterations, and ratios to the first contender."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser, with_recipe=False)
    parser.usage = "%(prog)s RECIPE [--iterations N] [--contenders NAME,...] [--SECTION.FIELD VALUE ...]"
    parser.add_argument("recipe", choices=RECIPES, metavar="RECIPE")
    parser.add_argument("--iterations", type=int, default=3, metavar="N", help="of each, at least 2 (default: 3)")
    parser.add_argument(
        "--contenders", default=",".join(_BESIDE_PEERS), metavar="NAME,...", help=f"of {', '.join(_CONTENDERS)}"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.2, metavar="RETURN", help="of last returns (default: 0.2)"
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
        contenders(configs, {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}) as all_,
    ):
        turns = [_turn(all_, number == last) for number in range(1, last + 1)]
    _require_agreement(turns[-1], arguments.tolerance)
    _show(arguments.recipe, base, turns)


def _turn(all_: dict[str, Contender], is_evaluated: bool) -> dict[str, Iteration]:
    return {name: contender.iteration(is_evaluated) for name, contender in all_.items()}


def _require_agreement(turn: dict[str, Iteration], tolerance: float) -> None:
    """Ways that learn differently are not compared."""
    returns = {name: each.evaluation_return or 0.0 for name, each in turn.items()}
    if not all(abs(one - other) <= tolerance for one in returns.values() for other in returns.values()):
        shown = ", ".join(f"{name} {value:.2f}" for name, value in returns.items())
        sys.exit(f"returns differ by more than {tolerance}, so speed is not compared: {shown}")


def _show(name: str, config: ExperimentConfig, turns: list[dict[str, Iteration]]) -> None:
    collection, learner = config.collection, config.learner
    print(
        f"{name}: {collection.num_envs} x {collection.rollout_frames} frames, {learner.epochs} epochs, "
        f"minibatches of {learner.minibatch_frames}; medians of {len(turns) - 1} iterations"
    )
    print(
        f"{'':<17} {'frames/s':>8} {'ratio':>6} {'least':>6} {'most':>6} {'collect s':>9} {'learn s':>8} "
        f"{'return':>7} {'GPU %':>6}"
    )
    first = next(iter(turns[0]))
    for each in turns[0]:
        ratios = [_seconds(turn[first]) / _seconds(turn[each]) for turn in turns[1:]]
        found = [turn[each] for turn in turns[1:]]
        rate = collection.frames_per_batch / statistics.median(_seconds(iteration) for iteration in found)
        print(
            f"{each:<17} {rate:>8,.0f} {statistics.median(ratios):>6.2f} {min(ratios):>6.2f} {max(ratios):>6.2f} "
            f"{statistics.median(iteration.collect_seconds for iteration in found):>9.2f} "
            f"{statistics.median(iteration.learn_seconds for iteration in found):>8.2f} "
            f"{found[-1].evaluation_return:>7.2f} {_utilisation(found):>6}"
        )


def _utilisation(iterations: list[Iteration]) -> str:
    values = [each.gpu_utilisation for each in iterations if each.gpu_utilisation is not None]
    return f"{statistics.median(values):.0f}" if values else "-"


def _seconds(iteration: Iteration) -> float:
    return iteration.collect_seconds + iteration.learn_seconds


if __name__ == "__main__":
    main()
