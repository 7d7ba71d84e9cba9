"""The collector that simulates all environments in this process."""

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from mappo.compute.computation import Simulation
from mappo.config import ExperimentConfig
from mappo.environment.environment import make_environment
from mappo.environment.plain_simulation import PlainSimulation
from mappo.environment.random_streams import Stream, random_states, set_random_states
from mappo.environment.simulation_state import SimulationState, capture, restore
from mappo.errors import SimulationStateError
from mappo.fast_simulation.fast_simulation import FastEnvironment, choose_simulation

CPU = torch.device("cpu")
_INFO = "agents/info/"  # tensors that versions before 0.6 carried, and nothing reads


class LocalCollector:
    """A collector that simulates all environments in this process."""

    def __init__(
        self,
        config: ExperimentConfig,
        device: torch.device,
        simulation: Simulation = "plain",
        after_frames: int = 0,
        process: int = 0,
    ):
        """Make the environments.

        simulation: the kind of simulation; `config.collection.simulation` may leave it open.
        after_frames: frames of the run that this collector extends; they change the seed.
        process: the number of this process, from 1, if several processes share a run; 0 otherwise. Each process
            draws different random numbers.
        """
        self._config, self._kind = config, simulation
        self.environment = make_environment(
            config.environment,
            config.collection.num_envs,
            config.seed,
            Stream.TRAINING,
            device,
            after_frames,
            process,
        )
        self.note = ""
        self._simulation: PlainSimulation | FastEnvironment = PlainSimulation(self.environment)

    def begin(self, policy: TensorDictModuleBase) -> None:
        self._simulation, self.note = choose_simulation(self._config, self.environment, self._kind, policy)
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
        except Exception as error:  # a scenario is foreign code, and the restored numbers may be impossible in it
            raise SimulationStateError(
                f"the restored simulation cannot compute a frame: {type(error).__name__}: {error}"
            ) from error
        others = restore(state, self.environment)  # again, because the trial frame changed the state
        if others.get("simulated") != self._simulation.way:
            raise SimulationStateError(
                f"the simulation was {others.get('simulated')!r} and is {self._simulation.way!r} here"
                + (f": {self.note}" if self.note else "")
            )
        if isinstance(self._simulation, FastEnvironment):
            self._simulation.require_same_constants()
        try:
            carried = {name: value for name, value in others["carried"].items() if not name.startswith(_INFO)}
            _copy_over(self._carried, carried)
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
    """Return the tensors that are carried between batches, by names such as `agents/observation`."""
    return {
        key if isinstance(key, str) else "/".join(key): value
        for key, value in sorted(carried.items(True, True), key=lambda item: str(item[0]))
    }


def _copy_over(carried: TensorDictBase, tensors: dict[str, Any]) -> None:
    """Copy captured tensors into `carried`, the tensors that are carried between batches, in place.

    Raises:
        SimulationStateError: names, shapes or types differ, or a number of the plain simulation is not finite.
    """
    targets = _by_name(carried)
    if tensors.keys() != targets.keys():
        raise SimulationStateError(
            f"the tensors carried between batches are {sorted(tensors)}, not {sorted(targets)}"
        )
    for name, target in targets.items():
        source = tensors[name]
        if (source.shape, source.dtype) != (target.shape, target.dtype):
            raise SimulationStateError(
                f"{name}, carried between batches, is {list(source.shape)} {source.dtype}, not "
                f"{list(target.shape)} {target.dtype}"
            )
        if not name.startswith("simulation/") and not source.isfinite().all():
            raise SimulationStateError(f"{name}, carried between batches, is not finite")
        target.copy_(source)
