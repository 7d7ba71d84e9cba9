"""How long it takes to learn navigation: seconds and frames to an evaluation return of 0.9.

    python -m benchmarks.returns --seeds 0                                       one seed of each
    python -m benchmarks.returns --seeds 0,1,2,3,4 --contenders mappo,BenchMARL  five of these

BenchMARL trains at its base configuration, mappo by the recipe navigation-quick, and TorchRL's loop at the same
hyperparameters, which tells tuning from engineering; `cold` and `warm` are mappo compiled, with the compiler's
cache empty and with what `cold` left there. Contenders take turns, iteration by iteration, so that they share
whatever else the machine does, until each has passed. All are evaluated after every iteration, off the clock, by
the same code on the same 128 episodes. The clock starts when an imported program makes its environments. Each may
use all CPU cores.
"""

import argparse
import os
import statistics
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.contenders import EVALUATION, contenders
from mappo.config import ExperimentConfig, override
from mappo.recipes import recipe

GOAL = 0.9
MAX_FRAMES = 300_000
_FAST = {"collection": {"simulation": "fast"}, "learner": {"update": "fast"}}
CONTENDERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # program, recipe, changes
    "BenchMARL": ("BenchMARL", "benchmarl-base", {"collection": {"total_frames": MAX_FRAMES}}),
    "TorchRL": ("TorchRL", "navigation-quick", {}),
    "mappo": ("mappo", "navigation-quick", {}),
    "cold": ("mappo", "navigation-quick", _FAST),
    "warm": ("mappo", "navigation-quick", _FAST),
}
_SAME = {"selection": {**EVALUATION, "interval_iterations": 1}, "threads": 0}
Passing = tuple[float, int]  # seconds and frames


def main() -> None:
    """Print a line for each seed as it ends, then medians and ratios."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.returns",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", default="0", metavar="N,N,...", help="training seeds (default: 0)")
    parser.add_argument(
        "--contenders", default=",".join(CONTENDERS), metavar="NAME,...", help=f"default: {','.join(CONTENDERS)}"
    )
    arguments = parser.parse_args()
    names = arguments.contenders.split(",")
    print(f"{'seed':<6}" + "".join(f"{name:>22}" for name in names), flush=True)
    passings: dict[str, list[Passing]] = {name: [] for name in names}
    with TemporaryDirectory() as cache:
        for seed in map(int, arguments.seeds.split(",")):
            passed = _race(names, seed, cache)
            print(f"{seed:<6}" + "".join(f"{_shown(passed.get(name)):>22}" for name in names), flush=True)
            for name, passing in passed.items():
                passings[name].append(passing)
    _summarise(passings, len(arguments.seeds.split(",")))


def _race(names: list[str], seed: int, cache: str) -> dict[str, Passing]:
    """Who passed the goal, and when; `warm` runs after the others, with what they left in the cache."""
    passed: dict[str, Passing] = {}
    for group in ([name for name in names if name != "warm"], [name for name in names if name == "warm"]):
        variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/{seed}"}
        with contenders({name: (CONTENDERS[name][0], _config(name, seed)) for name in group}, variables) as racing:
            while racing:
                for name, contender in list(racing.items()):
                    iteration = contender.iteration(is_evaluated=True)
                    assert iteration.evaluation_return is not None
                    if iteration.evaluation_return >= GOAL:
                        passed[name] = iteration.seconds, iteration.frames
                    if name in passed or iteration.frames >= _config(name, seed).collection.total_frames:
                        del racing[name]
    return passed


def _config(name: str, seed: int) -> ExperimentConfig:
    _, of, changes = CONTENDERS[name]
    return override(recipe(of), changes, _SAME, {"seed": seed})


def _shown(passing: Passing | None) -> str:
    return f"{passing[0]:.1f} s, {passing[1]:,}" if passing else "not passed"


def _summarise(passings: dict[str, list[Passing]], num_seeds: int) -> None:
    """Medians over the seeds that passed, and how many times less wall-clock than the first contender."""
    first = next(iter(passings))
    base = statistics.median(seconds for seconds, _ in passings[first])
    print(f"\n{'':<12} {'passed':>6} {'seconds':>8} {'frames':>8} {'x ' + first:>12}")
    for name, found in passings.items():
        if found:
            seconds, frames = (statistics.median(values) for values in zip(*found, strict=True))
            numbers = f"{seconds:>8.1f} {frames:>8,.0f} {base / seconds:>12.1f}"
            print(f"{name:<12} {len(found):>3}/{num_seeds:<2} {numbers}")
        else:
            print(f"{name:<12} {0:>3}/{num_seeds:<2}")


if __name__ == "__main__":
    main()
