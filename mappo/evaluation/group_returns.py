"""The returns of each group of agents, where groups have rewards of their own, as opponents do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment.environment import groups_of
from mappo.evaluation import statistics
from mappo.evaluation.statistics import Estimate


@dataclass(frozen=True)
class GroupReturns:
    """The episode returns of a group, undiscounted, averaged over its agents, and ordered by seed."""

    episode_returns: list[float]
    mean: Estimate


class GroupReturnsRecorder:
    """The recorder of returns while episodes are played; `add_frame` is an `OnFrame` of `play_episodes`."""

    def __init__(self) -> None:
        self._seeds: list[dict[str, Tensor]] = []  # the returns [envs] of the episodes of each seed, by group

    def add_frame(self, environment: EnvBase, running: Tensor, rewards: Tensor | None) -> None:
        """Add a frame of the episodes that were `running` before it [envs]; a reset begins those of a seed."""
        groups = groups_of(environment)
        if rewards is None:
            zero = torch.zeros(len(running), device=running.device)
            self._seeds.append({group.name: zero for group in groups})
            return
        for group in groups:
            reward = group.rows(rewards, -1).mean(-1)
            self._seeds[-1][group.name] = self._seeds[-1][group.name] + torch.where(running, reward, 0.0)

    def returns(
        self, average: Callable[[Sequence[float]], Estimate], episodes_per_value: int = 1
    ) -> dict[str, GroupReturns]:
        """Return the returns by group, or none if all agents are one group.

        average: the mean of values with an interval that resamples them. episodes_per_value: the number of
        episodes in a row that depend on each other; their mean is one value.
        """
        if not self._seeds or len(self._seeds[0]) == 1:
            return {}
        by_group = {
            name: [value for seed in self._seeds for value in seed[name].tolist()] for name in self._seeds[0]
        }
        return {
            name: GroupReturns(values, average(statistics.by_seed(values, episodes_per_value)))
            for name, values in by_group.items()
        }
