"""The collectors: one simulates all environments in this process, the other shares them among processes.

Both can save everything that is carried from batch to batch, and resume from it exactly.
"""

from typing import Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from mappo.compute.computation import Simulation
from mappo.config import ExperimentConfig
from mappo.environment.simulation_state import SimulationState
from mappo.training.local_collector import LocalCollector
from mappo.training.process_collector import ProcessCollector


class Collector(Protocol):
    """A collector of batches from the environments of a training run.

    environment: an environment of the task; networks are made for its specs.
    note: a line for the log that tells which simulation is used and why, or an empty text.
    """

    environment: EnvBase
    note: str

    def begin(self, policy: TensorDictModuleBase) -> None:
        """Make the simulation, which may compile this policy, and reset all environments.

        Raises:
            CompilationFailed: the compiler is missing or failed.
        """

    def collect(self, policy: TensorDictModuleBase) -> TensorDictBase:
        """Collect the next batch [envs, rollout_frames], which continues the episodes of the previous batch.

        Raises:
            NonFiniteObservation: an observation is not finite; the message names the environment and the agent.
            ProcessDied: a process that simulates a share of the environments ended.
        """

    def capture(self) -> SimulationState:
        """Copy the whole state of the collector, and the random states of this process."""

    def restore(self, state: SimulationState) -> None:
        """Continue from the captured state of a collector with the same configuration; call this after `begin`.

        Raises:
            SimulationStateError: the state does not fit this collector. The collector cannot be used
            afterwards.
        """

    def close(self) -> None:
        """End the processes that the collector started."""


def make_collector(
    config: ExperimentConfig, device: torch.device, simulation: Simulation = "plain", after_frames: int = 0
) -> Collector:
    """Make the collector for `collection.processes`. Call this function inside `private_random_streams`.

    Raises:
        ConfigError: the task cannot be made, or the fast simulation is requested and no compiler is installed.
    """
    if config.collection.processes > 1:
        return ProcessCollector(config, device, simulation, after_frames)
    return LocalCollector(config, device, simulation, after_frames)
