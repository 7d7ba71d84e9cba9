"""The contenders: training programs in separate processes, which take turns."""

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
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, override, to_json
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.evaluation.episodes import play_episodes
from mappo.learning.networks import make_networks

PLAIN = {"collection": {"simulation": "plain"}, "learner": {"update": "plain"}}
FAST = {"collection": {"simulation": "fast"}, "learner": {"update": "fast"}}
MIXED = {"collection": {"simulation": "fast"}, "learner": {"update": "mixed"}}
BENCHMARL_PYTHON = Path(".venv-benchmarl/bin/python")
PROGRAMS = {
    "mappo": (Path(sys.executable), "benchmarks.mappo_loop"),
    "TorchRL": (Path(sys.executable), "benchmarks.torchrl_loop"),
    "BenchMARL": (BENCHMARL_PYTHON, "benchmarks.benchmarl_loop"),
}


# The episodes on which every benchmark compares contenders.
EVALUATION = {"seeds": [1, 2], "episodes_per_seed": 64}


@dataclass(frozen=True)
class Iteration:
    """The measurements of one iteration; frames and seconds are counted from the start of training.

    seconds: training time, without evaluation and waiting.
    gpu_utilisation: percentage of time in which the GPU was busy; None without a GPU.
    evaluation_return: mean over the selection's episodes; None without an evaluation.
    """

    frames: int
    seconds: float
    collect_seconds: float
    learn_seconds: float
    peak_memory_bytes: int
    gpu_utilisation: float | None
    evaluation_return: float | None


class Contender:
    """A training in another process, which runs one iteration for each call of `run_iteration`."""

    def __init__(self, program: str, config: ExperimentConfig, directory: Path, environment: Mapping[str, str]):
        """Set the program; the first call of `run_iteration` starts the process.

        environment: the environment variables of the process.

        Raises:
            FileNotFoundError: the program is not installed; the message names the command that installs it.
        """
        if config.networks.has_memory and program != "mappo":
            raise ValueError(f"{program} has no memory here: leave it out of the contenders")
        self._python, self._module = PROGRAMS[program]
        if not self._python.exists():
            raise FileNotFoundError(f"{self._python} does not exist; install it with: make bench")
        self._config = override(config, {"device": resolve_device(config.device).type})
        self._directory, self._environment = directory, environment
        self._process: subprocess.Popen[str] | None = None

    def run_iteration(self, is_evaluated: bool = False) -> Iteration:
        """Run the next iteration and return its measurements.

        is_evaluated: evaluate the policy, if the program has not evaluated it.
        """
        if self._process is None:
            self._process = self._start()
        else:
            self._send_line("continue")
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
        """Kill the process."""
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

    def _send_line(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


@contextmanager
def contenders(
    configs: Mapping[str, tuple[str, ExperimentConfig]], environment: Mapping[str, str]
) -> Iterator[dict[str, Contender]]:
    """Yield contenders by name and stop them after the block.

    configs: program and configuration by name.
    """
    with TemporaryDirectory() as directory, ExitStack() as stack:
        by_name = {}
        for name, (program, config) in configs.items():
            folder = Path(directory) / name.replace(" ", "-").replace(",", "")
            by_name[name] = Contender(program, config, folder, environment)
            stack.callback(by_name[name].stop)
        yield by_name


def evaluation_return(config: ExperimentConfig, weights: Mapping[str, Tensor]) -> float:
    """Return the mean return of a policy over the episodes by which `mappo train` selects the best checkpoint.

    weights: as in `policy_with`.
    """
    policy = policy_with(config, weights)
    returns, _ = play_episodes(lambda _: policy, config, config.selection, Stream.SELECTION)
    return sum(returns) / len(returns)


def policy_with(config: ExperimentConfig, weights: Mapping[str, Tensor]) -> TensorDictModuleBase:
    """Return the policy of a configuration with the weights of another program.

    weights: parameters of linear layers, whose names end in `<number>.weight` and `<number>.bias`. If there are
    several groups of agents, their names begin with the group's.
    """

    def order(name: str) -> tuple[Any, ...]:
        number, kind = name.split(".")[-2:]
        return int(number), kind == "bias"

    def weights_of(group: str) -> list[Tensor]:
        names = [name for name in weights if len(parts) == 1 or name.startswith(f"{group}.")]
        return [weights[name] for name in sorted(names, key=order)]

    device = resolve_device(config.device)
    with private_random_streams(0, Stream.SELECTION, device):
        environment = make_environment(config.environment, 1, 0, Stream.SELECTION, device)
        networks = make_networks(config.networks, environment)
    parts = networks.parts
    with torch.no_grad():
        for part in parts:
            for parameter, value in zip(part.policy.parameters(), weights_of(part.group.name), strict=True):
                parameter.copy_(value)
    return networks.policy
