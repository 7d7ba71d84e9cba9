"""The plan of a study: the default configuration, the search space and the rules that judge trials."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
    WilcoxonPruner,
)

from mappo.config import ExperimentConfig, from_dict
from mappo.strict_json import checked, json_hash, to_dict
from mappo.tuning.search_space import Choices, Dimension, FloatRange, Space, read_space
from mappo.tuning.study_config import TuningConfig


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


def make_pruner(plan: Plan) -> BasePruner:
    """Make the pruner that the plan names. It counts frames over all training seeds of a trial."""
    frames = plan.config.collection.total_frames * len(plan.tuning.training_seeds)
    makers: dict[str, Callable[[], BasePruner]] = {
        "median": lambda: MedianPruner(n_startup_trials=4, n_warmup_steps=frames // 4),
        "halving": lambda: SuccessiveHalvingPruner(min_resource=max(1, frames // 9), reduction_factor=3),
        "hyperband": lambda: HyperbandPruner(max(1, frames // 9), frames, reduction_factor=3),
        "wilcoxon": WilcoxonPruner,  # Optuna has called it experimental since version 3.6
        "none": NopPruner,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return makers[plan.tuning.pruner]()
