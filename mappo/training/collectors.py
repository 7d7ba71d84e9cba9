"""Collectors: this process simulates all environments, or several processes a share each.

Both can save everything that is carried from batch to batch, and resume from it exactly.
"""

from typing import Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from mappo.config import ExperimentConfig
from mappo.environment.simulation_state import SimulationState
from mappo.training.local_collector import LocalCollector
from mappo.training.process_collector import ProcessCollector


class Collector(Protocol):
    """Plays the environments of a training run.

    environment: of the task, whose specs networks are made for.
    said: which way the environments are simulated, and why, where that is worth a line in the log.
    """

    environment: EnvBase
    said: str

    def begin(self) -> None:
        """Reset all environments."""

    def collect(self, policy: TensorDictModuleBase) -> TensorDictBase:
        """The next batch [envs, rollout_frames], which continues the episodes of the one before.

        Raises:
            NonFiniteObservation: naming the environment and the agent.
            ProcessDied: a process ended that had a share of the environments.
        """

    def capture(self) -> SimulationState:
        """Copies of all that changes here, and of the random states of this process."""

    def restore(self, state: SimulationState) -> None:
        """Go on from where another one was, of the same configuration; call it after `begin`.

        Raises:
            SimulationStateError: the state is not that of such a collector. This one is then not to be used.
        """

    def close(self) -> None:
        """End what was started."""


def make_collector(config: ExperimentConfig, device: torch.device, after_frames: int = 0) -> Collector:
    """The collector that `collection.processes` asks for. Call it inside `private_random_streams`.

    Raises:
        ConfigError: the task cannot be made, or its fast simulation is asked for and there is no compiler.
    """
    if config.collection.processes > 1:
        return ProcessCollector(config, device, after_frames)
    return LocalCollector(config, device, after_frames)
