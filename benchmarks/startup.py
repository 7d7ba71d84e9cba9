"""Measure how long the program takes to start: its commands, and a training stage up to the first frame.

    python -m benchmarks.startup                              medians of 5 turns
    python -m benchmarks.startup --turns 11

Each line is measured in new processes, which take turns, so that other load on the machine affects them
equally. `first frame` ends with the first environment step of navigation under the policy. `import peers`
imports the libraries that training needs, without mappo.
"""

import argparse
import statistics
import subprocess
import sys
import time

_FIRST_FRAME = """
import mappo.stages.runtime
from mappo.config import override
from mappo.recipes import recipe
from mappo.training.training_state import begin_training, initial_progress
import torch
config = override(recipe("navigation"), {"collection": {"rollout_frames": 1}, "learner": {"minibatch_frames": 1}})
training = begin_training(config, initial_progress(config, None), None, torch.device("cpu"))
training.collector.collect(training.networks.player)
"""
_PEERS = "import torchrl.envs.libs.vmas, torchrl.modules, torchrl.objectives, vmas"
COMMANDS = {
    "python": ["-c", "pass"],
    "mappo --help": ["-m", "mappo", "--help"],
    "mappo train --help": ["-m", "mappo", "train", "--help"],
    "pipelines --help": ["-m", "pipelines", "--help"],
    "import torch": ["-c", "import torch"],
    "import peers": ["-c", _PEERS],
    "import mappo.stages.runtime": ["-c", "import mappo.stages.runtime"],
    "first frame": ["-c", _FIRST_FRAME],
}


def main() -> None:
    """Measure all commands and print a table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--turns", type=int, default=5, metavar="N", help="number of starts of each command (default: 5)"
    )
    arguments = parser.parse_args()
    seconds_by_name: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.turns):
        for name, command in COMMANDS.items():
            seconds_by_name[name].append(_seconds(command))
    peers = statistics.median(seconds_by_name["import peers"])
    print(f"{'process':<20}  {'seconds':>7}  {'least':>5}  {'most':>5}  {'to peers':>8}")
    for name, seconds in seconds_by_name.items():
        middle = statistics.median(seconds)
        print(f"{name:<20}  {middle:>7.2f}  {min(seconds):>5.2f}  {max(seconds):>5.2f}  {middle / peers:>8.2f}")


def _seconds(command: list[str]) -> float:
    start = time.monotonic()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return time.monotonic() - start


if __name__ == "__main__":
    main()
