"""The VMAS task as a TorchRL environment: construction, seeds, and the time limit as truncation.

VMAS reports a single "done", which this module uses as *terminated*. TorchRL's `StepCounter` enforces the
time limit and sets *truncated*, so that value targets bootstrap at the limit. One tensor holds all agents, also if
agents differ; see `mappo.environment.groups`.
"""

import copy
import importlib
import math
import warnings
from difflib import get_close_matches
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import Compose, EnvBase, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import MarlGroupMapType
from vmas.simulator.scenario import BaseScenario

from mappo.compute.resources import free_memory_bytes, gibibytes
from mappo.config import EnvironmentConfig, ExperimentConfig
from mappo.environment.groups import Group, Shape, find_groups
from mappo.environment.keys import EPISODE_RETURN, OBSERVATION, REWARD
from mappo.environment.known_scenarios import require_known_scenario, scenario_modules
from mappo.environment.random_streams import (
    Stream,
    random_states,
    same_random_states,
    set_random_states,
    stream_seed,
)
from mappo.environment.reductions import declared_reductions
from mappo.environment.vmas_environment import GroupEnvironment, place_of_mistake
from mappo.errors import ConfigError, Preempted


def require_memory_for_batch(config: ExperimentConfig, device: torch.device) -> int:
    """Return the bytes of a batch and the learner's copy of it, the least memory that training needs.

    Raises:
        ConfigError: less memory is free.
    """
    frame = make_environment(config.environment, 1, 0, Stream.TRAINING, device).fake_tensordict()
    needed: int = 2 * (frame.bytes() + _bytes_of_memory(config, frame)) * config.collection.frames_per_batch
    free = free_memory_bytes(device)
    if needed > free:
        raise ConfigError(
            f"collection.num_envs = {config.collection.num_envs} x rollout_frames = "
            f"{config.collection.rollout_frames}: a batch and the learner's copy need at least "
            f"{gibibytes(needed)}, but {gibibytes(free)} are free on {device}; collect fewer frames at once"
        )
    return needed


def _bytes_of_memory(config: ExperimentConfig, frame: TensorDictBase) -> int:
    """Return the bytes that networks with a memory add to a frame, which is of one environment."""
    agents, networks = frame[OBSERVATION].shape[-2], config.networks
    rows = agents + (1 if networks.critic == "central" else agents)
    return 4 * rows * networks.memory_size if networks.has_memory else 0


_issued_warnings: set[str] = set()  # messages of scenarios that this process has issued already


def make_environment(
    config: EnvironmentConfig,
    num_envs: int,
    seed: int,
    stream: Stream,
    device: torch.device,
    after_frames: int = 0,
    process: int = 0,
) -> TransformedEnv:
    """Build `num_envs` copies of the task that are simulated together.

    Observations are [envs, agents, features]; rewards [envs, agents, 1]; done, terminated, truncated [envs, 1].
    If agents differ, shorter observations and actions are padded, and `groups_of` tells which agents are alike.
    `after_frames` is the number of frames that a continued run has trained already, `process` the number of the
    collecting process. Both change the seed, so that a run does not repeat its episodes. Call this function
    inside `private_random_streams`: VMAS has one random state for the whole process.

    Raises:
        ConfigError: the scenario does not exist, does not take the arguments, has other agents than the configured
            groups, or declares measurements wrongly.
    """
    states = random_states(device)
    vmas_env = _make_vmas(config, num_envs, device)
    vmas_env.groups = find_groups(_shapes(vmas_env, config.scenario), config.groups, config.return_groups)
    _require_ranges(vmas_env, config.scenario)
    declared_reductions(vmas_env._env.scenario)  # a mistake in them must not wait for the evaluation
    transforms = Compose(
        StepCounter(max_steps=config.max_episode_frames),
        RewardSum(in_keys=[REWARD], out_keys=[EPISODE_RETURN], reset_keys=["_reset"]),
    )
    environment = TransformedEnv(vmas_env, transforms)
    environment.set_seed(stream_seed(seed, stream, 2 * process, after_frames))
    _recipes[environment] = (num_envs, seed, stream, device, after_frames, process), states
    return environment


