"""Every knob of an experiment: typed, range-checked, strict JSON in and out.

A configuration is a tree of frozen dataclasses. It travels as one canonical JSON string (sorted keys, no
spaces), so that equal experiments have equal text and equal hashes wherever they were written.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue
from pydantic.dataclasses import dataclass

from mappo.errors import ConfigError
from mappo.strict_json import STRICT, canonical_json, checked, json_hash, parse_json_object, to_dict

_RUN_NAME = re.compile(r"[a-z0-9][-a-z0-9]{0,62}")

Seed = Annotated[int, Field(ge=0, lt=2**32)]


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("every seed may appear once")
    return seeds


@dataclass(frozen=True, config=STRICT)
class EnvironmentConfig:
    """Which task, and how long an episode may last."""

    scenario: Annotated[
        str,
        Field(
            min_length=1,
            description="a scenario by name, such as navigation or swarm, or your own as package.module:Class",
        ),
    ] = "navigation"
    scenario_kwargs: Annotated[
        dict[str, JsonValue], Field(description="keyword arguments of the scenario, as a JSON object")
    ] = dataclasses.field(default_factory=dict)
    max_episode_frames: Annotated[
        int,
        Field(ge=1, le=1_000_000, description="time limit of an episode, in frames; reaching it is truncation"),
    ] = 100
    actions: Annotated[
        Literal["continuous", "discrete", "multi-discrete"],
        Field(
            description="continuous vectors, one choice among all combinations, or one choice for each component; "
            "communication is part of the action"
        ),
    ] = "continuous"


@dataclass(frozen=True, config=STRICT)
class NetworksConfig:
    """The actor and the centralised critic: separate multi-layer perceptrons of the same size."""

    hidden_sizes: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65536)], ...],
        Field(min_length=1, description="units of each hidden layer, of the actor and of the critic"),
    ] = (256, 256)
    activation: Annotated[Literal["tanh", "relu"], Field(description="activation after each hidden layer")] = (
        "tanh"
    )
    share_policy: Annotated[
        bool, Field(description="one actor for all agents (true), or one of its own for each (false)")
    ] = True
    normalise_observations: Annotated[
        bool, Field(description="standardise observations by their running mean and deviation in training")
    ] = False
    normalise_values: Annotated[
        bool,
        Field(
            description="the critic predicts values standardised by the running mean and deviation of value "
            "targets, as in the MAPPO paper"
        ),
    ] = False


@dataclass(frozen=True, config=STRICT)
class LearnerConfig:
    """How a batch improves the policy: generalised advantages, then epochs of clipped minibatch updates."""

    discount: Annotated[
        float, Field(ge=0, le=1, description="gamma: weight of the next frame's value, per frame")
    ] = 0.99
    gae_lambda: Annotated[float, Field(ge=0, le=1, description="lambda of generalised advantage estimation")] = 0.9
    clip_epsilon: Annotated[
        float, Field(gt=0, lt=1, description="the probability ratio is clipped to 1 - epsilon .. 1 + epsilon")
    ] = 0.2
    epochs: Annotated[int, Field(ge=1, le=1000, description="passes over each batch")] = 10
    minibatch_frames: Annotated[
        int, Field(ge=1, description="frames of one optimiser step; at most one batch")
    ] = 500
    learning_rate: Annotated[float, Field(gt=0, le=1, description="step size of Adam")] = 1.5e-3
    learning_rate_schedule: Annotated[
        Literal["constant", "linear"],
        Field(description="constant, or falling linearly from learning_rate towards 0 over the run"),
    ] = "linear"
    entropy_coefficient: Annotated[
        float, Field(ge=0, description="weight of the entropy bonus; 0 switches it off")
    ] = 0.0
    value_coefficient: Annotated[float, Field(gt=0, description="weight of the critic's loss")] = 1.0
    value_loss: Annotated[
        Literal["l2", "smooth_l1"], Field(description="distance between value and value target")
    ] = "l2"
    value_clip_epsilon: Annotated[
        float,
        Field(
            ge=0,
            description="a new value may improve the critic's loss only within this distance of the old one, "
            "in the units that the critic predicts; 0 switches it off",
        ),
    ] = 0.0
    target_kl: Annotated[
        float,
        Field(
            ge=0,
            description="an epoch whose mean approximate KL divergence is above this, in nats an agent action, "
            "is the last one on its batch; 0 switches it off",
        ),
    ] = 0.0
    max_gradient_norm: Annotated[
        float, Field(gt=0, description="limit of the gradient norm, of the actor and of the critic each")
    ] = 5.0
    advantage_normalisation: Annotated[
        Literal["none", "minibatch", "batch", "agent"],
        Field(
            description="what advantages are standardised over: none (left as they are), each minibatch, "
            "the whole batch, or each agent's share of the batch"
        ),
    ] = "minibatch"
    update: Annotated[
        Literal["plain", "fast", "mixed"],
        Field(
            description="how the gradients of a minibatch are computed: operation by operation (plain), compiled "
            "(fast), which differs by rounding and pays in longer runs, or compiled with matrices multiplied in "
            "bfloat16 (mixed precision), which rounds more and pays where the CPU or GPU multiplies these faster"
        ),
    ] = "plain"


@dataclass(frozen=True, config=STRICT)
class CollectionConfig:
    """How many frames are collected, and in which shape."""

    num_envs: Annotated[int, Field(ge=1, le=1_000_000, description="environments simulated in parallel")] = 60
    rollout_frames: Annotated[
        int,
        Field(ge=1, le=1_000_000, description="frames of each environment in one batch, which continues episodes"),
    ] = 100
    total_frames: Annotated[
        int,
        Field(ge=1, le=10**12, description="frames to train for; training stops after the batch that reaches it"),
    ] = 84_000
    processes: Annotated[
        int,
        Field(
            ge=1,
            le=256,
            description="processes that simulate on the CPU, each an equal share of num_envs and of threads; "
            "1 is training's own",
        ),
    ] = 1
    simulation: Annotated[
        Literal["plain", "fast"],
        Field(
            description="how training's environments are simulated: by VMAS step by step (plain), or by its step "
            "compiled (fast); where a scenario cannot be compiled faithfully, training says why and is plain"
        ),
    ] = "plain"

    def __post_init__(self) -> None:
        if self.num_envs % self.processes:
            raise ConfigError(
                f"collection.processes = {self.processes}: collection.num_envs = {self.num_envs} cannot be shared "
                "equally; choose a divisor of it"
            )

    @property
    def frames_per_batch(self) -> int:
        """Frames that one iteration collects: num_envs x rollout_frames."""
        return self.num_envs * self.rollout_frames

    @property
    def num_iterations(self) -> int:
        """Iterations of a whole run: total_frames in batches, rounded up."""
        return -(-self.total_frames // self.frames_per_batch)


Seeds = Annotated[
    tuple[Seed, ...],
    Field(min_length=1, description="each starts episodes_per_seed episodes"),
    AfterValidator(_different),
]


@dataclass(frozen=True, config=STRICT)
class SelectionConfig:
    """Evaluation during training, by which the best checkpoint is chosen; its random streams are its own."""

    interval_iterations: Annotated[
        int,
        Field(
            ge=0, description="iterations between evaluations; the last one is evaluated too; 0 for no evaluation"
        ),
    ] = 5
    seeds: Seeds = (1,)
    episodes_per_seed: Annotated[
        int, Field(ge=1, le=1_000_000, description="episodes of each seed, simulated in parallel")
    ] = 64


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """Held-out episodes: their random streams are never those of training or selection, whatever the seeds."""

    seeds: Seeds = (1, 2, 3, 4)
    episodes_per_seed: Annotated[
        int, Field(ge=1, le=1_000_000, description="episodes of each seed, simulated in parallel")
    ] = 64
    deterministic: Annotated[
        bool,
        Field(
            description="act by the distribution's squashed mean or most likely choice (true) or by sampling from "
            "it (false); also where selection evaluates"
        ),
    ] = True


@dataclass(frozen=True, config=STRICT)
class ExperimentConfig:
    """One experiment, complete."""

    environment: EnvironmentConfig = dataclasses.field(default_factory=EnvironmentConfig)
    networks: NetworksConfig = dataclasses.field(default_factory=NetworksConfig)
    learner: LearnerConfig = dataclasses.field(default_factory=LearnerConfig)
    collection: CollectionConfig = dataclasses.field(default_factory=CollectionConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    seed: Annotated[Seed, Field(description="seed of training")] = 0
    threads: Annotated[
        int,
        Field(
            ge=0,
            le=1024,
            description="CPU threads of torch, part of what makes a run repeatable; never more than this "
            "process's CPU limit allows, and 0 for just as many",
        ),
    ] = 1
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="auto takes a GPU when there is one; cuda fails at once when there is none"),
    ] = "auto"

    def __post_init__(self) -> None:
        batch = self.collection.frames_per_batch
        if self.learner.minibatch_frames > batch:
            raise ConfigError(
                f"learner.minibatch_frames = {self.learner.minibatch_frames}: a batch has only {batch} frames "
                "(collection.num_envs x collection.rollout_frames)"
            )


def to_json(config: ExperimentConfig) -> str:
    """The configuration as canonical JSON: one line, sorted keys, every field present."""
    return canonical_json(to_dict(config))


def from_json(text: str) -> ExperimentConfig:
    """Read a configuration; fields that the text leaves out keep their defaults.

    Raises:
        ConfigError: not JSON, a duplicate or unknown key, a wrong type, a value out of range, or values that
            contradict each other. Every problem found is named with field, value and bound.
    """
    return from_dict(parse_json_object(text))


def from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """As `from_json`, from the JSON object itself."""
    return checked(ExperimentConfig, values)


def override(config: ExperimentConfig, *changes: Mapping[str, Any]) -> ExperimentConfig:
    """The configuration with some fields changed, by one object of changes after the other.

    Changes are nested like the configuration's JSON; only their result is checked. `scenario_kwargs` is one
    field, replaced as a whole. It belongs to its scenario: changing `environment.scenario` alone empties it.

    Raises:
        ConfigError: as `from_json`.
    """
    values = to_dict(config)
    for change in changes:
        old = values["environment"]
        values = merged(values, change)
        new = values["environment"]
        if not isinstance(new, dict):
            break  # not even an object: the check below says so
        if new["scenario"] != old["scenario"] and "scenario_kwargs" not in change["environment"]:
            new["scenario_kwargs"] = {}
    return from_dict(values)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with some fields changed, those of inner objects one by one; `scenario_kwargs` as a whole."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping) and key != "scenario_kwargs":
            value = merged(old, value)
        result[key] = value
    return result


def differences(one: ExperimentConfig, other: ExperimentConfig) -> dict[str, str]:
    """Fields that differ, by dotted name, each as `value -> other value` in JSON."""
    before, after = _fields(to_dict(one)), _fields(to_dict(other))
    return {
        name: f"{json.dumps(before[name])} -> {json.dumps(after[name])}"
        for name in before
        if before[name] != after[name]
    }


def config_hash(config: ExperimentConfig) -> str:
    """SHA-256 of the canonical JSON, in hexadecimal; equal experiments have equal hashes."""
    return json_hash(to_dict(config))


def require_run_name(name: str, kind: str = "run") -> str:
    """Return the name, if it can be that of a run or of another kind of thing.

    Raises:
        ConfigError: it cannot.
    """
    if not _RUN_NAME.fullmatch(name):
        length = f" (it has {len(name)})" if len(name) > 63 else ""
        raise ConfigError(
            f"{kind} {name!r}: a name has 1 to 63 lower-case letters, digits and hyphens{length}, and begins with "
            "no hyphen"
        )
    return name


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted name; `scenario_kwargs` and lists are values."""
    sections = {name: section for name, section in values.items() if isinstance(section, dict)}
    inner = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return inner | {name: value for name, value in values.items() if name not in sections}
