"""Is this environment fit to train on? Checks that cost seconds, before a GPU is spent on hours."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, check_env_specs

from mappo.config import ConfigError, EnvironmentConfig, ExperimentConfig, config_hash
from mappo.environment import (
    ACTION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRUNCATED,
    Stream,
    make_environment,
    private_random_streams,
    resolve_device,
    simulator_state,
)

_ENVS = 8  # environments of every check but speed
_FRAMES = 30  # frames that a check plays; the time limit is played in full, up to _LONGEST
_LONGEST = 1_000
_TOLERANCE = 1e-5  # parallel environments may round differently
_LARGE_REWARD = 1_000.0  # per frame; value targets beyond it are learned slowly
_SPEED_SECONDS = 1.0


@dataclass(frozen=True)
class Check:
    """One line of the report: what was checked, how it went, and what was found or should be done."""

    name: str
    outcome: Literal["passed", "warning", "failed"]
    detail: str


@dataclass(frozen=True)
class ValidationReport:
    """All checks in order. A failed check is a reason not to train; a warning is something to look at."""

    config_hash: str
    checks: list[Check]

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.outcome == "failed"]


class EnvironmentUnfit(Exception):
    """What is wrong with the environment, and what its author can do about it."""


class _Concern(Exception):
    """The check passed, but somebody should look at this."""


@dataclass(frozen=True)
class _Task:
    config: EnvironmentConfig
    num_envs: int
    seed: int
    device: torch.device

    def make(self, num_envs: int = _ENVS, seed_offset: int = 0) -> EnvBase:
        seed = (self.seed + seed_offset) % 2**32
        return make_environment(self.config, num_envs, seed, Stream.VALIDATION, self.device)


def validate(config: ExperimentConfig, on_check: Callable[[Check], object]) -> ValidationReport:
    """Run every check on the task and the device that `config` names; `on_check` hears of each as it ends.

    Whatever a check raises makes it a failed check with that reason. Without a device or an environment there
    is nothing more to check.
    """
    checks: list[Check] = []

    def run(name: str, check: Callable[[], str]) -> bool:
        checks.append(_run(name, check))
        on_check(checks[-1])
        return checks[-1].outcome != "failed"

    if run("device", lambda: f"{resolve_device(config.device)}"):
        device = resolve_device(config.device)
        task = _Task(config.environment, config.collection.num_envs, config.seed, device)
        with private_random_streams(config.seed, Stream.VALIDATION, device):
            if run("environment", lambda: _is_built(task)):
                for name, check in _CHECKS.items():
                    run(name, partial(check, task))
    return ValidationReport(config_hash(config), checks)


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, "passed", check())
    except _Concern as concern:
        return Check(name, "warning", str(concern))
    except (EnvironmentUnfit, ConfigError) as reason:
        return Check(name, "failed", str(reason))
    except Exception as error:  # a scenario is foreign code: anything it raises is a finding
        return Check(name, "failed", " ".join(f"{type(error).__name__}: {error}".split()))


def _is_built(task: _Task) -> str:
    environment = task.make()
    num_agents, num_features = environment.full_observation_spec_unbatched[OBSERVATION].shape
    num_actions = environment.full_action_spec_unbatched[ACTION].shape[-1]
    return (
        f"{task.config.scenario}: {num_agents} agents, {num_features} observation features and "
        f"{num_actions} action values each"
    )


def _specs_describe_the_data(task: _Task) -> str:
    check_env_specs(task.make())
    return "shapes, dtypes and devices are those that the specs declare"


def _data_are_finite(task: _Task) -> str:
    frames = _play(task.make(), _random_actions(task))
    for key in (OBSERVATION, REWARD):
        values = torch.stack([frame[key] for frame in frames], dim=1)
        if not values.isfinite().all():
            env, frame, agent, *_ = (~values.isfinite()).nonzero()[0].tolist()
            raise EnvironmentUnfit(
                f"the {key[-1]} of agent {agent} is {values[env, frame, agent].tolist()} at frame {frame + 1} "
                f"of environment {env} under random actions: guard the division, root or log in the scenario"
            )
    return f"over {_FRAMES} frames of {_ENVS} environments under random actions"


def _seeding_is_reproducible(task: _Task) -> str:
    actions = _random_actions(task)
    first, again = _play(task.make(), actions), _play(task.make(), actions)
    if difference := _difference(first, again):
        raise EnvironmentUnfit(
            f"two runs with the same seed and actions differ ({difference}): draw random numbers from torch, "
            "numpy or random as seeded by VMAS, not from generators or clocks of your own"
        )
    start, other = task.make().reset()[OBSERVATION], task.make(seed_offset=1).reset()[OBSERVATION]
    if torch.equal(start, other):
        raise _Concern(
            "the first observations do not depend on the seed: held-out episodes begin as the training ones"
        )
    return "and another seed gives others"


def _environments_are_independent(task: _Task) -> str:
    actions = _random_actions(task)
    changed = [action.clone() for action in actions]
    for action in changed:
        action[0] = -action[0]
    plain, disturbed = _play(task.make(), actions), _play(task.make(), changed)
    if difference := _difference([frame[1:] for frame in plain], [frame[1:] for frame in disturbed]):
        raise EnvironmentUnfit(
            f"other actions in environment 0 changed the others ({difference}): a tensor of the scenario is "
            "reduced or indexed over the environments' axis"
        )
    return "other actions in one leave the rest as they were"


def _partial_resets_are_partial(task: _Task) -> str:
    environment = task.make()
    state = _play(environment, _random_actions(task, frames=5))[-1]
    before = simulator_state(environment)
    mask = torch.zeros(_ENVS, 1, dtype=torch.bool, device=task.device)
    mask[0] = True
    environment.reset(state.clone().set("_reset", mask))
    after = simulator_state(environment)
    if not torch.equal(before[1:], after[1:]):
        raise EnvironmentUnfit(
            "resetting environment 0 moved entities of the others: reset_world_at(env_index) must write only "
            "row env_index unless it is None"
        )
    if torch.equal(before[0], after[0]):
        raise EnvironmentUnfit("resetting environment 0 left all its entities where they were")
    return "one environment is reset, the others go on"


def _time_limit_truncates(task: _Task) -> str:
    limit = task.config.max_episode_frames
    frames = _play(task.make(), _random_actions(task, frames=min(limit, _LONGEST)))
    ended = torch.stack([frame[TRUNCATED].squeeze(-1) for frame in frames])  # [time, envs]
    terminated = torch.stack([frame[TERMINATED].squeeze(-1) for frame in frames])
    if ended[: limit - 1].any():
        raise EnvironmentUnfit(f"an episode was truncated before its time limit of {limit} frames")
    if limit <= _LONGEST and not ended[limit - 1].all():
        raise EnvironmentUnfit(f"an episode was not truncated at its time limit of {limit} frames")
    first = terminated.int().argmax(0)
    if terminated.any(0).all() and (first == first[0]).all() and first[0] > 0:
        raise _Concern(
            f"every environment terminated at frame {int(first[0]) + 1} whatever was done: if that is a time "
            "limit of the scenario, remove it and set environment.max_episode_frames, which bootstraps"
        )
    played = "" if limit <= _LONGEST else f"; the first {_LONGEST} of them were played"
    return f"at {limit} frames{played}; {int(terminated.any(0).sum())} of {_ENVS} episodes terminated earlier"


def _reward_scale_is_learnable(task: _Task) -> str:
    frames = _play(task.make(), _random_actions(task))
    rewards = torch.stack([frame[REWARD] for frame in frames])
    found = f"mean {rewards.mean():.3g}, smallest {rewards.min():.3g}, largest {rewards.max():.3g} a frame"
    if rewards.abs().max() > _LARGE_REWARD:
        raise _Concern(
            f"{found}: scale rewards to about 1; the critic learns values beyond {_LARGE_REWARD:g} badly"
        )
    if (rewards == 0).all():
        raise _Concern(f"all rewards were 0 over {_FRAMES} frames of random actions: learning may not start")
    return found


def _speed(task: _Task) -> str:
    environment = task.make(task.num_envs)
    state, frames, start = environment.reset(), 0, time.perf_counter()
    while time.perf_counter() - start < _SPEED_SECONDS:
        _, state = environment.step_and_maybe_reset(environment.rand_action(state))
        frames += task.num_envs
    rate = frames / (time.perf_counter() - start)
    return f"{rate:,.0f} frames/s with {task.num_envs} environments on {task.device} under random actions"


_CHECKS: dict[str, Callable[[_Task], str]] = {
    "specs": _specs_describe_the_data,
    "finite values": _data_are_finite,
    "seeding": _seeding_is_reproducible,
    "independence": _environments_are_independent,
    "partial reset": _partial_resets_are_partial,
    "time limit": _time_limit_truncates,
    "reward scale": _reward_scale_is_learnable,
    "speed": _speed,
}


def _random_actions(task: _Task, frames: int = _FRAMES) -> list[Tensor]:
    """[envs, agents, features] for each frame, the same on every call."""
    spec = task.make().full_action_spec[ACTION]
    with private_random_streams(task.seed, Stream.VALIDATION, task.device):
        return [spec.rand() for _ in range(frames)]


def _play(environment: EnvBase, actions: Sequence[Tensor]) -> list[TensorDictBase]:
    """What followed each action, never resetting; [envs] for each frame."""
    state, frames = environment.reset(), []
    for action in actions:
        state = environment.step(state.set(ACTION, action))["next"]
        frames.append(state.clone())
    return frames


def _difference(first: Sequence[TensorDictBase], second: Sequence[TensorDictBase]) -> str:
    """The first observation or reward in which two runs differ by more than rounding; empty if none."""
    for number, (one, other) in enumerate(zip(first, second, strict=True), start=1):
        for key in (OBSERVATION, REWARD):
            if not torch.allclose(one[key], other[key], atol=_TOLERANCE, rtol=_TOLERANCE, equal_nan=True):
                return f"{key[-1]} at frame {number}"
    return ""
