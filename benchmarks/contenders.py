"""Trainers beside each other: each in a process of its own, which waits while another has its turn."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, override, to_json
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.evaluation.episodes import play_episodes
from mappo.learning.networks import make_networks

BENCHMARL_PYTHON = Path(".venv-benchmarl/bin/python")
PROGRAMS = {
    "mappo": (Path(sys.executable), "benchmarks.mappo_loop"),
    "TorchRL": (Path(sys.executable), "benchmarks.torchrl_loop"),
    "BenchMARL": (BENCHMARL_PYTHON, "benchmarks.benchmarl_loop"),
}


EVALUATION = {"seeds": [1, 2], "episodes_per_seed": 64}  # on which contenders are compared, in every benchmark


@dataclass(frozen=True)
class Iteration:
    """What one iteration took; frames and seconds are counted from the start of training.

    seconds: without evaluation, and without waiting. gpu_utilisation: percent of the time in which it ran
    anything; None without a GPU. evaluation_return: mean over the selection's episodes.
    """

    frames: int
    seconds: float
    collect_seconds: float
    learn_seconds: float
    peak_memory_bytes: int
    gpu_utilisation: float | None
    evaluation_return: float | None


class Contender:
    """A training in another process: `iteration` lets it do one more."""

    def __init__(self, program: str, config: ExperimentConfig, directory: Path, environment: Mapping[str, str]):
        """`environment`: the process's variables. Training has not begun yet.

        Raises:
            FileNotFoundError: the program is not installed; the message says how.
        """
        self._python, self._module = PROGRAMS[program]
        if not self._python.exists():
            raise FileNotFoundError(f"{self._python} is not there: make bench installs it")
        self._config = override(config, {"device": resolve_device(config.device).type})
        self._directory, self._environment = directory, environment
        self._process: subprocess.Popen[str] | None = None

    def iteration(self, is_evaluated: bool = False) -> Iteration:
        """Wait for the end of the next iteration."""
        if self._process is None:
            self._process = self._start()
        else:
            self._say("on")
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                iteration = Iteration(**json.loads(line))
                if is_evaluated and iteration.evaluation_return is None:
                    weights = torch.load(self._directory / "policy.pt")
                    value = evaluation_return(self._config, weights)
                    iteration = Iteration(**{**vars(iteration), "evaluation_return": value})
                return iteration
        raise RuntimeError(f"{self._module} ended: {(self._directory / 'errors.txt').read_text()[-2000:]}")

    def stop(self) -> None:
        """End the training where it is."""
        if self._process:
            self._process.kill()
            self._process.communicate()

    def _start(self) -> "subprocess.Popen[str]":
        self._directory.mkdir(parents=True)
        with (self._directory / "errors.txt").open("w") as errors:
            return subprocess.Popen(
                [str(self._python), "-m", self._module, to_json(self._config), str(self._directory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=dict(self._environment),
            )

    def _say(self, word: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()


@contextmanager
def contenders(
    configs: Mapping[str, tuple[str, ExperimentConfig]], environment: Mapping[str, str]
) -> Iterator[dict[str, Contender]]:
    """Those of these names, each a program and its configuration; all are ended afterwards."""
    with TemporaryDirectory() as directory, ExitStack() as stack:
        started = {}
        for name, (program, config) in configs.items():
            folder = Path(directory) / name.replace(" ", "-").replace(",", "")
            started[name] = Contender(program, config, folder, environment)
            stack.callback(started[name].stop)
        yield started


def evaluation_return(config: ExperimentConfig, weights: Mapping[str, Tensor]) -> float:
    """The mean return of a policy over the episodes by which `mappo train` selects its best.

    `weights` are those of linear layers, whose names end in `<number>.weight` and `<number>.bias`.
    """

    def place(name: str) -> tuple[Any, ...]:
        number, kind = name.split(".")[-2:]
        return int(number), kind == "bias"

    device = resolve_device(config.device)
    with private_random_streams(0, Stream.SELECTION, device):
        environment = make_environment(config.environment, 1, 0, Stream.SELECTION, device)
        policy = make_networks(config.networks, environment).policy
    with torch.no_grad():
        for parameter, name in zip(policy.parameters(), sorted(weights, key=place), strict=True):
            parameter.copy_(weights[name])
    returns, _ = play_episodes(lambda _: policy, config, config.selection, Stream.SELECTION)
    return sum(returns) / len(returns)
