"""The settings of an experiment: typed, range-checked, read and written as strict JSON.

A configuration is a tree of frozen dataclasses. Its text is canonical JSON (sorted keys, no spaces), so that equal
experiments have equal text and equal hashes, whoever wrote them.

This file is long because it declares every field with its range and its help text.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, JsonValue
from pydantic.dataclasses import dataclass

from mappo.errors import ConfigError
from mappo.strict_json import STRICT, canonical_json, checked, json_hash, parse_json_object, to_dict

MAX_GROUPS = 8  # of agents in one task, since their names become labels of metrics
MAX_GROUP_NAME = 32
GroupName = Annotated[
    str, Field(pattern=rf"^[A-Za-z0-9][A-Za-z0-9_-]{{0,{MAX_GROUP_NAME - 1}}}$")
]  # also a part of the names of tensors and columns

_GROUPS: dict[str, Any] = {"groups": {}, "return_groups": []}  # what another scenario begins with
_WHOLE = ("scenario_kwargs", "groups")  # objects that are one field each
_RUN_NAME = re.compile(r"[a-z0-9][-a-z0-9]{0,62}")

Seed = Annotated[int, Field(ge=0, lt=2**32)]


_Item = TypeVar("_Item", int, str)


def _require_distinct(items: tuple[_Item, ...]) -> tuple[_Item, ...]:
    if len(set(items)) < len(items):
        raise ValueError("every seed or name may appear only once")
    return items


@dataclass(frozen=True, config=STRICT)
class EnvironmentConfig:
    """The task: its scenario, its actions, and the time limit of an episode."""

    scenario: Annotated[
        str,
        Field(
            min_length=1,
            description="name of the scenario, such as navigation or swarm; package.module:Class for your own",
        ),
    ] = "navigation"
    scenario_kwargs: Annotated[
        dict[str, JsonValue], Field(description="keyword arguments of the scenario, as a JSON object")
    ] = dataclasses.field(default_factory=dict)
    max_episode_frames: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="time limit of an episode, in frames; an episode that reaches it is truncated",
        ),
    ] = 100
    actions: Annotated[
        Literal["continuous", "discrete", "multi-discrete"],
        Field(
            description="action space: a vector of numbers (continuous), one choice among all combinations "
            "(discrete), or one choice for each component (multi-discrete); communication is part of the action"
        ),
    ] = "continuous"
    groups: Annotated[
        dict[GroupName, Annotated[tuple[str, ...], Field(min_length=1)]],
        Field(
            max_length=MAX_GROUPS,
            description="names of the agents of each group, as a JSON object; a group has its own policy and "
            "critic; {} finds the groups: agents whose observations and actions all have the same shapes are one "
            "group, others are grouped by name, as adversary_0 and adversary_1, and by shapes",
        ),
    ] = dataclasses.field(default_factory=dict)
    return_groups: Annotated[
        tuple[GroupName, ...],
        Field(
            max_length=MAX_GROUPS,
            description="names of the groups whose agents' mean return is the return of an episode, by which "
            "checkpoints, trials and candidates are compared; empty means all; if teams are opponents, name one",
        ),
        AfterValidator(_require_distinct),
    ] = ()


@dataclass(frozen=True, config=STRICT)
class NetworksConfig:
    """The actor and the critic: two separate networks with equal hidden layers, with or without a memory."""

    hidden_sizes: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65536)], ...],
        Field(min_length=1, description="units of each hidden layer, the same in the actor and the critic"),
    ] = (256, 256)
    activation: Annotated[
        Literal["tanh", "relu"], Field(description="activation function after each hidden layer")
    ] = "tanh"
    share_policy: Annotated[
        bool,
        Field(
            description="use one actor for all agents (true), or one actor for each agent (false); own critics "
            "are shared alike"
        ),
    ] = True
    critic: Annotated[
        Literal["central", "own"],
        Field(
            description="observations that the critic sees: those of all agents (central, MAPPO), or of the agent "
            "alone (own, IPPO)"
        ),
    ] = "central"
    normalise_observations: Annotated[
        bool, Field(description="standardise observations by the running mean and standard deviation of training")
    ] = False
    normalise_values: Annotated[
        bool,
        Field(
            description="let the critic predict values that are standardised by the running mean and standard "
            "deviation of the value targets, as in the MAPPO paper"
        ),
    ] = False
    memory: Annotated[
        Literal["none", "gru"],
        Field(
            description="memory of the actor and the critic within an episode: none, or a gated recurrent unit "
            "(gru), for tasks in which an observation does not tell all that matters"
        ),
    ] = "none"
    memory_size: Annotated[
        int, Field(ge=1, le=65536, description="units of the memory, which are numbers between -1 and 1")
    ] = 32

    @property
    def has_memory(self) -> bool:
        """Return whether the networks remember earlier frames of an episode."""
        return self.memory != "none"

    @property
    def algorithm(self) -> str:
        """The name of the learning algorithm, which depends on what the critic sees and on the memory."""
        name = "independent proximal policy optimisation (IPPO)"
        if self.critic == "central":
            name = "multi-agent proximal policy optimisation (MAPPO)"
        return f"{name} with recurrent networks" if self.has_memory else name


@dataclass(frozen=True, config=STRICT)
class LearnerConfig:
    """The learning algorithm: generalised advantages, then epochs of clipped minibatch updates on each batch."""

    discount: Annotated[
        float, Field(ge=0, le=1, description="discount factor gamma: weight of the next frame's value")
    ] = 0.99
    gae_lambda: Annotated[float, Field(ge=0, le=1, description="lambda of generalised advantage estimation")] = 0.9
    clip_epsilon: Annotated[
        float,
        Field(
            gt=0,
            lt=1,
            description="clip range of PPO: the probability ratio is clipped to 1 - epsilon .. 1 + epsilon",
        ),
    ] = 0.2
    epochs: Annotated[int, Field(ge=1, le=1000, description="passes over each batch")] = 10
    minibatch_frames: Annotated[
        int, Field(ge=1, description="frames in the minibatch of one optimiser step; at most those of one batch")
    ] = 500
    chunk_frames: Annotated[
        int,
        Field(
            ge=1,
            le=100,
            description="frames in a row through which networks with a memory are trained; minibatches hold whole "
            "chunks; without a memory, this has no effect",
        ),
    ] = 10
    learning_rate: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="learning rate of Adam; with the linear schedule, the rate at the start of the run",
        ),
    ] = 1.5e-3
    learning_rate_schedule: Annotated[
        Literal["constant", "linear"],
        Field(description="keep the learning rate constant, or lower it linearly towards 0 over the run"),
    ] = "linear"
    entropy_coefficient: Annotated[
        float, Field(ge=0, description="weight of the entropy bonus; 0 disables the bonus")
    ] = 0.0
    value_coefficient: Annotated[float, Field(gt=0, description="weight of the critic's loss")] = 1.0
    value_loss: Annotated[
        Literal["l2", "smooth_l1"], Field(description="error function between a predicted value and its target")
    ] = "l2"
    value_clip_epsilon: Annotated[
        float,
        Field(
            ge=0,
            description="clip range of the critic's loss: a new value lowers the loss only within this distance "
            "of the old value, in the units that the critic predicts; 0 disables clipping",
        ),
    ] = 0.0
    target_kl: Annotated[
        float,
        Field(
            ge=0,
            description="limit of the mean approximate KL divergence of an epoch, in nats per agent action; an "
            "epoch above the limit is the last epoch on its batch; 0 disables the limit",
        ),
    ] = 0.0
    max_gradient_norm: Annotated[
        float,
        Field(gt=0, description="limit of the gradient norm, applied to the actor and the critic separately"),
    ] = 5.0
    advantage_normalisation: Annotated[
        Literal["none", "minibatch", "batch", "agent"],
        Field(
            description="set over which advantages are standardised: none (they stay unchanged), each minibatch, "
            "the whole batch, or each agent's share of the batch"
        ),
    ] = "minibatch"
    update: Annotated[
        Literal["auto", "plain", "fast", "mixed"],
        Field(
            description="computation of the gradients: plain runs operation by operation; fast is compiled, "
            "and differs only by rounding; mixed is compiled and multiplies matrices in bfloat16 (mixed "
            "precision), which rounds more and is faster on some CPUs and GPUs; auto chooses at the start of a "
            "run, by the run's length and the kind of machine"
        ),
    ] = "auto"


@dataclass(frozen=True, config=STRICT)
class CollectionConfig:
    """The collection of frames: how many, in batches of which shape, by which simulator."""

    num_envs: Annotated[int, Field(ge=1, le=1_000_000, description="environments simulated in parallel")] = 60
    rollout_frames: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="frames of each environment in one batch; an episode continues in the next batch",
        ),
    ] = 100
    total_frames: Annotated[
        int,
        Field(
            ge=1,
            le=10**12,
            description="frames of the whole training; training stops after the batch that reaches this number",
        ),
    ] = 84_000
    processes: Annotated[
        int,
        Field(
            ge=1,
            le=256,
            description="number of processes that simulate on the CPU; each gets an equal share of num_envs and "
            "threads; 1 simulates in the training process itself",
        ),
    ] = 1
    simulation: Annotated[
        Literal["auto", "plain", "fast"],
        Field(
            description="simulation of the training environments: VMAS step by step (plain), or the compiled step "
            "of VMAS (fast); auto chooses at the start of a run, by the run's length and the kind of machine; if "
            "a scenario cannot be compiled faithfully, training logs the reason and uses plain"
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        if self.num_envs % self.processes:
            raise ConfigError(
                f"collection.processes = {self.processes}: collection.num_envs = {self.num_envs} cannot be shared "
                f"equally among the processes; choose a divisor of {self.num_envs}"
            )

    @property
    def frames_per_batch(self) -> int:
        """The number of frames that one iteration collects: num_envs x rollout_frames."""
        return self.num_envs * self.rollout_frames

    @property
    def num_iterations(self) -> int:
        """The number of iterations of a whole run: total_frames in batches, rounded up."""
        return -(-self.total_frames // self.frames_per_batch)

    @property
    def final_frames(self) -> int:
        """The number of frames at the end of a whole run: total_frames, rounded up to whole batches."""
        return self.num_iterations * self.frames_per_batch


Seeds = Annotated[
    tuple[Seed, ...],
    Field(min_length=1, description="random seeds; each seed starts episodes_per_seed episodes"),
    AfterValidator(_require_distinct),
]


@dataclass(frozen=True, config=STRICT)
class SelectionConfig:
    """The evaluations during training, which choose the best checkpoint; they have random streams of their own."""

    interval_iterations: Annotated[
        int,
        Field(
            ge=0,
            description="iterations between two evaluations; the last iteration is always evaluated; 0 disables "
            "evaluation",
        ),
    ] = 5
    seeds: Seeds = (1,)
    episodes_per_seed: Annotated[
        int, Field(ge=1, le=1_000_000, description="number of episodes for each seed, simulated in parallel")
    ] = 64
    simulation: Annotated[
        Literal["auto", "plain"],
        Field(
            description="simulation of the evaluations during training: VMAS itself (plain), which measures what "
            "info() returns; auto takes the compiled step of VMAS, which measures nothing, in long runs, on GPUs "
            "and in studies"
        ),
    ] = "auto"


@dataclass(frozen=True, config=STRICT)
class EvaluationConfig:
    """The held-out episodes: their random streams differ from those of training and selection for all seeds."""

    seeds: Seeds = (1, 2, 3, 4)
    episodes_per_seed: Annotated[
        int, Field(ge=1, le=1_000_000, description="number of episodes for each seed, simulated in parallel")
    ] = 64
    deterministic: Annotated[
        bool,
        Field(
            description="take the distribution's squashed mean or most likely action (true), or sample an action "
            "(false); the evaluations during training (selection) do the same"
        ),
    ] = True


@dataclass(frozen=True, config=STRICT)
class ExperimentConfig:
    """The complete configuration of one experiment."""

    environment: EnvironmentConfig = dataclasses.field(default_factory=EnvironmentConfig)
    networks: NetworksConfig = dataclasses.field(default_factory=NetworksConfig)
    learner: LearnerConfig = dataclasses.field(default_factory=LearnerConfig)
    collection: CollectionConfig = dataclasses.field(default_factory=CollectionConfig)
    selection: SelectionConfig = dataclasses.field(default_factory=SelectionConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    seed: Annotated[Seed, Field(description="random seed of training")] = 0
    threads: Annotated[
        int,
        Field(
            ge=0,
            le=1024,
            description="number of CPU threads of torch, at most this process's CPU limit; 0 uses that limit; "
            "results are bit-identical only with the same number",
        ),
    ] = 1
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(
            description="device to compute on; auto uses a GPU if there is one; cuda fails at once without a GPU"
        ),
    ] = "auto"

    def __post_init__(self) -> None:
        batch = self.collection.frames_per_batch
        if self.learner.minibatch_frames > batch:
            raise ConfigError(
                f"learner.minibatch_frames = {self.learner.minibatch_frames}: a batch has only {batch} frames "
                f"(collection.num_envs x collection.rollout_frames); choose at most {batch}"
            )
        if self.networks.has_memory:
            self._require_whole_chunks()

    def _require_whole_chunks(self) -> None:
        chunk = self.learner.chunk_frames
        for name, frames in (
            ("collection.rollout_frames", self.collection.rollout_frames),
            ("learner.minibatch_frames", self.learner.minibatch_frames),
        ):
            if frames % chunk:
                raise ConfigError(
                    f"{name} = {frames}: not a multiple of learner.chunk_frames = {chunk}; networks with a memory "
                    "are trained on whole chunks: choose a multiple, or another length of chunks"
                )


def to_json(config: ExperimentConfig) -> str:
    """Return the configuration as canonical JSON: one line, sorted keys, every field present."""
    return canonical_json(to_dict(config))


def from_json(text: str) -> ExperimentConfig:
    """Read a configuration; fields that the text leaves out keep their defaults.

    Raises:
        ConfigError: the text is not JSON, a key is unknown or appears twice, a value has the wrong type or is out
            of range, or values contradict each other. The message names every problem with field, value and bound.
    """
    return from_dict(parse_json_object(text))


def from_dict(values: Mapping[str, Any]) -> ExperimentConfig:
    """Return the configuration that a parsed JSON object describes; the rules of `from_json` apply.

    Raises:
        ConfigError: a key or a value is not allowed; the message names every problem.
    """
    return checked(ExperimentConfig, values)


def override(config: ExperimentConfig, *changes: Mapping[str, Any]) -> ExperimentConfig:
    """Return the configuration with some fields changed; a later object of changes overrides an earlier one.

    Changes are nested like the configuration's JSON; only the result of all changes is checked. An argument in
    `scenario_kwargs` changes this argument alone; null removes an argument that the configuration has. `groups` is
    replaced as a whole. But the arguments, `groups` and `return_groups` belong to their scenario: a change of
    `environment.scenario` drops all that the previous one had.

    Raises:
        ConfigError: a key or a value of the result is not allowed; the message names every problem.
    """
    values = to_dict(config)
    for change in changes:
        previous = values["environment"]
        values = merged(values, change)
        if not isinstance(values["environment"], dict):
            break  # from_dict below raises the error: the environment is not an object
        environment = change.get("environment", {})
        values["environment"]["scenario_kwargs"] = _scenario_arguments(previous, environment)
        if values["environment"]["scenario"] != previous["scenario"]:
            left = {name: empty for name, empty in _GROUPS.items() if name not in environment}
            values["environment"].update(left)
    return from_dict(values)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with some fields changed; inner objects merge, those of `_WHOLE` are replaced."""
    result = dict(base)
    for key, value in changes.items():
        current = result.get(key)
        if isinstance(current, dict) and isinstance(value, Mapping) and key not in _WHOLE:
            value = merged(current, value)
        result[key] = value
    return result


