"""A VMAS task as TorchRL sees it: construction, seeds, the time limit as truncation, and the tensordict keys.

VMAS reports a single "done". Here it means *terminated* alone: the time limit is TorchRL's `StepCounter`, which
sets *truncated*, so that values bootstrap through it. All agents form one group, `agents`.
"""

import copy
import importlib
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from enum import IntEnum
from types import ModuleType
from typing import Any

import numpy as np
import torch
import vmas
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import Compose, EnvBase, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.libs.vmas import VmasEnv
from torchrl.envs.utils import MarlGroupMapType
from vmas.simulator.environment import Environment as VmasEnvironment
from vmas.simulator.scenario import BaseScenario

from mappo.config import ConfigError, EnvironmentConfig
from mappo.launching import copy_each

OBSERVATION = ("agents", "observation")  # [envs, time, agents, features]
ACTION = ("agents", "action")  # [envs, time, agents, features]; discrete: [envs, time, agents]
REWARD = ("agents", "reward")  # [envs, time, agents, 1]
EPISODE_RETURN = ("agents", "episode_return")  # [envs, time, agents, 1], summed since the reset
STEP_COUNT = "step_count"  # [envs, time, 1], frames since the reset
DONE, TERMINATED, TRUNCATED = "done", "terminated", "truncated"  # [envs, time, 1] each

Key = str | tuple[str, ...]
CARRIED: tuple[Key, ...] = (OBSERVATION, EPISODE_RETURN, STEP_COUNT, DONE, TERMINATED, TRUNCATED)  # between frames
FOLLOWING: tuple[Key, ...] = (*CARRIED, REWARD)  # what is shown after a frame

_MODULES = {  # of the scenarios that have names
    "swarm": "mappo.scenarios.swarm",
    **{name: f"vmas.scenarios.{name}" for name in vmas.scenarios},
    **{name: f"vmas.scenarios.mpe.{name}" for name in vmas.mpe_scenarios},
    **{name: f"vmas.scenarios.debug.{name}" for name in vmas.debug_scenarios},
}
SCENARIOS = tuple(sorted(_MODULES))

_NOT_FOR_SCENARIOS = {  # arguments of VMAS and of TorchRL's wrapper, which this module gives or leaves alone
    *("batch_dim", "clamp_actions", "categorical_actions", "continuous_actions", "device", "dict_spaces"),
    *("from_pixels", "grad_enabled", "group_map", "max_steps", "multidiscrete_actions", "num_envs", "pixels_only"),
    *("scenario", "scenario_kwargs", "seed", "terminated_truncated", "wrapper", "wrapper_kwargs"),
}
_shown_warnings: set[str] = set()  # what scenarios warn of is shown once a process


class Stream(IntEnum):
    """Who draws random numbers. Streams never meet, even where two of them have the same seed."""

    TRAINING = 0
    EVALUATION = 1
    VALIDATION = 2
    SELECTION = 3
    GATE = 4
    TUNING = 5


class NonFiniteObservation(ArithmeticError):
    """An observation is NaN or infinite; the policy did not act on it."""


def make_environment(
    config: EnvironmentConfig,
    num_envs: int,
    seed: int,
    stream: Stream,
    device: torch.device,
    after_frames: int = 0,
    process: int = 0,
) -> TransformedEnv:
    """Build `num_envs` copies of the task, simulated together.

    Observations are [envs, agents, features]; rewards [envs, agents, 1]; done, terminated and truncated [envs, 1].
    A run that goes on `after_frames` draws other episodes than from its start, and so does each `process` of it.
    Call it inside `private_random_streams`: VMAS has one random state for the whole process.

    Raises:
        ConfigError: no such scenario, arguments that it does not take, or several groups of agents with
            different observations or actions.
    """
    vmas_env = _make_vmas(config, num_envs, device)
    _require_equal_agents(vmas_env, config.scenario)
    transforms = Compose(
        StepCounter(max_steps=config.max_episode_frames),
        RewardSum(in_keys=[REWARD], out_keys=[EPISODE_RETURN], reset_keys=["_reset"]),
    )
    environment = TransformedEnv(vmas_env, transforms)
    environment.set_seed(_stream_seed(seed, stream, 2 * process, after_frames))
    return environment


def next_key(key: Key) -> Key:
    """The key of what is shown after a frame."""
    return ("next", *((key,) if isinstance(key, str) else key))


