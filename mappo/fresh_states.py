"""States that finished environments start from, kept until they are needed."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mappo.pure_step import State


class _Later:
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


@dataclass(frozen=True)
class FreshStates:
    """Two sets of states, one state for each environment, which are taken in order, one set after the other.

    When too few are left, another set takes the place of the first. state, observation: [envs, 2, ...].
    made: sets so far. taken: states so far, an integer on the device; noted: the same, for the host.
    """

    state: State
    observation: Tensor
    made: int
    taken: Tensor
    noted: _Later

    @staticmethod
    def none_like(state: State, observation: Tensor) -> "FreshStates":
        """None is left; each [envs, ...]."""
        sets = {name: torch.stack([value, value], 1) for name, value in state.items()}
        is_taken = torch.ones(len(observation), 2, dtype=torch.bool, device=observation.device)
        return FreshStates.of(sets, torch.stack([observation, observation], 1), is_taken)

    @staticmethod
    def of(state: State, observation: Tensor, is_taken: Tensor) -> "FreshStates":
        """Two sets of which some states are taken: is_taken [envs, 2]."""
        taken = is_taken.sum()
        return FreshStates(state, observation, 2, taken, _Later(taken))

    def sets(self) -> tuple[State, Tensor, Tensor]:
        """What `of` makes the same from."""
        num_envs, turned = len(self.observation), self.made % 2
        number = torch.arange(2 * num_envs, device=self.taken.device).reshape(2, num_envs).t()
        is_taken = number < self.taken - (self.made - 2) * num_envs
        state = {name: value.flip(1) if turned else value for name, value in self.state.items()}
        return state, self.observation.flip(1) if turned else self.observation, is_taken

    def num_left(self) -> int:
        """How many are not taken; a GPU is waited for until it has taken what was taken last."""
        return self.made * len(self.observation) - self.noted.read()

    def with_another_set(self, state: State, observation: Tensor) -> "FreshStates":
        """In place of the one of which all are taken; each [envs, ...]."""
        both = {name: value.clone() for name, value in self.state.items()}
        for name, value in both.items():
            value[:, self.made % 2] = state[name]
        shown = self.observation.clone()
        shown[:, self.made % 2] = observation
        return replace(self, state=both, observation=shown, made=self.made + 1)

    def take(self, finished: Tensor) -> tuple[State, Tensor, "FreshStates"]:
        """The next state and observation for each environment that finished [envs]; of the others, any."""
        number, num_envs = self.taken + finished.cumsum(0) - 1, len(finished)
        source = number % num_envs, number // num_envs % 2
        taken = self.taken + finished.sum()
        state = {name: value[source] for name, value in self.state.items()}
        return state, self.observation[source], replace(self, taken=taken, noted=_Later(taken))
