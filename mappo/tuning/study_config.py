"""The settings of a study: typed, range-checked, strict JSON in and out.

They travel as one JSON object from the flags to every stage, as the configuration of an experiment does. A new
setting needs a field here and the line that uses it: flags, help texts, defaults and checks follow from the field.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue
from pydantic.dataclasses import dataclass

from mappo.config import Seed, Seeds, require_run_name
from mappo.errors import ConfigError
from mappo.evaluation.constraints import Constraints
from mappo.promotion.gate import Gate
from mappo.strict_json import STRICT, canonical_json, checked, parse_json_object, to_dict


@dataclass(frozen=True, config=STRICT)
class TuningConfig:
    """The way in which trials are judged, pruned and looked after."""

    training_seeds: Annotated[
        Seeds, Field(description="seeds that each trial trains from; its value is the mean over them")
    ] = (0,)
    evaluation_seeds: Annotated[
        Seeds, Field(description="tuning seeds: seeds of the episodes that judge trials; nothing else uses them")
    ] = (1, 2)
    episodes_per_seed: Annotated[int, Field(ge=1, le=100_000, description="episodes of each tuning seed")] = 64
    pruner: Annotated[
        Literal["median", "halving", "hyperband", "wilcoxon", "none"],
        Field(
            description="rule that ends a trial early: median (below the median of earlier trials at the same "
            "frame), halving or hyperband (successive halving by frames), wilcoxon (worse than the best trial "
            "over training seeds), or none"
        ),
    ] = "median"
    sampler_seed: Annotated[Seed, Field(description="seed of Optuna's TPE sampler")] = 0
    grace_seconds: Annotated[
        int, Field(ge=2, le=86_400, description="seconds without a heartbeat after which a worker loses its trial")
    ] = 90
    trial_hours: Annotated[
        float,
        Field(
            gt=0,
            lt=10_000,
            description="hours that a worker may spend on one trial; then the trial fails, even if its training "
            "hangs",
        ),
    ] = 12.0
    max_losses: Annotated[
        int, Field(ge=0, le=1000, description="lost workers that a trial survives; one more, and the trial fails")
    ] = 3
    constraints: Constraints = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Require a pruner that fits the constraints, and enough training seeds for the Wilcoxon pruner."""
        if self.constraints and self.pruner in ("halving", "hyperband"):
            raise ConfigError(
                f"pruner = {self.pruner}: keeps the trials with the highest returns, also if they break "
                "constraints, and ends the others; with constraints, take median, wilcoxon or none"
            )
        if self.pruner == "wilcoxon" and len(self.training_seeds) < 4:
            raise ConfigError(
                f"pruner = wilcoxon: compares over training seeds, of which there are {len(self.training_seeds)}; "
                "give at least 4 in training_seeds, or another pruner"
            )


@dataclass(frozen=True, config=STRICT)
class BudgetConfig:
    """The trials that a session requests, and the time in which they may start."""

    num_trials: Annotated[int, Field(ge=1, description="trials of the study")] = 20
    hours: Annotated[
        float, Field(ge=0, lt=10_000, description="hours after which no trial starts; 0 sets no limit")
    ] = 0.0


@dataclass(frozen=True, config=STRICT)
class RetrainingConfig:
    """The training of the best configuration and of the default after the trials."""

    num_seeds: Annotated[
        int,
        Field(
            ge=2,
            description="fresh seeds from which the best configuration and the default are each trained again; "
            "one alone would have no interval",
        ),
    ] = 3


@dataclass(frozen=True, config=STRICT)
class StudyConfig:
    """The settings of a study, complete. `space` changes the default search space: see `extended_space`."""

    space: Annotated[
        dict[str, JsonValue],
        Field(
            description="changes to the search space, as a JSON object or a file with one, such as "
            '{"learner.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": true}}; null removes a '
            "field; without changes, the learner's clip_epsilon, gae_lambda and epochs are tuned"
        ),
    ] = dataclasses.field(default_factory=dict)
    tuning: TuningConfig = dataclasses.field(default_factory=TuningConfig)
    budget: BudgetConfig = dataclasses.field(default_factory=BudgetConfig)
    retraining: RetrainingConfig = dataclasses.field(default_factory=RetrainingConfig)
    gate: Gate = dataclasses.field(default_factory=Gate)


@dataclass(frozen=True, config=STRICT)
class Ending:
    """The settings of what follows the trials. `champions`: the location to promote to; empty for none."""

    retraining: RetrainingConfig = dataclasses.field(default_factory=RetrainingConfig)
    gate: Gate = dataclasses.field(default_factory=Gate)
    champions: str = ""


def changed_ending(ending: Ending, changes: Mapping[str, Any]) -> Ending:
    """Return the settings with the changes of some fields, by section."""
    values = to_dict(ending)
    for name in ("retraining", "gate"):
        values[name] |= changes.get(name, {})
    values["champions"] = changes.get("champions", ending.champions)
    return checked(Ending, values)


def study_config_from_json(text: str) -> StudyConfig:
    """Read a study's settings; fields that the text leaves out keep their defaults.

    Raises:
        ConfigError: the text is not JSON, or a key or value is not allowed; the message names the field.
    """
    try:
        return checked(StudyConfig, parse_json_object(text))
    except ConfigError as error:
        raise ConfigError("\n".join(f"study_config: {line}" for line in str(error).splitlines())) from None


def study_config_to_json(settings: StudyConfig) -> str:
    """Return a study's settings as canonical JSON: one line, sorted keys, every field present."""
    return canonical_json(to_dict(settings))


def study_name(series: str, edition: str) -> str:
    """Return the name of a study: the series itself, or one edition of it, as a schedule makes them.

    Raises:
        ConfigError: the name is not allowed.
    """
    name = f"{series}-{edition}" if edition else series
    return require_run_name(name, "study")
