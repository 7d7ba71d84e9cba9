"""The measurements of episodes: what a scenario's `info()` returns, reduced to one number for each episode."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment.reductions import Reduction, declared_reductions, guess_reductions
from mappo.evaluation import statistics
from mappo.evaluation.statistics import Estimate

TERMINATED = "terminated"  # a measurement of every task: 1 if the task ended the episode before the time limit


@dataclass(frozen=True)
class Measurement:
    """A measurement of the episodes of one policy, averaged over agents.

    reduction: how the numbers of an episode's frames become one. episode_values: one number for each episode,
    ordered as the returns; None if no frame measured a finite number. mean: that of the other episodes, or None.
    """

    reduction: Reduction
    episode_values: list[float | None]
    mean: Estimate | None

    @property
    def mean_of_all(self) -> float | None:
        """The mean over episodes if all of them have a number, or else None."""
        return mean_of_all(self.episode_values)

    def __str__(self) -> str:
        """Return the mean with its interval, and the number of measured episodes unless it is all of them."""
        if self.mean is None:
            return "not measured"
        num_measured = sum(value is not None for value in self.episode_values)
        is_whole = num_measured == len(self.episode_values)
        return str(self.mean) + ("" if is_whole else f" in {num_measured} of {len(self.episode_values)} episodes")


class Measurer:
    """The measurements of episodes while they are played; `measure_frame` is the `OnFrame` of `play_episodes`."""

    def __init__(self) -> None:
        self._is_declared = False
        self._reductions: dict[str, Reduction] = {}
        self._seeds: list[
            tuple[int, dict[str, _Reduced]]
        ] = []  # the number of episodes, and the measurements by name

    def measure_frame(self, environment: EnvBase, running: Tensor, rewards: Tensor | None) -> None:
        """Add a frame of the episodes that were `running` before it [envs]; a reset begins those of a seed."""
        if rewards is None:
            declared = declared_reductions(environment.base_env._env.scenario)
            self._is_declared = declared is not None
            self._reductions.update(declared or {})
            self._seeds.append((len(running), {}))
            return
        _, reduced = self._seeds[-1]
        measured = environment.base_env.measured()
        if not self._is_declared:
            guess_reductions(self._reductions, measured)
        for name, numbers in measured.items():
            if name in self._reductions:
                reduced.setdefault(name, _Reduced(self._reductions[name], numbers))
                reduced[name].add(torch.where(running, numbers, torch.nan))

    def measurements(
        self, average: Callable[[Sequence[float]], Estimate], episodes_per_value: int = 1
    ) -> dict[str, Measurement]:
        """Return the measurements by name.

        average: the mean of values with an interval that resamples them. episodes_per_value: the number of
        episodes in a row that depend on each other; their mean is one value.
        """
        result: dict[str, Measurement] = {}
        for name, reduction in sorted(self._reductions.items()):
            values: list[float | None] = []
            for num_episodes, reduced in self._seeds:
                values += reduced[name].episode_values() if name in reduced else [None] * num_episodes
            known = means_of_groups(values, episodes_per_value)
            result[name] = Measurement(reduction, values, average(known) if known else None)
        return result


def terminations(
    lengths: Sequence[float],
    max_frames: int,
    average: Callable[[Sequence[float]], Estimate],
    episodes_per_value: int = 1,
) -> dict[str, Measurement]:
    """Return the measurement `terminated` of episodes of these lengths, whose mean is the share that ended early.

    An episode that is shorter than the time limit was ended by the scenario's `done()`. `average` and
    `episodes_per_value` are those of `Measurer.measurements`.
    """
    values: list[float | None] = [float(length < max_frames) for length in lengths]
    return {TERMINATED: Measurement("last", values, average(means_of_groups(values, episodes_per_value)))}


class _Reduced:
    """The reduction of one measurement over the frames of episodes that run together [envs]."""

    def __init__(self, reduction: Reduction, like: Tensor):
        self._reduction = reduction
        self._value = torch.full_like(like, torch.nan)  # until the first number
        self._num_frames = torch.zeros_like(like)

    def add(self, numbers: Tensor) -> None:
        """Add the numbers of one frame; NaN is a number that was not measured."""
        is_measured = ~numbers.isnan()
        self._num_frames += is_measured
        if self._reduction == "maximum":
            self._value = torch.fmax(self._value, numbers)
        else:
            added = numbers if self._reduction == "last" else self._value.nan_to_num(0.0) + numbers
            self._value = torch.where(is_measured, added, self._value)

    def episode_values(self) -> list[float | None]:
        """Return the number of each episode; None if no frame of the episode measured one."""
        values = self._value / self._num_frames if self._reduction == "mean" else self._value
        return [number if math.isfinite(number) else None for number in values.tolist()]


def mean_of_all(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if a value is missing."""
    known = [value for value in values if value is not None]
    return statistics.plain_mean(known).value if len(known) == len(values) else None


def means_of_groups(values: Sequence[float | None], group_size: int) -> list[float]:
    """Return the means of groups of `group_size` values in a row, without None and without empty groups."""
    groups = [
        [value for value in values[start : start + group_size] if value is not None]
        for start in range(0, len(values), group_size)
    ]
    return [sum(group) / len(group) for group in groups if group]
