"""The plan of a study: what is tuned, in which ranges, and how trials are judged."""

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
from mappo.tuning.search_space import Choices, Dimension, FloatRange, Space, TuningConfig, read_space


@dataclass(frozen=True)
class Plan:
    """What is tuned, in which ranges, and how trials are judged; fixed for the life of a study."""

    config: ExperimentConfig
    space: Space
    tuning: TuningConfig

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        space = {path: to_dict(dimension) for path, dimension in self.space.items()}
        return {"config": to_dict(self.config), "space": space, "tuning": to_dict(self.tuning)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Plan":
        """From JSON.

        Raises:
            ConfigError: something in it is not allowed.
        """
        config = from_dict(values["config"])
        return cls(config, read_space(values["space"], config), checked(TuningConfig, values["tuning"]))


def changed_fields(stored: Any, given: Any, path: str = "") -> list[str]:
    """What differs, as `path = value -> other value`."""
    if isinstance(stored, dict) and isinstance(given, dict):
        names = sorted(stored.keys() | given.keys())
        below = [(name, f"{path}.{name}".lstrip(".")) for name in names]
        return [line for name, inner in below for line in changed_fields(stored.get(name), given.get(name), inner)]
    return [] if stored == given else [f"{path} = {json.dumps(stored)} -> {json.dumps(given)}"]


def sampler_seed_of(sampler_seed: int, number: int) -> int:
    """Of the sampler for one trial, so that a study that was interrupted samples what it would have."""
    return int(json_hash({"seed": sampler_seed, "trial": number})[:8], 16)


def distribution_of(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choices):
        return CategoricalDistribution([encoded(dimension, choice) for choice in dimension.choices])
    if isinstance(dimension, FloatRange):
        return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    return IntDistribution(dimension.low, dimension.high, log=dimension.log, step=dimension.step)


def encoded(dimension: Dimension, value: Any) -> Any:
    """As Optuna keeps it: lists and objects as JSON."""
    return json.dumps(value) if isinstance(dimension, Choices) and isinstance(value, list | dict) else value


def make_pruner(plan: Plan) -> BasePruner:
    frames = plan.config.collection.total_frames * len(plan.tuning.training_seeds)
    makers: dict[str, Callable[[], BasePruner]] = {
        "median": lambda: MedianPruner(n_startup_trials=4, n_warmup_steps=frames // 4),
        "halving": lambda: SuccessiveHalvingPruner(min_resource=max(1, frames // 9), reduction_factor=3),
        "hyperband": lambda: HyperbandPruner(max(1, frames // 9), frames, reduction_factor=3),
        "wilcoxon": WilcoxonPruner,  # experimental, says Optuna, as it has since version 3.6
        "none": NopPruner,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return makers[plan.tuning.pruner]()
