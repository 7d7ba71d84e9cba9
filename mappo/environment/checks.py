"""The checks of a task, one function each."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, check_env_specs

from mappo.compute.resources import gibibytes
from mappo.config import EnvironmentConfig, ExperimentConfig
from mappo.environment.environment import (
    action_choices,
    entity_positions,
    has_joints,
    make_environment,
    require_memory_for_batch,
)
from mappo.environment.keys import ACTION, DONE, OBSERVATION, REWARD, TERMINATED, TRUNCATED
from mappo.environment.random_streams import (
    Stream,
    private_random_streams,
    random_states,
    set_random_states,
    simulator_random_state,
    unchanged_simulator_random_state,
)
from mappo.environment.simulation_state import capture, restore
from mappo.errors import EnvironmentUnfit, SimulationStateError

_ENVS = 8  # environments of every check but speed
_FRAMES = 30  # frames that a check plays; the time limit is played in full, up to _LONGEST
_LONGEST = 1_000
_TOLERANCE = 1e-5  # parallel environments may round differently
_LARGE_REWARD = 1_000.0  # per frame; value targets beyond it are learned slowly
_GROWTH = 10.0  # of large rewards, from the first quarter of an episode to the last, that has no bound
_SPEED_SECONDS = 1.0


_ROW_ONLY = (
    "reset_world_at(env_index) must write only row env_index, of entities and of attributes, unless it is None"
)


class Concern(Exception):
    """The check passed, but somebody should look at this."""


@dataclass(frozen=True)
class Task:
    experiment: ExperimentConfig
    device: torch.device

    @property
    def config(self) -> EnvironmentConfig:
        return self.experiment.environment

    def make(self, num_envs: int = _ENVS, seed_offset: int = 0) -> EnvBase:
        seed = (self.experiment.seed + seed_offset) % 2**32
        return make_environment(self.config, num_envs, seed, Stream.VALIDATION, self.device)


def is_built(task: Task) -> str:
    environment = task.make()
    num_agents, num_features = environment.full_observation_spec_unbatched[OBSERVATION].shape
    choices = action_choices(environment)
    actions = (
        f"{' x '.join(map(str, choices))} actions"
        if choices
        else f"{environment.full_action_spec_unbatched[ACTION].shape[-1]} action values"
    )
    return f"{task.config.scenario}: {num_agents} agents, {num_features} observation features and {actions} each"


def interface_is_kept(task: Task) -> str:
    """Each answer of the scenario is looked at where VMAS asks for it, before anything is made of it."""
    environment = task.make()
    scenario = environment.base_env._env.scenario
    num_features = environment.full_observation_spec_unbatched[OBSERVATION].shape[-1]
    expected: dict[str, tuple[list[tuple[int, ...]], torch.dtype]] = {
        "observation": ([(_ENVS, num_features)], torch.float32),
        "reward": ([(_ENVS,), (_ENVS, 1)], torch.float32),
        "done": ([(_ENVS,)], torch.bool),
    }
    for method, (shapes, dtype) in expected.items():
        setattr(scenario, method, _require_answer(getattr(scenario, method), shapes, dtype))
    _play(environment, _random_actions(task))
    return f"observation, reward and done have the shape and dtype that VMAS expects, over {_FRAMES} frames"


def _require_answer(
    method: Callable[..., Any], shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> Callable[..., Any]:
    """The method, with a look at what it answers to VMAS, which calls it without keywords."""

    def asked(*arguments: Any, **options: Any) -> Any:
        answer = method(*arguments, **options)
        if options:
            return answer
        if not isinstance(answer, Tensor):
            found = f"a {type(answer).__name__}"
        elif answer.shape not in shapes or answer.dtype != dtype:
            found = f"{answer.dtype} {list(answer.shape)}".removeprefix("torch.")
        else:
            return answer
        agent = "".join(f" for {argument.name}" for argument in arguments)
        wanted = f"{dtype} {list(shapes[0])}".removeprefix("torch.")
        raise EnvironmentUnfit(
            f"{method.__name__}() returned {found}{agent}; with {_ENVS} environments it must return "
            f"a tensor {wanted}"
        )

    return asked


def _specs_describe_the_data(task: Task) -> str:
    check_env_specs(task.make())
    return "shapes, dtypes and devices are those that the specs declare"


def _data_are_finite(task: Task) -> str:
    frames = _play(task.make(), _random_actions(task))
    played = _until_done(frames)
    for key in (OBSERVATION, REWARD):
        values = torch.stack([frame[key] for frame in frames], dim=1)
        values = torch.where(played[..., None, None], values, 0.0)
        if not values.isfinite().all():
            env, frame, agent, *_ = (~values.isfinite()).nonzero()[0].tolist()
            raise EnvironmentUnfit(
                f"the {key[-1]} of agent {agent} is {values[env, frame, agent].tolist()} at frame {frame + 1} "
                f"of environment {env} under random actions: guard the division, root or log in the scenario"
            )
    return f"over {_FRAMES} frames of {_ENVS} environments under random actions"


def _seeding_is_reproducible(task: Task) -> str:
    actions = _random_actions(task)
    first, again = _play(task.make(), actions), _play(task.make(), actions)
    if difference := _difference(first, again):
        raise EnvironmentUnfit(
            f"two runs with the same seed and actions differ ({difference}): draw random numbers from torch, "
            "numpy or random as seeded by VMAS, not from generators or clocks of your own"
        )
    start, other = task.make().reset()[OBSERVATION], task.make(seed_offset=1).reset()[OBSERVATION]
    if torch.equal(start, other):
        raise Concern(
            "the first observations do not depend on the seed: held-out episodes begin as the training ones"
        )
    return "and another seed gives others"


def _environments_are_independent(task: Task) -> str:
    actions = _random_actions(task)
    comparable = []
    for kept in (0, _ENVS // 2):
        changed = [action.roll(1, dims=0) for action in actions]
        for other, action in zip(changed, actions, strict=True):
            other[kept] = action[kept]
        plain, disturbed = _play_recording(task.make(), actions), _play_recording(task.make(), changed)
        comparable.append(_comparable_frames(plain, disturbed))
        rows = [[frame[kept : kept + 1] for frame in run.frames[: comparable[-1]]] for run in (plain, disturbed)]
        if difference := _difference(*rows):
            raise EnvironmentUnfit(
                f"other actions in the other environments changed environment {kept} ({difference}): a tensor of "
                "the scenario is reduced or indexed over the environments' axis"
            )
    return f"other actions in the others leave an environment as it was, over {min(comparable)} frames"


def _partial_resets_are_partial(task: Task) -> str:
    """Environment 0 is reset in the middle; the others' next frame must be as if it had not been."""
    *before, after = _random_actions(task, frames=6)
    undisturbed = task.make()
    first = undisturbed.reset()
    start = entity_positions(undisturbed)
    _play(undisturbed, before, first)
    disturbed = task.make()  # seeds the random state, which both share, anew
    state = _play(disturbed, before)[-1]
    kept = entity_positions(disturbed)
    with unchanged_simulator_random_state():
        mask = torch.zeros(_ENVS, 1, dtype=torch.bool, device=task.device)
        mask[0] = True
        after_reset = disturbed.reset(state.clone().set("_reset", mask))
    for name, position in entity_positions(disturbed).items():  # VMAS puts all to zero before it asks the scenario
        if not torch.equal(kept[name][1:], position[1:]):
            raise EnvironmentUnfit(f"resetting environment 0 moved {name} in the others: {_ROW_ONLY}")
        if start[name][0].any() and not position[0].any():
            raise EnvironmentUnfit(
                f"resetting environment 0 left {name} at the origin: reset_world_at(0) must place in row 0 "
                "whatever reset_world_at(None) places in all"
            )
    with unchanged_simulator_random_state():
        plain = _play(undisturbed, [after], state)[0]
    reset = _play(disturbed, [after], after_reset)[0]
    if not has_joints(disturbed) and (difference := _difference([plain[1:]], [reset[1:]])):
        raise Concern(f"resetting environment 0 changed the others ({difference} after it): {_ROW_ONLY}")
    return "one environment is reset, the others go on"


