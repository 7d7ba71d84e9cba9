"""What is tuned, in which ranges, and how trials are judged; JSON in and out."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue
from pydantic.dataclasses import dataclass

from mappo.config import ExperimentConfig, Seed, Seeds, override
from mappo.errors import ConfigError
from mappo.strict_json import checked, to_dict

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_UNTUNABLE = {  # what a study may not change, and why
    "environment": "another task",
    "selection": "what trials are judged by",
    "evaluation": "what trials are judged by",
    "collection.total_frames": "more training, not better training",
    "seed": "chance",
    "threads": "part of what makes a run repeatable",
    "device": "part of what makes a run repeatable",
}


@dataclass(frozen=True, config=_STRICT)
class FloatRange:
    """Real numbers, both ends included; with log, drawn evenly by order of magnitude."""

    type: Literal["float"]
    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        """The ends must be in order."""
        _require_range(self.low, self.high, self.log)


@dataclass(frozen=True, config=_STRICT)
class IntRange:
    """Whole numbers, both ends included; with log, drawn evenly by order of magnitude."""

    type: Literal["int"]
    low: int
    high: int
    log: bool = False
    step: Annotated[int, Field(ge=1)] = 1

    def __post_init__(self) -> None:
        """The ends must be in order, and an end of the steps."""
        _require_range(self.low, self.high, self.log)
        if self.log and self.step > 1:
            raise ConfigError("log and step exclude each other")
        if (self.high - self.low) % self.step:
            raise ConfigError(f"high = {self.high}: not reached from low = {self.low} in steps of {self.step}")


@dataclass(frozen=True, config=_STRICT)
class Choices:
    """Some values, without an order."""

    type: Literal["categorical"]
    choices: Annotated[tuple[JsonValue, ...], Field(min_length=2)]

    def __post_init__(self) -> None:
        """Each may be there once."""
        if len({json.dumps(choice) for choice in self.choices}) < len(self.choices):
            raise ConfigError("choices: every one may appear once")


Dimension = FloatRange | IntRange | Choices
Space = dict[str, Dimension]  # by the dotted path of the field
_KINDS: dict[str, type[Dimension]] = {"float": FloatRange, "int": IntRange, "categorical": Choices}


@dataclass(frozen=True, config=_STRICT)
class TuningConfig:
    """How trials are judged, pruned and looked after."""

    training_seeds: Annotated[
        Seeds, Field(description="seeds that each trial trains from; its value is the mean over them")
    ] = (0,)
    evaluation_seeds: Annotated[
        Seeds, Field(description="tuning seeds: of the episodes that trials are judged by; used for nothing else")
    ] = (1, 2)
    episodes_per_seed: Annotated[int, Field(ge=1, le=100_000, description="episodes of each tuning seed")] = 64
    pruner: Annotated[
        Literal["median", "halving", "hyperband", "wilcoxon", "none"],
        Field(
            description="what ends a trial early: below the median of earlier ones at the same frame; successive "
            "halving or hyperband by frames; wilcoxon: worse than the best over training seeds; or nothing"
        ),
    ] = "median"
    sampler_seed: Annotated[Seed, Field(description="seed of the sampler, which is Optuna's TPE")] = 0
    grace_seconds: Annotated[
        int, Field(ge=2, le=86_400, description="a worker that was silent for so long has lost its trial")
    ] = 90
    max_losses: Annotated[
        int, Field(ge=0, le=1000, description="a trial fails when it lost more workers than this")
    ] = 3

    def __post_init__(self) -> None:
        """Wilcoxon compares over training seeds."""
        if self.pruner == "wilcoxon" and len(self.training_seeds) < 4:
            raise ConfigError(
                f"pruner = wilcoxon: compares over training seeds, of which there are {len(self.training_seeds)}; "
                "it takes at least 4 to tell anything"
            )


def read_space(values: Mapping[str, Any], config: ExperimentConfig) -> Space:
    """A search space, from a JSON object such as {"learner.epochs": {"type": "int", "low": 2, "high": 30}}.

    Raises:
        ConfigError: a field that is not there or may not be tuned, a range that the configuration's bounds do not
            allow, or one that leaves out the configuration's own value, which is the first trial.
    """
    if not values:
        raise ConfigError("space: names no field")
    space: Space = {}
    for path, declared in values.items():
        _require_tunable(path, config)
        dimension = space[path] = _dimension(path, declared)
        for value in _ends(dimension):
            try:
                applied(config, {path: value})
            except ConfigError as error:
                raise ConfigError(f"space: {error}") from None
        if not contains(dimension, own := value_of(config, path)):
            raise ConfigError(
                f"space.{path}: leaves out {json.dumps(own)}, the configuration's own value, which is the first "
                "trial: widen the range, or change the configuration"
            )
    return space


def default_space(config: ExperimentConfig) -> Space:
    """clip_epsilon, gae_lambda and epochs, in ranges that hold the configuration's own values."""
    learner = config.learner
    epsilon, lambda_, epochs = learner.clip_epsilon, learner.gae_lambda, learner.epochs
    return {
        "learner.clip_epsilon": FloatRange("float", min(0.05, epsilon), max(0.4, epsilon)),
        "learner.gae_lambda": FloatRange("float", min(0.8, lambda_), max(1.0, lambda_)),
        "learner.epochs": IntRange("int", min(2, epochs), max(30, epochs), log=True),
    }


def extended_space(changes: Mapping[str, Any], config: ExperimentConfig) -> Space:
    """The default space with what is given in JSON added or in its place; null leaves a field out.

    Raises:
        ConfigError: as `read_space`.
    """
    default = default_space(config)
    for path, value in changes.items():
        if value is None and path not in default:
            raise ConfigError(
                f"space: {path} = null: leaves out one of {', '.join(default)}, and this is none of them"
            )
    given = {path: to_dict(dimension) for path, dimension in default.items()} | dict(changes)
    return read_space({path: value for path, value in given.items() if value is not None}, config)


def applied(config: ExperimentConfig, values: Mapping[str, Any]) -> ExperimentConfig:
    """The configuration with these values, by dotted path.

    Raises:
        ConfigError: one is not allowed, or they contradict each other.
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
    """A field's value as JSON, by its dotted path."""
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
        own = value_of(config, path)
    except (KeyError, TypeError):
        own = {}
    if isinstance(own, dict):  # nothing, or a whole section
        known = [
            f"{section}.{name}"
            for section, fields in to_dict(config).items()
            if isinstance(fields, dict)
            for name in fields
            if not {section, f"{section}.{name}"} & _UNTUNABLE.keys()
        ]
        raise ConfigError(f"space.{path}: not a field of the configuration; tunable: {', '.join(known)}")


def _ends(dimension: Dimension) -> tuple[Any, ...]:
    return dimension.choices if isinstance(dimension, Choices) else (dimension.low, dimension.high)


def contains(dimension: Dimension, value: Any) -> bool:
    """Whether a value, as in JSON, is in a range or among choices."""
    if isinstance(dimension, Choices):
        return value in dimension.choices
    if not isinstance(value, int if isinstance(dimension, IntRange) else int | float):
        return False
    if isinstance(dimension, IntRange) and (value - dimension.low) % dimension.step:
        return False
    return bool(dimension.low <= value <= dimension.high)
