"""A collector that simulates all environments in this process."""

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from mappo.config import ExperimentConfig
from mappo.environment.environment import make_environment
from mappo.environment.plain_simulation import PlainSimulation
from mappo.environment.random_streams import Stream, random_states, set_random_states
from mappo.environment.simulation_state import SimulationState, capture, restore
from mappo.errors import SimulationStateError
from mappo.fast_simulation.fast_simulation import FastEnvironment, choose_simulation

CPU = torch.device("cpu")


class LocalCollector:
    """Simulates all environments in this process."""

    def __init__(self, config: ExperimentConfig, device: torch.device, after_frames: int = 0, process: int = 0):
        """`process` counts from 1 where several share a run: each draws other random numbers."""
        self._config = config
        self.environment = make_environment(
            config.environment,
            config.collection.num_envs,
            config.seed,
            Stream.TRAINING,
            device,
            after_frames,
            process,
        )
        self.said = ""
        self._simulation: PlainSimulation | FastEnvironment = PlainSimulation(self.environment)

    def begin(self) -> None:
        self._simulation, self.said = choose_simulation(self._config, self.environment)
        self._carried = self._simulation.reset()

    def collect(self, policy: TensorDictModuleBase) -> TensorDictBase:
        frames = self._config.collection.rollout_frames
        batch, self._carried = self._simulation.collect(policy, frames, self._carried)
        return batch

    def capture(self) -> SimulationState:
        return capture(
            self.environment,
            simulated=self._simulation.way,
            carried=_by_name(self._carried),
            random_states=random_states(self.environment.device),
        )

    def restore(self, state: SimulationState) -> None:
        restore(state, self.environment)
        try:
            self.environment.rand_step(self._carried.clone())
        except Exception as error:  # a scenario is foreign code, here with numbers that it may never have made
            raise SimulationStateError(
                f"the restored simulation cannot play: {type(error).__name__}: {error}"
            ) from error
        others = restore(state, self.environment)  # again: that frame was only a trial
        if others.get("simulated") != self._simulation.way:
            raise SimulationStateError(
                f"the simulation was {others.get('simulated')!r} and is {self._simulation.way!r} here"
                + (f": {self.said}" if self.said else "")
            )
        try:
            _copy_over(self._carried, others["carried"])
        except (AttributeError, KeyError, TypeError) as error:
            raise SimulationStateError(f"{type(error).__name__}: {error}") from error
        restore_random_states(others, self.environment.device)

    def close(self) -> None:
        pass


def restore_random_states(others: dict[str, Any], device: torch.device) -> None:
    try:
        set_random_states(others["random_states"], device)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SimulationStateError(f"{type(error).__name__}: {error}") from error


def _by_name(carried: TensorDictBase) -> dict[str, Tensor]:
    """What is carried between batches, by names such as `agents/observation`."""
    return {
        key if isinstance(key, str) else "/".join(key): value
        for key, value in sorted(carried.items(True, True), key=str)
    }


def _copy_over(carried: TensorDictBase, tensors: dict[str, Any]) -> None:
    """Copy what was carried from batch to batch over what a reset gives."""
    target = _by_name(carried)
    if tensors.keys() != target.keys():
        raise SimulationStateError(f"carried between batches are {sorted(tensors)}, not {sorted(target)}")
    for name, value in target.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (value.shape, value.dtype):
            raise SimulationStateError(
                f"{name}, carried between batches, is {list(found.shape)} {found.dtype}, not "
                f"{list(value.shape)} {value.dtype}"
            )
        if not name.startswith("simulation/") and not found.isfinite().all():
            raise SimulationStateError(f"{name}, carried between batches, is not finite")
        value.copy_(found)
