"""The checks of a task, one function for each check.

A check returns one line about what it measured. It raises EnvironmentUnfit if training would fail or mislead,
and Concern if somebody should look at the task.

This file is long because a task has many checks; each of them is short.
"""

import time
from collections.abc import Callable, Mapping, Sequence
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
    constant_actions,
    entity_positions,
    groups_of,
    has_joints,
    make_environment,
    require_memory_for_batch,
)
from mappo.environment.groups import described
from mappo.environment.keys import ACTION, DONE, OBSERVATION, REWARD, TERMINATED, TRUNCATED
from mappo.environment.random_streams import (
    Stream,
    private_random_streams,
    random_states,
    set_random_states,
    simulator_random_state,
    unchanged_simulator_random_state,
)
from mappo.environment.reductions import declared_reductions, guess_reductions, is_measurement_name
from mappo.environment.reset_check import FRAMES_AFTER, check_forgetting, continue_alike
from mappo.environment.simulation_state import capture, restore
from mappo.errors import Concern, EnvironmentUnfit, SimulationStateError

_ENVS = 8  # environments of every check except speed
_FRAMES = 30  # frames of most checks
_EPISODE = 200  # frames at most until the reset at the end of an episode
_LONGEST = 1_000  # frames at most for checks that simulate whole episodes
_TOLERANCE = 1e-5  # parallel environments may round differently
_LARGE_REWARD = 1_000.0  # per frame; the critic learns larger value targets slowly
_GROWTH = 10.0  # ratio of rewards in the last and first quarter of an episode above which they count as unbounded
_SPEED_SECONDS = 1.0


_ROW_ONLY = (
    "reset_world_at(env_index) must write only row env_index of entities and attributes, unless env_index is None"
)


@dataclass(frozen=True)
class Task:
    """The configured task on a device, which builds environments for the checks."""

    experiment: ExperimentConfig
    device: torch.device

    @property
    def config(self) -> EnvironmentConfig:
        return self.experiment.environment

    def make(self, num_envs: int = _ENVS, seed_offset: int = 0) -> EnvBase:
        seed = (self.experiment.seed + seed_offset) % 2**32
        return make_environment(self.config, num_envs, seed, Stream.VALIDATION, self.device)


def environment_is_built(task: Task) -> str:
    environment = task.make()
    groups = groups_of(environment)
    agents = "; ".join(
        f"{len(group.agents)} {'agents' if len(groups) == 1 else f'in group {group.name}'}, "
        f"{described(group.shape)} each"
        for group in groups
    )
    constants = ", ".join(constant_actions(environment))
    return f"{task.config.scenario}: {agents}" + (
        f"; constants, since their range is 0: {constants}" if constants else ""
    )


def interface_is_kept(task: Task) -> str:
    """Check every result of the scenario's methods where VMAS calls them, before VMAS uses the result."""
    environment = task.make()
    scenario = environment.base_env._env.scenario
    names = environment.base_env.agent_names
    num_features = {names[agent]: group.num_features for group in groups_of(environment) for agent in group.agents}
    widest = max(num_features.values())  # for agents that no policy controls
    expected: dict[str, tuple[Callable[..., list[tuple[int, ...]]], torch.dtype]] = {
        "observation": (lambda agent, *_: [(_ENVS, num_features.get(agent.name, widest))], torch.float32),
        "reward": (lambda *_: [(_ENVS,), (_ENVS, 1)], torch.float32),
        "done": (lambda *_: [(_ENVS,)], torch.bool),
    }
    for method, (shapes, dtype) in expected.items():
        setattr(scenario, method, _checked(getattr(scenario, method), shapes, dtype))
    _play(environment, _random_actions(task))
    return f"observation, reward and done have the shape and dtype that VMAS expects, over {_FRAMES} frames"