def _scenario_arguments(environment: Mapping[str, Any], change: Mapping[str, Any]) -> Any:
    """Return the arguments of the scenario after a change of the environment; `from_dict` checks them."""
    current, changed = environment["scenario_kwargs"], change.get("scenario_kwargs", {})
    if change.get("scenario", environment["scenario"]) != environment["scenario"]:
        return changed
    if not isinstance(current, Mapping) or not isinstance(changed, Mapping):
        return changed if "scenario_kwargs" in change else current
    removed = {name for name, value in changed.items() if value is None and name in current}
    return {name: value for name, value in {**current, **changed}.items() if name not in removed}


def differences(old: ExperimentConfig, new: ExperimentConfig) -> dict[str, str]:
    """Return the fields that differ, by dotted name; their text is `old value -> new value` in JSON."""
    old_values, new_values = fields_of(old), fields_of(new)
    return {
        name: f"{json.dumps(old_values[name])} -> {json.dumps(new_values[name])}"
        for name in old_values
        if old_values[name] != new_values[name]
    }


def config_hash(config: ExperimentConfig) -> str:
    """Return the SHA-256 of the canonical JSON, in hexadecimal; equal experiments have equal hashes."""
    return json_hash(to_dict(config))


def require_run_name(name: str, kind: str = "run") -> str:
    """Return the name if a run, or an object of another `kind`, may have it.

    Raises:
        ConfigError: the name is too long, begins with a hyphen, or has a character that is not allowed.
    """
    if not _RUN_NAME.fullmatch(name):
        length = f" (it has {len(name)})" if len(name) > 63 else ""
        raise ConfigError(
            f"{kind} {name!r}: a name has 1 to 63 lower-case letters, digits and hyphens{length}, and does not "
            "begin with a hyphen"
        )
    return name


def fields_of(config: ExperimentConfig) -> dict[str, Any]:
    """Return the fields as JSON values by dotted name; a list, `scenario_kwargs` or `groups` is one value."""
    values = to_dict(config)
    sections = {name: section for name, section in values.items() if isinstance(section, dict)}
    inner = {f"{name}.{key}": value for name, section in sections.items() for key, value in section.items()}
    return inner | {name: value for name, value in values.items() if name not in sections}
