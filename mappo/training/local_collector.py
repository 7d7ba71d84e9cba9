"""The collector that simulates all environments in this process."""

from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.compute.computation import Simulation
from mappo.config import ExperimentConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import CARRIED, MEMORIES, OBSERVATION, REWARD, Key
from mappo.environment.plain_simulation import PlainSimulation
from mappo.environment.random_streams import (
    Stream,
    random_states,
    require_possible_random_states,
    set_random_states,
)
from mappo.environment.simulation_state import SimulationState, capture, restore
from mappo.errors import SimulationStateError, one_line
from mappo.fast_simulation.fast_simulation import FastEnvironment, choose_simulation
from mappo.learning.memory import first_memory
from mappo.training.forked_trial import require_success

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
        memories = first_memory(policy, self._config.collection.num_envs)
        self._simulation, self.note = choose_simulation(
            self._config, self.environment, self._kind, policy, memories
        )
        self._carried = self._simulation.reset()
        for key, memory in memories.items():
            self._carried[key] = memory

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
        self._require_playable(state)
        try:
            self._restore(state)
        except SimulationStateError:
            raise
        except Exception as error:  # a scenario is foreign code, and a checkpoint holds any data
            raise SimulationStateError(f"{type(error).__name__}: {one_line(error)}") from error

    def _restore(self, state: SimulationState) -> None:
        others = restore(state, self.environment)
        if others.get("simulated") != self._simulation.way:
            raise SimulationStateError(
                f"the simulation was {one_line(repr(others.get('simulated')))} and is "
                f"{self._simulation.way!r} here" + (f": {self.note}" if self.note else "")
            )
        if isinstance(self._simulation, FastEnvironment):
            self._simulation.require_same_constants()
        carried = {name: value for name, value in others["carried"].items() if not name.startswith(_INFO)}
        _copy_over(self._carried, carried)
        restore_random_states(others, self.environment.device)

    def _require_playable(self, state: SimulationState) -> None:
        """Restore a state and play a little from it, in a copy of this process, which simulates on the CPU.

        Raises:
            SimulationStateError: the simulation fails, does not end, or has numbers that are not finite.
        """
        environment, is_on_cpu = self.environment, self.environment.device.type == "cpu"

        def rehearse() -> None:
            nonlocal environment
            if not is_on_cpu:
                num_envs = self._config.collection.num_envs
                environment = make_environment(self._config.environment, num_envs, 0, Stream.TRAINING, CPU)
            environment.rand_step(environment.reset())

        def attempt() -> None:
            finite = {name for name, value in _motions(environment).items() if value.isfinite().all()}
            if is_on_cpu:
                self._restore(state)
            else:
                restore(state, environment)
            if broken := sorted(name for name in finite if not _motions(environment)[name].isfinite().all()):
                raise SimulationStateError(f"{broken[0]} is not finite")
            for _ in range(2):  # as it continues, and after resets
                outputs = environment.rand_step(environment.fake_tensordict().select(*CARRIED).zero_())["next"]
                for key in (OBSERVATION, REWARD):
                    if not outputs[key].isfinite().all():
                        raise SimulationStateError(f"the {key[-1]} of the next frame is not finite")
                capture(environment)
                environment.base_env._env.reset_at(0)
                environment.reset()

        require_success(rehearse, attempt)

    def close(self) -> None:
        pass


def restore_random_states(others: dict[str, Any], device: torch.device) -> None:
    try:
        require_possible_random_states(others["random_states"])
        set_random_states(others["random_states"], device)
    except Exception as error:  # any data may be in their place
        raise SimulationStateError(
            f"the random states cannot be used: {type(error).__name__}: {one_line(error)}"
        ) from error


def _motions(environment: EnvBase) -> dict[str, Tensor]:
    """Return the positions, rotations and velocities of all entities, by name."""
    return {
        f"the {part} of {entity.name}": getattr(entity.state, part)
        for entity in environment.base_env._env.world.entities
        for part in ("pos", "vel", "rot", "ang_vel")
    }


def _name(key: Key) -> str:
    return key if isinstance(key, str) else "/".join(key)


def _by_name(carried: TensorDictBase) -> dict[str, Tensor]:
    """Return the tensors that are carried between batches, by names such as `agents/observation`."""
    return {_name(key): value for key, value in sorted(carried.items(True, True), key=lambda item: str(item[0]))}


def _copy_over(carried: TensorDictBase, tensors: dict[str, Any]) -> None:
    """Copy captured tensors into `carried`, the tensors that are carried between batches, in place.

    Raises:
        SimulationStateError: names, shapes or types differ, or a number that must be finite is not.
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
        # Of the fast simulation, positions and velocities are finite; a scenario may mark other numbers by NaN.
        must_be_finite = not name.startswith("simulation/") or (
            name.startswith("simulation/state/") and "._state." in name and target.isfinite().all()
        )
        if must_be_finite and not source.isfinite().all():
            raise SimulationStateError(f"{name}, carried between batches, is not finite")
        if name in map(_name, MEMORIES) and source.abs().max() > 1:
            raise SimulationStateError(f"{name}, carried between batches, is not between -1 and 1")
        target.copy_(source)