def _checked(
    method: Callable[..., Any], shapes: Callable[..., list[tuple[int, ...]]], dtype: torch.dtype
) -> Callable[..., Any]:
    """Return the method with a check of its results' dtype and shape, which is one of `shapes(*arguments)`.

    VMAS calls the method without keywords. A call with keywords is the scenario's own, whose result is not
    checked.
    """

    def call(*arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options)
        if options:
            return result
        if not isinstance(result, Tensor):
            actual = f"a {type(result).__name__}"
        elif result.shape not in shapes(*arguments) or result.dtype != dtype:
            actual = f"{result.dtype} {list(result.shape)}".removeprefix("torch.")
        else:
            return result
        agent = "".join(f" for {argument.name}" for argument in arguments)
        expected = f"{dtype} {list(shapes(*arguments)[0])}".removeprefix("torch.")
        raise EnvironmentUnfit(
            f"{method.__name__}() returned {actual}{agent}; with {_ENVS} environments it must return "
            f"a tensor {expected}"
        )

    return call


def _specs_describe_the_data(task: Task) -> str:
    check_env_specs(task.make())
    return "shapes, dtypes and devices are those that the specs declare"


def _data_are_finite(task: Task) -> str:
    frames = _play(task.make(), _random_actions(task))
    in_episode = _until_done(frames)
    for key in (OBSERVATION, REWARD):
        values = torch.stack([frame[key] for frame in frames], dim=1)
        values = torch.where(in_episode[..., None, None], values, 0.0)
        if not values.isfinite().all():
            env, frame, agent, *_ = (~values.isfinite()).nonzero()[0].tolist()
            raise EnvironmentUnfit(
                f"the {key[-1]} of agent {agent} is {values[env, frame, agent].tolist()} at frame {frame + 1} "
                f"of environment {env} under random actions: guard the division, root or log in the scenario"
            )
    return (
        f"observations and rewards are finite over {_FRAMES} frames of {_ENVS} environments under random actions"
    )


def _seeding_is_reproducible(task: Task) -> str:
    actions = _random_actions(task)
    first, second = _play(task.make(), actions), _play(task.make(), actions)
    if difference := _difference(first, second):
        raise EnvironmentUnfit(
            f"two runs with the same seed and actions differ ({difference}): draw random numbers from torch, "
            "numpy or random, which VMAS seeds, and not from the scenario's own generators or from clocks"
        )
    start, other_start = task.make().reset()[OBSERVATION], task.make(seed_offset=1).reset()[OBSERVATION]
    if torch.equal(start, other_start):
        raise Concern(
            "the first observations do not depend on the seed: held-out episodes start like the training episodes"
        )
    return "the same seed repeats the episodes, another seed changes them"


