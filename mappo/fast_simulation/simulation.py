"""The simulation that steps by a pure step, while a plain environment makes fresh states."""

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.compute.computation import Way
from mappo.environment.groups import padded
from mappo.environment.keys import OBSERVATION
from mappo.environment.state_walk import same_bits
from mappo.errors import SimulationStateError
from mappo.fast_simulation.audit import Audit
from mappo.fast_simulation.fresh_states import FreshStatePool, FreshStates
from mappo.fast_simulation.pure_step import Frame, PureStep, StepState
from mappo.fast_simulation.python_state import find_slots
from mappo.fast_simulation.resets import Resets
from mappo.fast_simulation.slots import Slots, copies


class FastSimulation:
    """The simulation that steps by a pure step and lets a plain environment make fresh states."""

    def __init__(self, environment: EnvBase, step: PureStep, resets: Resets):
        self._environment, self._step = environment, step
        self.resets = tuple(sorted(resets.names))  # names of the state's slots that a reset overwrites
        self._is_on_cpu = environment.device.type == "cpu"
        self._resets = resets
        self._slots: Slots = {}

    def begin(self) -> tuple[StepState, Tensor, FreshStatePool]:
        """Reset all environments as the plain path does; return the state, observations and an empty pool."""
        observation = self._environment.reset()[OBSERVATION]
        self._slots = find_slots(self._environment)
        self.audit = Audit(self._environment, self._step, self._resets, self._slots)
        self._constants = copies(self._slots, self._step.constants & self._slots.keys())
        state = copies(self._slots, self._step.names)
        fresh = {name: state[name] for name in self.resets}
        return state, observation, FreshStatePool.empty_like(fresh, observation)

    def require_same_constants(self) -> None:
        """Check that the plain environment still holds the numbers that were traced as constants.

        Raises:
            SimulationStateError: it does not, because another state was restored into it.
        """
        for path, value in self._constants.items():
            if not same_bits(value, self._slots[path].get()):
                raise SimulationStateError(f"{path} differs from this task's, and it never changes")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the state's slots."""
        return self._step.names

    @property
    def way(self) -> Way:
        """The way in which frames are computed."""
        return "fast" if self._step.is_compiled else "plain"

    def step(self, state: StepState, action: Tensor) -> Frame:
        """Compute one frame of all environments, without changing an argument."""
        return self._step(state, action)

    def refilled(self, pool: FreshStatePool) -> FreshStatePool:
        """Return the pool, topped up so that every environment could finish in the next frame.

        Call this method before each frame. The host waits at most until the GPU has finished the frame before
        the last one.
        """
        while pool.is_low():
            pool = pool.with_new_set(*self._reset())
        return pool

    def reset_finished(
        self, done: Tensor, state: StepState, observation: Tensor, fresh: FreshStates
    ) -> tuple[StepState, Tensor, FreshStates]:
        """Let the environments that are done [envs, 1] take the next fresh states in order.

        Other environments, and slots that resets do not write, keep their values. If no environment is done,
        the result may be the arguments themselves.
        """
        finished = done.squeeze(-1)
        # On a GPU, `any` would make the host wait for the frame; there, fresh states are always selected.
        if self._is_on_cpu and not finished.any():
            return state, observation, fresh
        fresh_state, fresh_observation, fresh = fresh.take(finished)
        reset_slots = {name: _where(finished, fresh_state[name], state[name]) for name in self.resets}
        state = self._with_side_effect({**state, **reset_slots}, finished)
        return state, _where(finished, fresh_observation, observation), fresh

    @property
    def is_reset_as_a_whole(self) -> bool:
        """The need for `reset_all` after a frame in which every environment finished.

        The plain path then resets all of them together, which may draw other states than resets one by one.
        """
        return self._resets.one_by_one

    def reset_all(self, state: StepState) -> tuple[StepState, Tensor]:
        """Reset all environments together; return the state and the first observations."""
        observation = self._environment.reset()[OBSERVATION]
        return {**state, **copies(self._slots, self.resets)}, observation

    def _with_side_effect(self, state: StepState, finished: Tensor) -> StepState:
        """Return the state after the finished environments [envs] were reset one after the other."""
        if not self._resets.side_effect.names:
            return state
        has_later = finished.sum() - finished.cumsum(0) > 0
        is_changed = has_later | (finished.any() & ~finished)
        changed = self._resets.side_effect(state).items()
        return {**state, **{name: _where(is_changed, value, state[name]) for name, value in changed}}

    def _reset(self) -> tuple[StepState, Tensor]:
        """Reset the plain environment and return a fresh state and observation for each environment.

        The reset draws from the simulator's random state.
        """
        if not self._resets.one_by_one:
            observation = self._environment.reset()[OBSERVATION]
            return copies(self._slots, self.resets), observation
        simulator = self._environment.base_env._env
        just_reset = copies(self._slots, self._resets.side_effect.names)
        for row in range(self._environment.batch_size[0]):
            simulator.reset_at(row, return_observations=False)
            for name, value in just_reset.items():
                value[row] = self._slots[name].get()[row]
        observation = torch.stack(padded(simulator.get_from_scenario(True, False, False, False)[0]), 1)
        return {**copies(self._slots, self.resets), **just_reset}, observation


def _where(rows: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    return torch.where(rows_like(rows, others), chosen, others)


def rows_like(rows: Tensor, like: Tensor) -> Tensor:
    """Return the flags [envs] or [envs, 1] in a shape that broadcasts with a tensor [envs, ...]."""
    return rows.reshape(-1, *[1] * (like.ndim - 1))
