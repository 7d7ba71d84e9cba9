"""The plan of a study: the default configuration, the search space and the rules that judge trials."""

import json
import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    NopPruner,
    SuccessiveHalvingPruner,
    WilcoxonPruner,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mappo.config import ExperimentConfig, from_dict
from mappo.strict_json import checked, json_hash, to_dict
from mappo.tuning.search_space import Choices, Dimension, FloatRange, IntRange, Space, read_space
from mappo.tuning.study_config import TuningConfig

_MIN_COMPLETED = 4  # completed trials before the median pruner ends one


@dataclass(frozen=True)
class Plan:
    """The default configuration, the search space and the rules that judge trials; fixed once a study exists."""

    config: ExperimentConfig
    space: Space
    tuning: TuningConfig

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a JSON object."""
        space = {path: to_dict(dimension) for path, dimension in self.space.items()}
        return {"config": to_dict(self.config), "space": space, "tuning": to_dict(self.tuning)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """Read a plan from a JSON object.

        Raises:
            ConfigError: a value is not allowed; the message names its field.
        """
        config = from_dict(values["config"])
        return cls(config, read_space(values["space"], config), checked(TuningConfig, values["tuning"]))


def changed_fields(stored: Any, requested: Any, path: str = "") -> list[str]:
    """Return the fields that differ, as `path = stored value -> requested value`."""
    if isinstance(stored, dict) and isinstance(requested, dict):
        names = sorted(stored.keys() | requested.keys())
        fields = [(stored.get(name), requested.get(name), f"{path}.{name}".lstrip(".")) for name in names]
        return [line for field in fields for line in changed_fields(*field)]
    return [] if stored == requested else [f"{path} = {json.dumps(stored)} -> {json.dumps(requested)}"]


def sampler_seed_of(sampler_seed: int, number: int) -> int:
    """Return the sampler's seed for a trial. It depends on the number only, so a resumed study samples alike."""
    return int(json_hash({"seed": sampler_seed, "trial": number})[:8], 16)


def distribution_of(dimension: Dimension) -> BaseDistribution:
    """Return a dimension of the search space as a distribution of Optuna's."""
    if isinstance(dimension, Choices):
        return CategoricalDistribution([encode(dimension, choice) for choice in dimension.choices])
    if isinstance(dimension, FloatRange):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return IntDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def encode(dimension: Dimension, value: Any) -> Any:
    """Return a value as Optuna stores it: a list or an object as JSON text."""
    return json.dumps(value) if isinstance(dimension, Choices) and isinstance(value, list | dict) else value


def decode(dimension: Dimension, stored: Any) -> Any:
    """Return a value of a dimension from the form in which Optuna stores it.

    Raises:
        ValueError: it is not a value of this dimension.
    """
    if isinstance(dimension, Choices):
        for choice in dimension.choices:
            if type(encoded := encode(dimension, choice)) is type(stored) and encoded == stored:
                return choice
        raise ValueError("not among the choices")
    kinds = (int,) if isinstance(dimension, IntRange) else (int, float)
    if type(stored) not in kinds or not math.isfinite(stored):
        raise ValueError(f"not a number of type {dimension.type}")
    return stored


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a trial breaks no constraint, by Optuna's rule."""
    return all(excess <= 0 for excess in trial.constraints.values())


class _MedianPruner(BasePruner):
    """A pruner that ends a trial whose best value is below the median of completed trials at the same frame.

    Trials that break a constraint do not count. Otherwise reckless trials, with high returns, would end safe ones.

    Trials with batches of other sizes report at other frames, so each completed trial counts with the last value
    that it reported at or before that frame. (Optuna's median pruner compares equal frames only, and would never
    end a trial with a batch size of its own.)
    """

    def __init__(self, warmup_frames: int):
        self._warmup_frames = warmup_frames

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Return whether to end a trial after its last report."""
        frames = trial.last_step
        if frames is None or frames < self._warmup_frames:
            return False
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        curves = [
            other.intermediate_values for other in completed if other.intermediate_values and is_feasible(other)
        ]
        if len(curves) < _MIN_COMPLETED:
            return False
        reached = [max((step for step in curve if step <= frames), default=None) for curve in curves]
        values = [curve[step] for curve, step in zip(curves, reached, strict=True) if step is not None]
        return bool(values) and max(trial.intermediate_values.values()) < statistics.median(values)


def make_pruner(plan: Plan) -> BasePruner:
    """Make the pruner that the plan names. It counts frames over all training seeds of a trial."""
    frames = plan.config.collection.total_frames * len(plan.tuning.training_seeds)
    makers: dict[str, Callable[[], BasePruner]] = {
        "median": lambda: _MedianPruner(warmup_frames=frames // 4),
        "halving": lambda: SuccessiveHalvingPruner(min_resource=max(1, frames // 9), reduction_factor=3),
        "hyperband": lambda: HyperbandPruner(max(1, frames // 9), frames, reduction_factor=3),
        "wilcoxon": WilcoxonPruner,  # Optuna has called it experimental since version 3.6
        "none": NopPruner,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return makers[plan.tuning.pruner]()
