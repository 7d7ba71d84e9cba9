"""Measure what the audits of a running fast simulation cost, as a share of training time.

    python -m benchmarks.audit                        three recipes
    python -m benchmarks.audit navigation balance     only these

Each recipe trains some iterations with the fast simulation and the fast update, which leaves the largest share
to audits. An audit repeats one frame in `INTERVAL_FRAMES` with plain VMAS. The share is the time of an audit,
times the audits of an iteration, divided by the time of an iteration without them.
"""

import argparse
import statistics
import time

import torch

from mappo.environment.random_streams import Stream, private_random_streams
from mappo.fast_simulation.audit import INTERVAL_FRAMES, Audit
from mappo.fast_simulation.fast_simulation import FastEnvironment
from mappo.learning.learner import Learner
from mappo.learning.networks import make_networks
from mappo.recipes import recipe
from mappo.training.local_collector import LocalCollector

_CPU = torch.device("cpu")
_RECIPES = "navigation", "balance", "benchmarl-fine-tuned"


def main() -> None:
    """Print one line for each recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipes", nargs="*", default=_RECIPES, metavar="RECIPE", help="default: three recipes")
    parser.add_argument("--iterations", type=int, default=5, metavar="N", help="iterations (default: 5)")
    arguments = parser.parse_args()
    print(f"{'recipe':<22} {'audit ms':>9} {'frames':>7} {'collect s':>10} {'learn s':>8} {'share %':>8}")
    for name in arguments.recipes:
        _measure(name, arguments.iterations)


def _measure(name: str, iterations: int) -> None:
    config = recipe(name)
    with private_random_streams(config.seed, Stream.TRAINING, _CPU):
        collector = LocalCollector(config, _CPU, "fast")
        networks = make_networks(config.networks, collector.environment)
        learner = Learner(config.learner, networks, config.collection.num_iterations, update="fast")
        collector.begin(networks.player)
        audits: list[float] = []
        check = Audit.check

        def timed(*arguments: object) -> None:
            start = time.perf_counter()
            check(*arguments)  # type: ignore[arg-type]
            audits.append(time.perf_counter() - start)

        Audit.check = timed  # type: ignore[method-assign, assignment]
        collects, learns = [], []
        for _ in range(iterations + 1):
            start, audited = time.perf_counter(), sum(audits)
            batch = collector.collect(networks.player)
            middle = time.perf_counter()
            learner.update(batch)
            collects.append(middle - start - (sum(audits) - audited))
            learns.append(time.perf_counter() - middle)
        Audit.check = check  # type: ignore[method-assign]
    assert isinstance(collector._simulation, FastEnvironment), collector.note
    frames = config.collection.rollout_frames
    collect, learn = statistics.median(collects[1:]), statistics.median(learns[1:])
    audit = statistics.median(audits[1:] or audits)
    share = 100 * audit * frames / INTERVAL_FRAMES / (collect + learn)
    print(f"{name:<22} {1000 * audit:>9.1f} {frames:>7} {collect:>10.2f} {learn:>8.2f} {share:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