# For each environment: the arguments of `make_environment` after the configuration, and random states before it.
_recipes: WeakKeyDictionary[EnvBase, tuple[Any, dict[str, Any]]] = WeakKeyDictionary()


def make_twin(config: EnvironmentConfig, environment: EnvBase) -> TransformedEnv:
    """Make an environment again, with all numbers that were drawn when `make_environment` made it from `config`.

    Random states are afterwards as they were before.
    """
    arguments, states = _recipes[environment]
    with same_random_states(environment.device):
        set_random_states(states, environment.device)
        return make_environment(config, *arguments)


def groups_of(environment: EnvBase) -> tuple[Group, ...]:
    """Return the groups of an environment that `make_environment` made."""
    groups: tuple[Group, ...] = environment.base_env.groups
    return groups


def constant_actions(environment: EnvBase) -> list[str]:
    """Return the components of continuous actions whose range is 0, as `component 1 of agent_0`."""
    spaces = zip(environment.base_env.agent_names, environment.base_env.action_space, strict=True)
    return [
        f"component {index} of {name}"
        for name, space in spaces
        if hasattr(space, "low")
        for index, (low, high) in enumerate(zip(space.low, space.high, strict=True))
        if low == high
    ]


def entity_positions(environment: EnvBase) -> dict[str, Tensor]:
    """Return copies of the positions [envs, 2] by entity name, without joints, which VMAS places itself."""
    entities = environment.base_env._env.world.entities
    return {entity.name: entity.state.pos.clone() for entity in entities if not getattr(entity, "is_joint", False)}


def has_joints(environment: EnvBase) -> bool:
    """Return whether joints connect entities; VMAS then moves joints in all environments when it resets one."""
    return any(getattr(entity, "is_joint", False) for entity in environment.base_env._env.world.entities)


def scenario_module(name: str) -> ModuleType:
    """Return the module that defines a scenario: a known name or a user's `package.module:Class`."""
    return importlib.import_module(scenario_modules().get(name) or name.partition(":")[0])


def _scenario(name: str) -> BaseScenario:
    """Return a scenario: a known name or a user's `package.module:Class`."""
    _, _, class_name = name.partition(":")
    try:
        kind = getattr(scenario_module(name), class_name or "Scenario")
        is_scenario = isinstance(kind, type) and issubclass(kind, BaseScenario)
        scenario = kind() if is_scenario else None  # nothing is called before its class is checked
    except Preempted:  # the process received SIGTERM meanwhile
        raise
    except (Exception, SystemExit) as error:  # a user's module can raise anything
        raise ConfigError(
            f"environment.scenario = {name!r}: cannot be imported: {type(error).__name__}: "
            f"{error}{place_of_mistake(error)}; its module must be "
            "installed or in the current directory, and in a pipeline part of the image"
        ) from error
    if scenario is None:
        raise ConfigError(f"environment.scenario = {name!r}: not a subclass of vmas' BaseScenario")
    return scenario


def _make_vmas(config: EnvironmentConfig, num_envs: int, device: torch.device) -> GroupEnvironment:
    require_known_scenario(config)
    scenario = _scenario(config.scenario)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            environment = GroupEnvironment(
                scenario=scenario,
                num_envs=num_envs,
                device=device,
                continuous_actions=config.actions == "continuous",
                multidiscrete_actions=config.actions == "multi-discrete",
                categorical_actions=True,
                max_steps=None,
                group_map=MarlGroupMapType.ALL_IN_ONE_GROUP,
                scenario_kwargs=copy.deepcopy(config.scenario_kwargs),
            )
        except Preempted:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(
                f"environment: scenario {config.scenario!r} with {config.scenario_kwargs} cannot be built: "
                f"{type(error).__name__}: {error}{place_of_mistake(error)}"
            ) from error
    for warning in caught:
        if "not used by the scenario" in str(warning.message):
            unused, _, _ = str(warning.message).partition(" This will turn")
            raise ConfigError(f"environment.scenario_kwargs: {config.scenario!r} refuses an argument: {unused}")
        if str(warning.message) not in _issued_warnings:
            _issued_warnings.add(str(warning.message))
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    _warn_of_unknown_arguments(scenario, config)
    return environment