FRAME: tuple[Key, ...] = (*CARRIED, ACTION, *(next_key(key) for key in FOLLOWING))


def nested(tensors: Mapping[Key, Tensor], batch_size: list[int]) -> TensorDictBase:
    """Tensors by key, together."""
    together = TensorDict({}, batch_size=batch_size, device=tensors[OBSERVATION].device)
    for key, value in tensors.items():
        together[key] = value
    return together


class Frames:
    """A batch [envs, time], filled frame by frame [envs]: no frame is kept beside it."""

    def __init__(self, rollout_frames: int):
        self._rollout_frames = rollout_frames
        self._batch: dict[Key, Tensor] = {}
        self._places: Iterator[tuple[Tensor, ...]] = iter(())

    def append(self, frame: Mapping[Key, Tensor] | TensorDictBase) -> None:
        """Copy what is learned from; what policies leave beside their actions is not."""
        values = [frame[key] for key in FRAME]
        if not self._batch:
            for key, value in zip(FRAME, values, strict=True):
                self._batch[key] = value.new_empty(len(value), self._rollout_frames, *value.shape[1:])
            self._places = zip(*(value.unbind(1) for value in self._batch.values()), strict=True)
        copy_each(next(self._places), values)

    def batch(self) -> TensorDictBase:
        """All frames, once all are there."""
        return nested(self._batch, [*self._batch[DONE].shape[:2]])


def require_finite_observations(observation: Tensor) -> None:
    """Look at observations [envs, agents, features] before a policy acts on them.

    Raises:
        NonFiniteObservation: naming the environment and the agent.
    """
    if not observation.isfinite().all():
        env, agent, feature = (~observation.isfinite()).nonzero()[0].tolist()
        raise NonFiniteObservation(
            f"feature {feature} of the observation of agent {agent} is {observation[env, agent, feature].item()} "
            f"in environment {env}: the scenario must keep its observations finite"
        )


@contextmanager
def private_random_streams(
    seed: int, stream: Stream, device: torch.device, after_frames: int = 0, process: int = 0
) -> Iterator[None]:
    """Seed every source of randomness for the block, and give the caller's back afterwards.

    Covers torch (CPU and the CUDA device), numpy, Python and the state that all VMAS environments of a process
    share. What runs inside neither sees nor disturbs the random numbers of what runs outside.
    """
    outside = random.getstate(), np.random.get_state(), list(VmasEnvironment.vmas_random_state)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            private_seed = _stream_seed(seed, stream, 2 * process + 1, after_frames)
            torch.manual_seed(private_seed)
            random.seed(private_seed)
            np.random.seed(private_seed)
            VmasEnvironment.vmas_random_state[:] = [
                torch.random.get_rng_state(),
                np.random.get_state(),
                random.getstate(),
            ]
            yield
        finally:
            random.setstate(outside[0])
            np.random.set_state(outside[1])
            VmasEnvironment.vmas_random_state[:] = outside[2]


def action_choices(environment: EnvBase) -> tuple[int, ...]:
    """How many choices each component of an agent's action has; empty when actions are continuous."""
    return _choices(environment.base_env.action_space[0])


def simulator_random_state() -> tuple[bytes, str, str]:
    """What all VMAS environments of the process draw their random numbers from: torch, numpy, Python."""
    of_torch, of_numpy, of_python = VmasEnvironment.vmas_random_state
    return bytes(of_torch.tolist()), repr(of_numpy), repr(of_python)


def random_states(device: torch.device) -> dict[str, Any]:
    """Where every source of randomness stands that `private_random_streams` covers, for `set_random_states`."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": np.random.get_state(),
        "python": random.getstate(),
        "vmas": list(VmasEnvironment.vmas_random_state),
    }


def set_random_states(states: dict[str, Any], device: torch.device) -> None:
    """Let every source of randomness go on from where `random_states` saw it; a GPU's only if there was one."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    VmasEnvironment.vmas_random_state[:] = states["vmas"]


@contextmanager
def unchanged_simulator_random_state() -> Iterator[None]:
    """What the block draws from the random state of all VMAS environments is put back afterwards."""
    before = list(VmasEnvironment.vmas_random_state)
    try:
        yield
    finally:
        VmasEnvironment.vmas_random_state[:] = before


