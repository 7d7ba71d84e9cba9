"""Measure how time and memory grow with environments, agents and frames, and whether memory stays constant.

    python -m benchmarks.growth                                 TorchRL's loop, mappo plain and fast
    python -m benchmarks.growth --ways plain --iterations 200   memory over 200 iterations

The task is navigation with one epoch and minibatches of a tenth of the batch. Each row is measured in a new
process.
"""

import argparse
import os
import statistics
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.contenders import FAST, PLAIN, contenders
from mappo.config import ExperimentConfig, override
from mappo.recipes import recipe

SIZES = [  # environments, agents, frames of each environment
    *((envs, 3, 100) for envs in (10, 60, 600, 4_096)),
    *((60, agents, 100) for agents in (1, 6, 12)),
    *((60, 3, frames) for frames in (25, 400)),
]
WAYS: dict[str, tuple[str, dict[str, Any]]] = {  # program, changes
    "TorchRL": ("TorchRL", {}),
    "plain": ("mappo", PLAIN),
    "fast": ("mappo", FAST),
}


def main() -> None:
    """Print a row for each size and way."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--iterations", type=int, default=4, metavar="N", help="iterations of each row, at least 3 (default: 4)"
    )
    parser.add_argument(
        "--ways", default=",".join(WAYS), metavar="NAME,...", help="ways to measure (default: all)"
    )
    arguments = parser.parse_args()
    print(
        f"{'way':<7} {'envs':>5} {'agents':>6} {'frames':>6} {'collect s':>9} {'learn s':>8} {'frames/s':>9} "
        f"{'MiB':>6} {'grown MiB':>9}"
    )
    with TemporaryDirectory() as cache:
        for envs, agents, frames in SIZES if arguments.iterations < 20 else SIZES[1:2]:
            for way in arguments.ways.split(","):
                _measure(way, _config(way, envs, agents, frames), max(3, arguments.iterations), cache)


def _config(way: str, num_envs: int, num_agents: int, rollout_frames: int) -> ExperimentConfig:
    return override(
        recipe("navigation"),
        {
            "environment": {"scenario_kwargs": {"n_agents": num_agents, "lidar_range": 0.35}},
            "learner": {"epochs": 1, "minibatch_frames": num_envs * rollout_frames // 10},
            "collection": {"num_envs": num_envs, "rollout_frames": rollout_frames, "total_frames": 10**9},
            "selection": {"interval_iterations": 0},
        },
        WAYS[way][1],
    )


def _measure(way: str, config: ExperimentConfig, iterations: int, cache: str) -> None:
    """Measure and print a row.

    The column `grown` is the growth of the memory's peak between a tenth of the iterations and the last one.
    """
    with contenders({way: (WAYS[way][0], config)}, {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}) as by_name:
        measured = [by_name[way].run_iteration() for _ in range(iterations)]
    collect, learn = (
        statistics.median(values)
        for values in zip(*((row.collect_seconds, row.learn_seconds) for row in measured[1:]), strict=True)
    )
    collection, peak = config.collection, measured[-1].peak_memory_bytes
    print(
        f"{way:<7} {collection.num_envs:>5} {config.environment.scenario_kwargs['n_agents']:>6} "
        f"{collection.rollout_frames:>6} {collect:>9.2f} {learn:>8.2f} "
        f"{collection.frames_per_batch / (collect + learn):>9,.0f} {peak / 2**20:>6.0f} "
        f"{(peak - measured[max(1, iterations // 10)].peak_memory_bytes) / 2**20:>9.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