def _resumption_is_exact(task: Task) -> str:
    """A simulation that is captured, and restored in another environment, goes on as the first one does."""
    actions = _random_actions(task)
    before, after = actions[: _FRAMES // 3], actions[_FRAMES // 3 :]
    original, restored = task.make(), task.make(seed_offset=1)
    state = _play(original, before)[-1]
    captured = capture(original, random_states=random_states(task.device))
    expected = _play(original, after, state)
    advice = "keep in attributes of the scenario, its world or its entities whatever changes while it runs"
    try:
        others = restore(captured, restored)
    except SimulationStateError as error:
        raise Concern(f"a run of this task cannot be resumed: {error}; {advice}") from error
    set_random_states(others["random_states"], task.device)
    if difference := _difference(expected, _play(restored, after, state), tolerance=0.0):
        raise Concern(f"a resumed run is another than one that never stopped ({difference} after it): {advice}")
    return f"a restored simulation goes on the same, bit by bit, over {len(after)} frames"


def _time_limit_truncates(task: Task) -> str:
    limit = task.config.max_episode_frames
    frames = _play(task.make(), _random_actions(task, frames=min(limit, _LONGEST)))
    ended = torch.stack([frame[TRUNCATED].squeeze(-1) for frame in frames])  # [time, envs]
    terminated = torch.stack([frame[TERMINATED].squeeze(-1) for frame in frames])
    if ended[: limit - 1].any():
        raise EnvironmentUnfit(f"an episode was truncated before its time limit of {limit} frames")
    if limit <= _LONGEST and not ended[limit - 1].all():
        raise EnvironmentUnfit(f"an episode was not truncated at its time limit of {limit} frames")
    first = terminated.int().argmax(0)
    if terminated.any(0).all() and (first == first[0]).all():
        _explain_clock(int(first[0]) + 1, frames)
    played = "" if limit <= _LONGEST else f"; the first {_LONGEST} of them were played"
    return f"at {limit} frames{played}; {int(terminated.any(0).sum())} of {_ENVS} episodes terminated earlier"


def _explain_clock(frame: int, frames: Sequence[TensorDictBase]) -> None:
    """Every environment terminated at the same frame: a time limit, which only agents that see it can value."""
    found = f"every environment terminated at frame {frame}, whatever was done"
    if frame == 1:
        raise EnvironmentUnfit(f"{found}: done() must be false where the task goes on")
    observations = torch.stack([state[OBSERVATION] for state in frames[:frame]])  # [time, envs, agents, features]
    same_everywhere = (observations == observations[:, :1]).all(1)
    changing = (observations[1:] != observations[:-1]).all(0).all(0)
    if (same_everywhere.all(0) & changing).all(0).any():
        raise Concern(f"{found}; an observation shows the time, so that is right if the task does end there")
    raise EnvironmentUnfit(
        f"{found}: this is a time limit, but nothing is bootstrapped after a termination; take it out of "
        f"done() and set environment.max_episode_frames = {frame}"
    )


def _reward_scale_is_learnable(task: Task) -> str:
    played = min(task.config.max_episode_frames, _LONGEST)
    frames = _play(task.make(), _random_actions(task, played))
    everything = torch.stack([frame[REWARD] for frame in frames], dim=1)  # [envs, time, agents, 1]
    counted = _until_done(frames)
    rewards = everything[counted]
    found = f"mean {rewards.mean():.3g}, smallest {rewards.min():.3g}, largest {rewards.max():.3g} a frame"
    sizes = [
        part[kept].abs().mean().item()
        for part, kept in zip(everything.chunk(4, dim=1), counted.chunk(4, dim=1), strict=True)
        if kept.any()
    ]
    growing = sizes[0] > 0 and all(earlier < later for earlier, later in pairwise(sizes))
    if rewards.abs().max() > _LARGE_REWARD and growing and sizes[-1] > _GROWTH * sizes[0]:
        raise EnvironmentUnfit(
            f"{found}; rewards grow with the frame, from {sizes[0]:.3g} in the first quarter of an episode "
            f"to {sizes[-1]:.3g} in the last: bound them, or no critic can learn their sum"
        )
    if rewards.abs().max() > _LARGE_REWARD:
        raise Concern(
            f"{found}: scale rewards to about 1; the critic learns values beyond {_LARGE_REWARD:g} badly"
        )
    if (rewards == 0).all():
        raise Concern(f"all rewards were 0 over {played} frames of random actions: learning may not start")
    return found


def batch_fits(task: Task) -> str:
    needed = require_memory_for_batch(task.experiment, task.device)
    return f"a batch and the learner's copy take {gibibytes(needed)}"


def measure_speed(task: Task) -> str:
    num_envs = task.experiment.collection.num_envs
    environment = task.make(num_envs)
    state, frames, start = environment.reset(), 0, time.perf_counter()
    while time.perf_counter() - start < _SPEED_SECONDS:
        _, state = environment.step_and_maybe_reset(environment.rand_action(state))
        frames += num_envs
    rate = frames / (time.perf_counter() - start)
    return f"{rate:,.0f} frames/s with {num_envs} environments on {task.device} under random actions"


CHECKS: dict[str, Callable[[Task], str]] = {
    "specs": _specs_describe_the_data,
    "finite values": _data_are_finite,
    "seeding": _seeding_is_reproducible,
    "independence": _environments_are_independent,
    "partial reset": _partial_resets_are_partial,
    "resumption": _resumption_is_exact,
    "time limit": _time_limit_truncates,
    "reward scale": _reward_scale_is_learnable,
}


def _random_actions(task: Task, frames: int = _FRAMES) -> list[Tensor]:
    """[envs, agents, features] for each frame, the same on every call."""
    spec = task.make().full_action_spec[ACTION]
    with private_random_streams(task.experiment.seed, Stream.VALIDATION, task.device):
        return [spec.rand() for _ in range(frames)]


def _play(
    environment: EnvBase,
    actions: Sequence[Tensor],
    state: TensorDictBase | None = None,
    after_frame: Callable[[], object] = lambda: None,
) -> list[TensorDictBase]:
    """What followed each action, [envs] for each frame; from a state or a reset on, not resetting on the way."""
    state, frames = environment.reset() if state is None else state.clone(), []
    for action in actions:
        state = environment.step(state.set(ACTION, action))["next"]
        frames.append(state.clone())
        after_frame()
    return frames


def _until_done(frames: Sequence[TensorDictBase]) -> Tensor:
    """Which frames belong to the first episodes, [envs, time]: those up to and with the first that is done."""
    done = torch.stack([frame[DONE].squeeze(-1) for frame in frames], dim=1)
    return done.cumsum(1) - done.int() == 0


@dataclass(frozen=True)
class _Recording:
    frames: list[TensorDictBase]
    random_states: list[object]


def _play_recording(environment: EnvBase, actions: Sequence[Tensor]) -> _Recording:
    """As `_play`, with the simulator's random state after each frame."""
    drawn: list[object] = []
    return _Recording(
        _play(environment, actions, after_frame=lambda: drawn.append(simulator_random_state())), drawn
    )


def _comparable_frames(one: _Recording, other: _Recording) -> int:
    """Frames until random numbers differ, as they may: all environments draw them from one state."""
    same = [a == b for a, b in zip(one.random_states, other.random_states, strict=True)]
    return same.index(False) if False in same else len(same)


def _difference(
    first: Sequence[TensorDictBase], second: Sequence[TensorDictBase], *, tolerance: float = _TOLERANCE
) -> str:
    """The first observation or reward in which two runs differ by more than rounding; empty if none."""
    for number, (one, other) in enumerate(zip(first, second, strict=True), start=1):
        for key in (OBSERVATION, REWARD):
            if not torch.allclose(one[key], other[key], atol=tolerance, rtol=tolerance, equal_nan=True):
                return f"{key[-1]} at frame {number}"
    return ""