def entity_positions(environment: EnvBase) -> dict[str, Tensor]:
    """Copies of the positions [envs, 2] by name of entity, but for joints, which VMAS places itself."""
    entities = environment.base_env._env.world.entities
    return {entity.name: entity.state.pos.clone() for entity in entities if not getattr(entity, "is_joint", False)}


def has_joints(environment: EnvBase) -> bool:
    """Whether entities are connected; VMAS then moves joints of all environments when one of them is reset."""
    return any(getattr(entity, "is_joint", False) for entity in environment.base_env._env.world.entities)


def resolve_device(name: str) -> torch.device:
    """The device meant by `device: auto | cpu | cuda`.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this build of torch has no CUDA support)"
        raise ConfigError(f"device = 'cuda': no CUDA device is available here{built}; use cpu or auto")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def scenario_module(name: str) -> ModuleType:
    """The module that defines a scenario, named or a user's own."""
    return importlib.import_module(_MODULES.get(name) or name.partition(":")[0])


def _stream_seed(seed: int, stream: Stream, owner: int, after_frames: int) -> int:
    """A 32-bit seed of its own for each combination; even owners are simulators, odd ones all else."""
    words = [seed, int(stream), owner, *([after_frames] if after_frames else [])]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def _scenario(name: str) -> BaseScenario:
    """A scenario by its name, or a user's own by `package.module:Class`."""
    _, colon, class_name = name.partition(":")
    if not colon and name not in SCENARIOS:
        close = get_close_matches(name, SCENARIOS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"scenarios: {', '.join(SCENARIOS)}"
        raise ConfigError(f"environment.scenario = {name!r}: there is no such scenario; {hint}")
    try:
        scenario = getattr(scenario_module(name), class_name or "Scenario")()
    except Exception as error:  # a user's module can raise anything
        raise ConfigError(
            f"environment.scenario = {name!r}: cannot be imported: {type(error).__name__}: {error}; its module "
            "must be installed or in the current directory, and in a pipeline part of the image"
        ) from error
    if not isinstance(scenario, BaseScenario):
        raise ConfigError(f"environment.scenario = {name!r}: not a subclass of vmas' BaseScenario")
    return scenario


def _make_vmas(config: EnvironmentConfig, num_envs: int, device: torch.device) -> VmasEnv:
    scenario = _scenario(config.scenario)
    if taken := sorted(_NOT_FOR_SCENARIOS & set(config.scenario_kwargs)):
        raise ConfigError(f"environment.scenario_kwargs: not arguments of a scenario: {', '.join(taken)}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            environment = VmasEnv(
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
        except Exception as error:
            raise ConfigError(
                f"environment: scenario {config.scenario!r} with {config.scenario_kwargs} cannot be built: "
                f"{type(error).__name__}: {error}"
            ) from error
    for warning in caught:
        if "not used by the scenario" in str(warning.message):
            raise ConfigError(f"environment.scenario_kwargs: {config.scenario!r}: {warning.message}")
        if str(warning.message) not in _shown_warnings:
            _shown_warnings.add(str(warning.message))
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return environment


def _require_equal_agents(environment: VmasEnv, scenario: str) -> None:
    """One group of agents, stacked in one tensor, needs the same observation vector and the same actions."""
    observations, actions = environment.observation_space, environment.action_space
    agents = zip(environment.agent_names, observations, actions, strict=True)
    seen_and_done = {name: (seen.shape, _choices(act) or act.shape) for name, seen, act in agents}
    if None in (seen for seen, _ in seen_and_done.values()):
        raise ConfigError(
            f"environment.scenario = {scenario!r}: observation() must return one tensor [envs, features], "
            "not several"
        )
    if len(set(seen_and_done.values())) > 1:
        listed = "; ".join(
            f"{name}: observation {seen}, action {act}" for name, (seen, act) in seen_and_done.items()
        )
        raise ConfigError(
            f"environment.scenario = {scenario!r}: all agents are one group, which needs the same observation and "
            f"action vectors for each (pad the shorter ones in the scenario), but they differ: {listed}"
        )


def _choices(space: Any) -> tuple[int, ...]:
    """Of a gym space of actions; empty when it is continuous."""
    if hasattr(space, "nvec"):
        return tuple(int(n) for n in space.nvec)
    return (int(space.n),) if hasattr(space, "n") else ()