def _warn_of_unknown_arguments(scenario: BaseScenario, config: EnvironmentConfig) -> None:
    """Warn of arguments that a user's scenario does not mention in its code, such as misspelt ones."""
    known = {
        name
        for kind in type(scenario).__mro__
        for function in vars(kind).values()
        if isinstance(function, FunctionType) and kind is not BaseScenario
        for name in _names_in(function.__code__)
    }
    for name in sorted(set(config.scenario_kwargs) - known):
        close = get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        message = f"environment.scenario_kwargs: {config.scenario} does not mention {name!r} in its code{hint}"
        if message not in _issued_warnings:
            _issued_warnings.add(message)
            warnings.warn(message, stacklevel=2)


def _names_in(code: CodeType) -> set[str]:
    """Return the names of a function's parameters and the texts in its code, with those of its inner functions."""
    names = {*code.co_varnames, *(item for item in code.co_consts if isinstance(item, str))}
    for item in code.co_consts:
        if isinstance(item, tuple):
            names.update(each for each in item if isinstance(each, str))
        elif isinstance(item, CodeType):
            names |= _names_in(item)
    return names


def _shapes(environment: GroupEnvironment, scenario: str) -> dict[str, Shape]:
    """Return the shape of each agent's observations and actions, by the agent's name.

    Raises:
        ConfigError: an agent's observation is not one vector for each environment.
    """
    observations, actions = environment.observation_space, environment.action_space
    for name, observed in zip(environment.agent_names, observations, strict=True):
        if observed.shape is None or len(observed.shape) > 1:
            raise ConfigError(
                f"environment.scenario = {scenario!r}: observation() must return one tensor [envs, features] for "
                f"each agent, not several and not of other axes, as for {name}"
            )
    return {
        # An observation without an axis of environments has no shape here; validation refuses it with its method.
        name: (
            observed.shape[0] if observed.shape else 1,
            acted.shape[0] if acted.shape else None,
            _choices(acted),
        )
        for name, observed, acted in zip(environment.agent_names, observations, actions, strict=True)
    }


def _require_ranges(environment: GroupEnvironment, scenario: str) -> None:
    """Check that continuous actions have finite ranges. A component whose range is 0 is a constant.

    Raises:
        ConfigError: a range is negative or not finite, or all ranges are 0, so that there is nothing to learn.
    """
    can_move = False
    for name, space in zip(environment.agent_names, environment.action_space, strict=True):
        if not hasattr(space, "low"):
            return
        for index, (low, high) in enumerate(zip(space.low, space.high, strict=True)):
            if not -math.inf < low <= high < math.inf:
                raise ConfigError(
                    f"environment.scenario = {scenario!r}: component {index} of the action of {name} has the "
                    f"range {low} to {high}; give it a finite u_range, which is 0 or more"
                )
            can_move |= bool(low < high)
    if not can_move:
        raise ConfigError(
            f"environment.scenario = {scenario!r}: the ranges of all actions are 0, so there is nothing to learn; "
            "give a component a positive u_range"
        )


def _choices(space: Any) -> tuple[int, ...]:
    """Return the number of choices of each component of a gym action space; empty if it is continuous."""
    if hasattr(space, "nvec"):
        return tuple(int(n) for n in space.nvec)
    return (int(space.n),) if hasattr(space, "n") else ()
