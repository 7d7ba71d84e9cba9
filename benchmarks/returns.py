"""Measure how long it takes to learn navigation: seconds and frames to an evaluation return of 0.9.

    python -m benchmarks.returns --seeds 0                                       one seed of each contender
    python -m benchmarks.returns --seeds 0,1,2,3,4 --contenders mappo,BenchMARL  five seeds of these contenders

BenchMARL trains with its base configuration, and mappo with the recipe navigation-quick. TorchRL's loop
trains with the hyperparameters of that recipe, which separates the effect of tuning from the effect of
engineering. `cold` and `warm` are the compiled mappo, with an empty compiler cache and with the cache that
`cold` has filled. Contenders take turns, iteration by iteration, so that other load on the machine affects
them equally, until each contender has passed. The same code evaluates all contenders after every iteration,
on the same 128 episodes, while the clock is stopped. The clock starts when an imported program makes its
environments. Each contender may use all CPU cores.
"""

import argparse
import os
import statistics
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.contenders import EVALUATION, FAST, contenders
from mappo.config import ExperimentConfig, override
from mappo.recipes import recipe

GOAL = 0.9
MAX_FRAMES = 300_000
CONTENDERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # program, recipe, changes
    "BenchMARL": ("BenchMARL", "benchmarl-base", {"collection": {"total_frames": MAX_FRAMES}}),
    "TorchRL": ("TorchRL", "navigation-quick", {}),
    "mappo": ("mappo", "navigation-quick", {}),
    "cold": ("mappo", "navigation-quick", FAST),
    "warm": ("mappo", "navigation-quick", FAST),
}
_SAME = {"selection": {**EVALUATION, "interval_iterations": 1}, "threads": 0}
Passing = tuple[float, int]  # seconds and frames


def main() -> None:
    """Print a line for each seed when it ends, then medians and ratios."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.returns",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", default="0", metavar="N,N,...", help="training seeds (default: 0)")
    parser.add_argument(
        "--contenders",
        default=",".join(CONTENDERS),
        metavar="NAME,...",
        help=f"contenders to train (default: {','.join(CONTENDERS)})",
    )
    arguments = parser.parse_args()
    names = arguments.contenders.split(",")
    print(f"{'seed':<6}" + "".join(f"{name:>22}" for name in names), flush=True)
    passings: dict[str, list[Passing]] = {name: [] for name in names}
    with TemporaryDirectory() as cache:
        for seed in map(int, arguments.seeds.split(",")):
            passed = _race(names, seed, cache)
            print(f"{seed:<6}" + "".join(f"{_format_passing(passed.get(name)):>22}" for name in names), flush=True)
            for name, passing in passed.items():
                passings[name].append(passing)
    _summarise(passings, len(arguments.seeds.split(",")))


def _race(names: list[str], seed: int, cache: str) -> dict[str, Passing]:
    """Train the contenders and return when each passed the goal.

    `warm` runs after the others, with the compiler cache that they filled.
    """
    passed: dict[str, Passing] = {}
    for group in ([name for name in names if name != "warm"], [name for name in names if name == "warm"]):
        variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/{seed}"}
        with contenders({name: (CONTENDERS[name][0], _config(name, seed)) for name in group}, variables) as racing:
            while racing:
                for name, contender in list(racing.items()):
                    iteration = contender.run_iteration(is_evaluated=True)
                    assert iteration.evaluation_return is not None
                    if iteration.evaluation_return >= GOAL:
                        passed[name] = iteration.seconds, iteration.frames
                    if name in passed or iteration.frames >= _config(name, seed).collection.total_frames:
                        del racing[name]
    return passed


def _config(name: str, seed: int) -> ExperimentConfig:
    _, recipe_name, changes = CONTENDERS[name]
    return override(recipe(recipe_name), changes, _SAME, {"seed": seed})


def _format_passing(passing: Passing | None) -> str:
    return f"{passing[0]:.1f} s, {passing[1]:,}" if passing else "not passed"


def _summarise(passings: dict[str, list[Passing]], num_seeds: int) -> None:
    """Print medians over the seeds that passed, and how many times less wall-clock than the first contender."""
    first = next(iter(passings))
    base = statistics.median(seconds for seconds, _ in passings[first])
    print(f"\n{'':<12} {'passed':>6} {'seconds':>8} {'frames':>8} {'x ' + first:>12}")
    for name, passed in passings.items():
        if passed:
            seconds, frames = (statistics.median(values) for values in zip(*passed, strict=True))
            numbers = f"{seconds:>8.1f} {frames:>8,.0f} {base / seconds:>12.1f}"
            print(f"{name:<12} {len(passed):>3}/{num_seeds:<2} {numbers}")
        else:
            print(f"{name:<12} {0:>3}/{num_seeds:<2}")


if __name__ == "__main__":
    main()
