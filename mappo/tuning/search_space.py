"""The search space of a study: the configuration fields that it tunes, and their ranges. JSON in and out."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue
from pydantic.dataclasses import dataclass

from mappo.config import ExperimentConfig, override
from mappo.errors import ConfigError
from mappo.strict_json import STRICT, checked, to_dict

_UNTUNABLE = {  # sections and fields that a study may not change, with the reason
    "environment": "it would change the task",
    "selection": "it judges the trials",
    "evaluation": "it judges the trials",
    "collection.total_frames": "more training is not better training",
    "seed": "a better result would be chance",
    "threads": "it is part of what makes a run repeatable",
    "device": "it is part of what makes a run repeatable",
}


@dataclass(frozen=True, config=STRICT)
class FloatRange:
    """A range of real numbers, both ends included; with `log`, drawn uniformly on a logarithmic scale."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        """Require low < high, and low > 0 with `log`."""
        _require_range(self.low, self.high, self.log)


@dataclass(frozen=True, config=STRICT)
class IntRange:
    """A range of whole numbers, both ends included; with `log`, drawn uniformly on a logarithmic scale."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        """Require low < high, steps that reach `high`, and not both `log` and `step`."""
        _require_range(self.low, self.high, self.log)
        if self.log and self.step > 1:
            raise ConfigError(f"log = true, step = {self.step}: log and step exclude each other; leave one out")
        if (self.high - self.low) % self.step:
            raise ConfigError(f"high = {self.high}: not reached from low = {self.low} in steps of {self.step}")


@dataclass(frozen=True, config=STRICT)
class Choices:
    """A set of values without an order."""

    type: Literal["categorical"]
    choices: Annotated[tuple[JsonValue, ...], Field(min_length=2)]

    def __post_init__(self) -> None:
        """Require different values."""
        if len({json.dumps(choice) for choice in self.choices}) < len(self.choices):
            raise ConfigError("choices: a value is repeated; list each value once")


Dimension = FloatRange | IntRange | Choices
Space = dict[str, Dimension]  # keys are dotted paths of fields, such as learner.epochs
_KINDS: dict[str, type[Dimension]] = {"float": FloatRange, "int": IntRange, "categorical": Choices}


def read_space(values: Mapping[str, Any], config: ExperimentConfig) -> Space:
    """Read a search space from a JSON object such as {"learner.epochs": {"type": "int", "low": 2, "high": 30}}.

    Raises:
        ConfigError: a field does not exist or may not be tuned, a range exceeds the configuration's bounds, or a
            range leaves out the configuration's own value, which is the first trial.
    """
    if not values:
        raise ConfigError("space: names no field; name at least one to tune")
    space: Space = {}
    for path, declared in values.items():
        _require_tunable(path, config)
        dimension = space[path] = _dimension(path, declared)
        for value in _ends(dimension):
            try:
                applied(config, {path: value})
            except ConfigError as error:
                raise ConfigError(f"space: {error}") from None
        if not contains(dimension, default := value_of(config, path)):
            raise ConfigError(
                f"space.{path}: leaves out {json.dumps(default)}, the configuration's own value, which is the "
                "first trial: widen the range, or change the configuration"
            )
    return space


def default_space(config: ExperimentConfig) -> Space:
    """Return the ranges of clip_epsilon, gae_lambda and epochs, widened to hold the configuration's own values."""
    learner = config.learner
    epsilon, lambda_, epochs = learner.clip_epsilon, learner.gae_lambda, learner.epochs
    return {
        "learner.clip_epsilon": FloatRange("float", min(0.05, epsilon), max(0.4, epsilon)),
        "learner.gae_lambda": FloatRange("float", min(0.8, lambda_), max(1.0, lambda_)),
        "learner.epochs": IntRange("int", min(2, epochs), max(30, epochs), log=True),
    }


def extended_space(changes: Mapping[str, Any], config: ExperimentConfig) -> Space:
    """Return the default space with changes from JSON: a new or changed field, or null to remove a field.

    Raises:
        ConfigError: a change removes a field that the default space does not have, or `read_space` refuses the
            result.
    """
    default = default_space(config)
    for path, value in changes.items():
        if value is None and path not in default:
            raise ConfigError(
                f"space: {path} = null: null removes a default field, which is one of {', '.join(default)}"
            )
    merged = {path: to_dict(dimension) for path, dimension in default.items()} | dict(changes)
    return read_space({path: value for path, value in merged.items() if value is not None}, config)


def applied(config: ExperimentConfig, values: Mapping[str, Any]) -> ExperimentConfig:
    """Return the configuration with these values; the keys are dotted paths of fields.

    Raises:
        ConfigError: a value is not allowed, or the values contradict each other.
    """
    changes: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        target = changes
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    return override(config, changes)


def value_of(config: ExperimentConfig, path: str) -> Any:
    """Return the JSON value of the field at a dotted path."""
    value: Any = to_dict(config)
    for name in path.split("."):
        value = value[name]
    return value


def _dimension(path: str, declared: Any) -> Dimension:
    kind = declared.get("type") if isinstance(declared, dict) else None
    if kind not in _KINDS:
        raise ConfigError(
            f"space.{path} = {json.dumps(declared)}: must be an object whose type is one of {', '.join(_KINDS)}"
        )
    try:
        return checked(_KINDS[kind], declared)
    except ConfigError as error:
        raise ConfigError("\n".join(f"space.{path}: {line}" for line in str(error).splitlines())) from None


def _require_range(low: float, high: float, log: bool) -> None:
    if not low < high:
        raise ConfigError(f"low = {low}, high = {high}: low must be below high")
    if log and low <= 0:
        raise ConfigError(f"low = {low}: must be above 0 with log")


def _require_tunable(path: str, config: ExperimentConfig) -> None:
    for name, reason in _UNTUNABLE.items():
        if path == name or path.startswith(f"{name}."):
            raise ConfigError(f"space.{path}: may not be tuned: {reason}")
    try:
        value = value_of(config, path)
    except (KeyError, TypeError):
        value = {}
    if isinstance(value, dict):  # the path names no field, or a whole section
        tunable = [
            f"{section}.{name}"
            for section, fields in to_dict(config).items()
            if isinstance(fields, dict)
            for name in fields
            if not {section, f"{section}.{name}"} & _UNTUNABLE.keys()
        ]
        raise ConfigError(f"space.{path}: not a field of the configuration; tunable: {', '.join(tunable)}")


def _ends(dimension: Dimension) -> tuple[Any, ...]:
    return dimension.choices if isinstance(dimension, Choices) else (dimension.low, dimension.high)


def contains(dimension: Dimension, value: Any) -> bool:
    """Return whether a JSON value lies in a range or among the choices."""
    if isinstance(dimension, Choices):
        return value in dimension.choices
    if not isinstance(value, int if isinstance(dimension, IntRange) else int | float):
        return False
    if isinstance(dimension, IntRange) and (value - dimension.low) % dimension.step:
        return False
    return bool(dimension.low <= value <= dimension.high)
