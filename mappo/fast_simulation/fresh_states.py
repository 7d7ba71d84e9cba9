"""The pool of fresh states, from which finished environments start again."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mappo.fast_simulation.pure_step import StepState

# Number of sets in the pool: one for the next frame, one for the last frame, whose count the host has not
# read yet, and one from which states are being taken.
_SETS = 3


class _AsyncCount:
    """An integer copied from the device asynchronously; read late, it costs no wait."""

    def __init__(self, value: Tensor):
        # The target is pinned memory, because any other copy from a GPU makes the host wait.
        self._copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        self._copy.copy_(value, non_blocking=True)
        self._copied = torch.cuda.Event() if value.is_cuda else None  # type: ignore[no-untyped-call]
        if self._copied:
            self._copied.record()

    def read(self) -> int:
        if self._copied:
            self._copied.synchronize()
        return int(self._copy.numpy())


class FreshStates(NamedTuple):
    """The sets of states, one state for each environment in a set. States are taken in order, set after set.

    state, observation: [envs, sets, ...]. Set number n lies at position n % sets.
    num_taken: the number of states taken so far, an integer.
    """

    state: StepState
    observation: Tensor
    num_taken: Tensor

    def take(self, finished: Tensor) -> tuple[StepState, Tensor, "FreshStates"]:
        """Return the next state and observation for each finished environment, and the remaining fresh states.

        finished: a mask [envs]. The rows of the other environments hold arbitrary states.
        """
        number, num_envs = self.num_taken + finished.cumsum(0) - 1, len(finished)
        source = number % num_envs, number // num_envs % _SETS
        state = {name: value[source] for name, value in self.state.items()}
        return state, self.observation[source], self._replace(num_taken=self.num_taken + finished.sum())


@dataclass(frozen=True)
class FreshStatePool:
    """The fresh states and the counts that tell when the pool needs a new set, which replaces the oldest one.

    num_sets: the number of sets made so far.
    taken_before_last_frame, taken_after_last_frame: the number of states taken before and after the last frame.
    """

    fresh: FreshStates
    num_sets: int
    taken_before_last_frame: _AsyncCount
    taken_after_last_frame: _AsyncCount

    @staticmethod
    def empty_like(state: StepState, observation: Tensor) -> "FreshStatePool":
        """Return a pool without a free state, for tensors of these shapes and types [envs, ...]."""
        sets = {name: torch.stack([value] * _SETS, 1) for name, value in state.items()}
        is_taken = torch.ones(len(observation), _SETS, dtype=torch.bool, device=observation.device)
        return FreshStatePool.from_tensors(sets, torch.stack([observation] * _SETS, 1), is_taken)

    @staticmethod
    def from_tensors(state: StepState, observation: Tensor, is_taken: Tensor) -> "FreshStatePool":
        """Return a pool of these sets [envs, sets, ...]; is_taken [envs, sets] marks the states already taken."""
        num_taken = is_taken.sum()
        count = _AsyncCount(num_taken)
        return FreshStatePool(FreshStates(state, observation, num_taken), _SETS, count, count)

    def to_tensors(self) -> tuple[StepState, Tensor, Tensor]:
        """Return the tensors from which `from_tensors` rebuilds this pool, the oldest set first."""
        num_envs, first = len(self.fresh.observation), self.num_sets % _SETS
        number = torch.arange(_SETS * num_envs, device=self.fresh.num_taken.device).reshape(_SETS, num_envs).t()
        is_taken = number < self.fresh.num_taken - (self.num_sets - _SETS) * num_envs
        state = {name: value.roll(-first, 1) for name, value in self.fresh.state.items()}
        return state, self.fresh.observation.roll(-first, 1), is_taken

    def is_low(self) -> bool:
        """Return whether the pool may hold fewer free states than environments.

        The answer uses the count before the last frame, which the host can read without waiting for that frame.
        """
        num_envs = len(self.fresh.observation)
        num_free = self.num_sets * num_envs - self.taken_before_last_frame.read()
        return num_free < 2 * num_envs  # twice, because the last frame took at most one set

    def with_new_set(self, state: StepState, observation: Tensor) -> "FreshStatePool":
        """Replace the oldest set, which is used up whenever the pool is low. Arguments are [envs, ...]."""
        states = {name: value.clone() for name, value in self.fresh.state.items()}
        for name, value in states.items():
            value[:, self.num_sets % _SETS] = state[name]
        observations = self.fresh.observation.clone()
        observations[:, self.num_sets % _SETS] = observation
        fresh = self.fresh._replace(state=states, observation=observations)
        return replace(self, fresh=fresh, num_sets=self.num_sets + 1)

    def after_frame(self, fresh: FreshStates) -> "FreshStatePool":
        """Return the pool after a frame, which left the states in `fresh`."""
        return replace(
            self,
            fresh=fresh,
            taken_before_last_frame=self.taken_after_last_frame,
            taken_after_last_frame=_AsyncCount(fresh.num_taken),
        )