def _environments_are_independent(task: Task) -> str:
    actions = _random_actions(task)
    comparable = []
    for env in (0, _ENVS // 2):
        changed_actions = [action.roll(1, dims=0) for action in actions]
        for changed, action in zip(changed_actions, actions, strict=True):
            changed[env] = action[env]
        plain, disturbed = _play_recording(task.make(), actions), _play_recording(task.make(), changed_actions)
        comparable.append(_comparable_frames(plain, disturbed))
        rows = [[frame[env : env + 1] for frame in run.frames[: comparable[-1]]] for run in (plain, disturbed)]
        if difference := _difference(*rows):
            raise EnvironmentUnfit(
                f"other actions in the other environments changed environment {env} ({difference}): the scenario "
                "reduces or indexes a tensor over the environments' axis"
            )
    return f"an environment does not depend on actions in the others, over {min(comparable)} frames"


def _partial_resets_are_partial(task: Task) -> str:
    """Reset environment 0 in mid-episode; the next frame of the others must not depend on the reset."""
    *first_actions, last_action = _random_actions(task, frames=6)
    undisturbed = task.make()
    first = undisturbed.reset()
    start = entity_positions(undisturbed)
    _play(undisturbed, first_actions, first)
    disturbed = task.make()  # this call seeds the random state, which both environments share, again
    state = _play(disturbed, first_actions)[-1]
    positions = entity_positions(disturbed)
    after_reset = _reset_first(disturbed, state)
    # VMAS sets row 0 of all entities to zero before it calls the scenario's reset; a missed entity stays there.
    missed = {}
    for name, position in entity_positions(disturbed).items():
        if not torch.equal(positions[name][1:], position[1:]):
            raise EnvironmentUnfit(f"resetting environment 0 moved {name} in the others: {_ROW_ONLY}")
        if start[name][0].any() and not position[0].any():
            missed[name] = start[name][0]
    if missed and _positions_matter(task, first_actions, missed):
        raise EnvironmentUnfit(
            f"resetting environment 0 left {', '.join(missed)} at the origin: reset_world_at(0) must place in "
            "row 0 every entity that reset_world_at(None) places in all rows"
        )
    with unchanged_simulator_random_state():
        plain = _play(undisturbed, [last_action], state)[0]
    reset = _play(disturbed, [last_action], after_reset)[0]
    if not has_joints(disturbed) and (difference := _difference([plain[1:]], [reset[1:]])):
        raise Concern(f"resetting environment 0 changed the others ({difference} after it): {_ROW_ONLY}")
    return "resetting one environment does not change the others" + (
        f"; it leaves {', '.join(missed)} at the origin, on which nothing depends" if missed else ""
    )


def _reset_first(environment: EnvBase, state: TensorDictBase) -> TensorDictBase:
    """Reset environment 0 alone, from `state`; draw no random numbers of the caller."""
    with unchanged_simulator_random_state():
        mask = torch.zeros(_ENVS, 1, dtype=torch.bool, device=state.device)
        mask[0] = True
        return environment.reset(state.clone().set("_reset", mask))


def _positions_matter(task: Task, actions: Sequence[Tensor], places: Mapping[str, Tensor]) -> bool:
    """Return whether what follows a reset of environment 0 depends on where it leaves these entities.

    An entity that moves or collides matters, whatever a few frames show.
    actions: the frames before the reset. places: other positions [2] of the entities.
    """
    environments = []
    for _ in range(2):
        environments.append(environment := task.make())  # this call seeds the random state again
        _reset_first(environment, _play(environment, actions)[-1])
    moved = [entity for entity in environments[1].base_env._env.world.entities if entity.name in places]
    for entity in moved:
        entity.set_pos(places[entity.name], batch_index=0)
    return any(entity.movable or entity.collide for entity in moved) or not continue_alike(
        environments, 0, _random_actions(task, frames=FRAMES_AFTER), random_states(task.device)
    )


def _resets_forget(task: Task) -> str:
    frames = min(task.config.max_episode_frames, _EPISODE)
    return check_forgetting(lambda number: task.make(seed_offset=number), _random_actions(task, frames))


def _resumption_is_exact(task: Task) -> str:
    """Capture a simulation and restore it in another environment; both must continue identically."""
    actions = _random_actions(task)
    first_actions, last_actions = actions[: _FRAMES // 3], actions[_FRAMES // 3 :]
    original, restored = task.make(), task.make(seed_offset=1)
    state = _play(original, first_actions)[-1]
    captured = capture(original, random_states=random_states(task.device))
    expected = _play(original, last_actions, state)
    advice = "keep in attributes of the scenario, its world or its entities all state that changes in an episode"
    try:
        others = restore(captured, restored)
    except SimulationStateError as error:
        raise Concern(f"a run of this task cannot be resumed: {error}; {advice}") from error
    set_random_states(others["random_states"], task.device)
    if difference := _difference(expected, _play(restored, last_actions, state), tolerance=0.0):
        raise Concern(f"a resumed run differs from an uninterrupted run ({difference} after it): {advice}")
    return f"a restored simulation continues bit-identically over {len(last_actions)} frames"


def _time_limit_truncates(task: Task) -> str:
    limit = task.config.max_episode_frames
    frames = _play(task.make(), _random_actions(task, frames=min(limit, _LONGEST)))
    truncated = torch.stack([frame[TRUNCATED].squeeze(-1) for frame in frames])  # [time, envs]
    terminated = torch.stack([frame[TERMINATED].squeeze(-1) for frame in frames])
    if truncated[: limit - 1].any():
        raise EnvironmentUnfit(f"an episode was truncated before its time limit of {limit} frames")
    if limit <= _LONGEST and not truncated[limit - 1].all():
        raise EnvironmentUnfit(f"an episode was not truncated at its time limit of {limit} frames")
    termination = terminated.int().argmax(0)
    if terminated.any(0).all() and (termination == termination[0]).all():
        _raise_for_time_limit(int(termination[0]) + 1, frames)
    num_terminated = int(terminated.any(0).sum())
    simulated = "" if limit <= _LONGEST else f" (only the first {_LONGEST} were simulated)"
    return f"truncates at {limit} frames{simulated}; {num_terminated} of {_ENVS} episodes terminated earlier"


def _raise_for_time_limit(frame: int, frames: Sequence[TensorDictBase]) -> None:
    """Raise, because every environment terminated at the same frame: the scenario has a time limit of its own.

    The critic can learn such an end only if an observation shows the time.

    Raises:
        Concern: an observation shows the time.
        EnvironmentUnfit: no observation shows the time, or every episode has only one frame.
    """
    problem = f"every environment terminated at frame {frame}, whatever the actions"
    if frame == 1:
        raise EnvironmentUnfit(f"{problem}: done() must return false while the task continues")
    observations = torch.stack([state[OBSERVATION] for state in frames[:frame]])  # [time, envs, agents, features]
    same_everywhere = (observations == observations[:, :1]).all(1)
    changing = (observations[1:] != observations[:-1]).all(0).all(0)
    if (same_everywhere.all(0) & changing).all(0).any():
        raise Concern(f"{problem}; an observation shows the time, which is correct if the task really ends there")
    raise EnvironmentUnfit(
        f"{problem}: this is a time limit, but values are not bootstrapped after a termination; remove the limit "
        f"from done() and set environment.max_episode_frames = {frame}"
    )


def _reward_scale_is_learnable(task: Task) -> str:
    num_frames = min(task.config.max_episode_frames, _LONGEST)
    frames = _play(task.make(), _random_actions(task, num_frames))
    all_rewards = torch.stack([frame[REWARD] for frame in frames], dim=1)  # [envs, time, agents, 1]
    in_episode = _until_done(frames)
    rewards = all_rewards[in_episode]
    summary = f"mean {rewards.mean():.3g}, smallest {rewards.min():.3g}, largest {rewards.max():.3g} per frame"
    sizes = [  # mean size in each quarter of the time limit
        quarter[mask].abs().mean().item()
        for quarter, mask in zip(all_rewards.chunk(4, dim=1), in_episode.chunk(4, dim=1), strict=True)
        if mask.any()
    ]
    growing = sizes[0] > 0 and all(earlier < later for earlier, later in pairwise(sizes))
    if rewards.abs().max() > _LARGE_REWARD and growing and sizes[-1] > _GROWTH * sizes[0]:
        raise EnvironmentUnfit(
            f"{summary}; rewards grow with the frame, from {sizes[0]:.3g} in the first quarter of an episode "
            f"to {sizes[-1]:.3g} in the last: bound the rewards, because no critic can learn their sum"
        )
    if rewards.abs().max() > _LARGE_REWARD:
        raise Concern(
            f"{summary}: scale rewards to about 1; the critic learns values beyond {_LARGE_REWARD:g} slowly"
        )
    if (rewards == 0).all():
        raise Concern(f"all rewards were 0 over {num_frames} frames of random actions: learning may not start")
    return summary


def _measurements_are_measured(task: Task) -> str:
    """List the numbers of `info()` that an evaluation measures, and what it leaves out."""
    environment = task.make()
    simulator = environment.base_env
    measured: dict[str, Tensor] = {}
    returned: set[object] = set()

    def look() -> None:
        measured.update(simulator.measured())
        returned.update(name for info in simulator.infos if isinstance(info, Mapping) for name in info)

    _play(environment, _random_actions(task), after_frame=look)
    reductions = declared_reductions(simulator._env.scenario)
    if reductions is None:
        guess_reductions(reductions := {}, measured)
    listed = ", ".join(f"{name} ({reduction})" for name, reduction in sorted(reductions.items())) or "none"
    if missing := sorted(reductions.keys() - measured.keys()):
        raise Concern(
            f"{listed}; info() returned no numbers [envs] named {', '.join(missing)} over {_FRAMES} frames: "
            "correct MEASUREMENTS or info()"
        )
    left_out = sorted(
        str(name) if is_measurement_name(name) else repr(name)[:80] for name in returned - reductions.keys()
    )
    return listed + (f"; left out of info(): {', '.join(left_out)}" if left_out else "")


def batch_fits_in_memory(task: Task) -> str:
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
    "forgetting": _resets_forget,
    "resumption": _resumption_is_exact,
    "time limit": _time_limit_truncates,
    "reward scale": _reward_scale_is_learnable,
    "measurements": _measurements_are_measured,
}


def _random_actions(task: Task, frames: int = _FRAMES) -> list[Tensor]:
    """Return random actions [envs, agents, features] for each frame; every call returns the same ones."""
    spec = task.make().full_action_spec[ACTION]
    with private_random_streams(task.experiment.seed, Stream.VALIDATION, task.device):
        return [spec.rand() for _ in range(frames)]


def _play(
    environment: EnvBase,
    actions: Sequence[Tensor],
    state: TensorDictBase | None = None,
    after_frame: Callable[[], object] = lambda: None,
) -> list[TensorDictBase]:
    """Return the tensordict [envs] after each action, from `state` or a reset; finished episodes continue."""
    state, frames = environment.reset() if state is None else state.clone(), []
    for action in actions:
        state = environment.step(state.set(ACTION, action))["next"]
        frames.append(state.clone())
        after_frame()
    return frames


def _until_done(frames: Sequence[TensorDictBase]) -> Tensor:
    """Return a mask [envs, time] of the frames of the first episodes, including their last frames."""
    done = torch.stack([frame[DONE].squeeze(-1) for frame in frames], dim=1)
    return done.cumsum(1) - done.int() == 0


@dataclass(frozen=True)
class _Recording:
    frames: list[TensorDictBase]
    random_states: list[object]


def _play_recording(environment: EnvBase, actions: Sequence[Tensor]) -> _Recording:
    """Call `_play` and record the simulator's random state after each frame."""
    states: list[object] = []
    return _Recording(
        _play(environment, actions, after_frame=lambda: states.append(simulator_random_state())), states
    )


def _comparable_frames(first: _Recording, second: _Recording) -> int:
    """Return the number of frames with equal random states.

    The states may differ later without a mistake, because all environments draw from one state.
    """
    is_equal = [a == b for a, b in zip(first.random_states, second.random_states, strict=True)]
    return is_equal.index(False) if False in is_equal else len(is_equal)


def _difference(
    first: Sequence[TensorDictBase], second: Sequence[TensorDictBase], *, tolerance: float = _TOLERANCE
) -> str:
    """Return the first observation or reward that differs by more than `tolerance`, or an empty text."""
    for number, (frame, other_frame) in enumerate(zip(first, second, strict=True), start=1):
        for key in (OBSERVATION, REWARD):
            if not torch.allclose(frame[key], other_frame[key], atol=tolerance, rtol=tolerance, equal_nan=True):
                return f"{key[-1]} at frame {number}"
    return ""
