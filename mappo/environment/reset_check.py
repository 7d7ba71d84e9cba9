"""The check that a reset of one environment forgets the episode before it, as a reset of all environments does."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment.random_streams import random_states, set_random_states
from mappo.environment.state_walk import same_bits, tensors_by_path
from mappo.errors import Concern, EnvironmentUnfit

FRAMES_AFTER = 5  # frames after a reset in which something that is kept must show that it matters


def check_forgetting(make: Callable[[int], EnvBase], actions: Sequence[Tensor]) -> str:
    """Reset an environment at the end of an episode, and with the same random numbers one that has not played.

    make: makes an environment of the task; another number gives other random numbers.
    actions: [envs, agents, features] for each frame of an episode.

    Raises:
        Concern: something is kept over episodes, and observations, rewards or done depend on it.
        EnvironmentUnfit: a reset of one environment keeps what a reset of all overwrites, or done() stays true.
    """
    row, num_frames = _play_to_end(make(0), actions)
    histories: list[tuple[int, Sequence[Tensor]]] = [(0, actions[:num_frames]), (1, [])]
    environments = [_played(make, *history) for history in histories]
    states = random_states(environments[0].device)
    before = [_rows(environment, row) for environment in environments]
    for environment in environments:
        _reset(environment, row, states)
    alone = [_rows(environment, row) for environment in environments]
    full = []
    for history in histories:
        environment = _played(make, *history)
        _reset(environment, None, states)
        full.append(_rows(environment, row))

    played_differently = {path for path in before[0].keys() & before[1].keys() if not _are_same(before, path)}
    overwritten_by_full = {path for path in played_differently if _are_same(full, path)}
    overwritten = {path for path in played_differently if _are_same(alone, path)}
    if forgotten := sorted(overwritten_by_full - overwritten):
        raise EnvironmentUnfit(
            f"resetting environment {row} alone keeps {', '.join(forgotten)} of the episode before, but resetting "
            "all environments does not: reset_world_at(env_index) must reset row env_index of the same attributes"
        )
    kept = sorted(played_differently - overwritten_by_full - overwritten)
    first, other = environments
    if _is_done(first, row) and not _is_done(other, row):
        guilty = [path for path in kept if not _is_done_with(first, row, path, alone[1][path])]
        raise EnvironmentUnfit(
            f"done() is true right after a reset of environment {row}, because no reset clears "
            f"{', '.join(guilty or kept)}; reset_world_at(env_index) must clear it"
        )
    if not continue_alike(environments, row, actions[:FRAMES_AFTER], states):
        raise Concern(
            f"resets keep {', '.join(kept) or 'something outside of tensors'} of the episode before, and "
            "observations, rewards or done depend on it; if episodes should be independent, "
            "reset_world_at(env_index) must reset it"
        )
    return f"a reset of one environment forgets the {num_frames} frames before it"


def _play_to_end(environment: EnvBase, actions: Sequence[Tensor]) -> tuple[int, int]:
    """Return the first environment whose episode ends, and its frames; else environment 0 and all frames."""
    environment.reset()
    for number, action in enumerate(actions, 1):
        done = _step(environment, action)[2]
        if done.any():
            return int(done.int().argmax()), number
    return 0, len(actions)


def _played(make: Callable[[int], EnvBase], number: int, actions: Iterable[Tensor]) -> EnvBase:
    environment = make(number)
    environment.reset()
    for action in actions:
        _step(environment, action)
    return environment


def _step(environment: EnvBase, action: Tensor) -> Any:
    """Play a frame of VMAS itself by an action [envs, agents, features]; return what `step` of VMAS returns."""
    return environment.base_env._env.step(environment.base_env.read_action(action.clone()))


def _reset(environment: EnvBase, row: int | None, states: dict[str, Any]) -> None:
    set_random_states(states, environment.device)
    simulator = environment.base_env._env
    simulator.reset() if row is None else simulator.reset_at(row)


def _rows(environment: EnvBase, row: int) -> dict[str, Tensor]:
    """Return copies of one row of every tensor [envs, ...] that attributes hold, by path."""
    return {path: tensor[row].clone() for path, tensor in tensors_by_path(environment).items()}


def _are_same(pair: list[dict[str, Tensor]], path: str) -> bool:
    one, other = (tensors.get(path) for tensors in pair)
    return one is other if one is None or other is None else same_bits(one, other)


def _is_done(environment: EnvBase, row: int) -> bool:
    return bool(environment.base_env._env.scenario.done()[row])


def _is_done_with(environment: EnvBase, row: int, path: str, value: Tensor) -> bool:
    """Return whether an environment is done if one of its tensors has this value."""
    tensor = tensors_by_path(environment)[path]
    old = tensor[row].clone()
    tensor[row] = value
    is_done = _is_done(environment, row)
    tensor[row] = old
    return is_done


def continue_alike(
    environments: Sequence[EnvBase], row: int, actions: Sequence[Tensor], states: dict[str, Any]
) -> bool:
    """Return whether a row of two environments sees and gets the same in the next frames, by the same actions.

    actions: [envs, agents, features] for each frame. states: the random states from which both play.
    """
    outputs: list[list[Tensor]] = []
    for environment in environments:
        simulator = environment.base_env._env
        set_random_states(states, environment.device)
        seen = [*simulator.get_from_scenario(True, False, False, False)[0]]
        for action in actions:
            observations, rewards, done, _ = _step(environment, action)
            seen += [*observations, *rewards, done]
        outputs.append([tensor[row].clone() for tensor in seen])
    return all(same_bits(one, other) for one, other in zip(*outputs, strict=True))
