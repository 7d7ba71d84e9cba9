"""States that finished environments start from, kept until they are needed."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mappo.fast_simulation.pure_step import StepState

_SETS = 3  # one for the frame to come, one for the last, of which nothing is known yet, and one to be taken from


class _AsyncCount:
    """A whole number that a device computes, for a host that asks only when it is long there."""

    def __init__(self, value: Tensor):
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
    """Sets of states, one state for each environment, which are taken in order, one set after the other.

    state, observation: [envs, sets, ...], the place of a set being its number % sets. taken: states so far, an
    integer.
    """

    state: StepState
    observation: Tensor
    taken: Tensor

    def take(self, finished: Tensor) -> tuple[StepState, Tensor, "FreshStates"]:
        """The next state and observation for each environment that finished [envs]; of the others, any."""
        number, num_envs = self.taken + finished.cumsum(0) - 1, len(finished)
        source = number % num_envs, number // num_envs % _SETS
        state = {name: value[source] for name, value in self.state.items()}
        return state, self.observation[source], self._replace(taken=self.taken + finished.sum())


@dataclass(frozen=True)
class FreshStatePool:
    """Fresh states, of which another set takes the place of the oldest when too few are left.

    made: sets so far. known, noted: states taken before the last frame, and with it.
    """

    fresh: FreshStates
    made: int
    known: _AsyncCount
    noted: _AsyncCount

    @staticmethod
    def none_like(state: StepState, observation: Tensor) -> "FreshStatePool":
        """None is left; each [envs, ...]."""
        sets = {name: torch.stack([value] * _SETS, 1) for name, value in state.items()}
        is_taken = torch.ones(len(observation), _SETS, dtype=torch.bool, device=observation.device)
        return FreshStatePool.of(sets, torch.stack([observation] * _SETS, 1), is_taken)

    @staticmethod
    def of(state: StepState, observation: Tensor, is_taken: Tensor) -> "FreshStatePool":
        """Sets of which some states are taken: is_taken [envs, sets]."""
        taken = is_taken.sum()
        noted = _AsyncCount(taken)
        return FreshStatePool(FreshStates(state, observation, taken), _SETS, noted, noted)

    def kept(self) -> tuple[StepState, Tensor, Tensor]:
        """What `of` makes the same from."""
        num_envs, first = len(self.fresh.observation), self.made % _SETS
        number = torch.arange(_SETS * num_envs, device=self.fresh.taken.device).reshape(_SETS, num_envs).t()
        is_taken = number < self.fresh.taken - (self.made - _SETS) * num_envs
        state = {name: value.roll(-first, 1) for name, value in self.fresh.state.items()}
        return state, self.fresh.observation.roll(-first, 1), is_taken

    def is_low(self) -> bool:
        """Whether fewer may be left than environments, by what was known before the last frame."""
        num_envs = len(self.fresh.observation)
        return self.made * num_envs - self.known.read() < 2 * num_envs  # the last frame took one set at most

    def with_another_set(self, state: StepState, observation: Tensor) -> "FreshStatePool":
        """In place of the oldest, of which all are taken when it is low; each [envs, ...]."""
        sets = {name: value.clone() for name, value in self.fresh.state.items()}
        for name, value in sets.items():
            value[:, self.made % _SETS] = state[name]
        shown = self.fresh.observation.clone()
        shown[:, self.made % _SETS] = observation
        fresh = self.fresh._replace(state=sets, observation=shown)
        return replace(self, fresh=fresh, made=self.made + 1)

    def after(self, fresh: FreshStates) -> "FreshStatePool":
        """A frame, which took some."""
        return replace(self, fresh=fresh, known=self.noted, noted=_AsyncCount(fresh.taken))
