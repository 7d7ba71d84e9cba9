"""The check that a pure step equals plain VMAS in every frame of a rollout, and where episodes end."""

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment.keys import ACTION, OBSERVATION, REWARD, TERMINATED
from mappo.environment.random_streams import random_states, set_random_states
from mappo.errors import NotFaithful
from mappo.fast_simulation.pure_step import PureStep, StepState
from mappo.fast_simulation.slots import changed_slots, copies, find_slots, replaced_owners, same_bits, signatures

_ROUNDING = 1e-6  # tolerance for a traced graph, relative to the largest number of the state
_ROUNDING_COMPILED = 1e-5  # larger, because compilers reorder operations and contact amplifies the difference
_EXCUSED, _EXCUSED_RATIO = 8, 2e-4  # numbers of a whole rollout that may exceed the tolerance in a compiled step
_CHECKED_FRAMES = 60
_HELD_FRAMES = 7  # frames that repeat a random action, so that agents move far enough to touch
_RESETS = 8  # finished environments that are reset after a frame, one by one; further ones continue to play


def find_reset_slots(environment: EnvBase, step: PureStep) -> frozenset[str]:
    """Return the slots of the state that a reset overwrites; a reset must leave all other slots unchanged.

    The function compares resets from two states with the same random numbers. In the second state, every number
    differs from the first state.

    Raises:
        NotFaithful: a reset depends on the state before it; a reset of one environment differs from a reset
        of all
            environments, or changes other environments; or an observation changes the state.
    """
    slots, row = find_slots(environment), environment.batch_size[0] // 2
    simulator = environment.base_env._env
    simulator.reset()
    original = copies(slots, step.names)
    altered = {path: _altered(value) for path, value in original.items()}
    operations = (
        simulator.reset,
        lambda: simulator.reset_at(row),
        lambda: simulator.get_from_scenario(True, False, True, True),
    )
    states = random_states(environment.device)
    results = []
    for operation in operations:
        for start in (original, altered):
            set_random_states(states, environment.device)
            for path, value in start.items():
                slots[path].put(value.clone())
            operation()
            results.append(copies(slots, step.names))
    simulator.reset()
    return frozenset(
        path
        for path in step.names
        if _is_reset(path, original, altered, [result[path] for result in results], row)
    )


def _is_reset(path: str, original: StepState, altered: StepState, results: list[Tensor], row: int) -> bool:
    """Return whether resets refresh this slot.

    results: the slot after a full reset, a one-row reset and an observation, from both starting states.
    """
    starts = original[path], altered[path]
    is_kept = all(same_bits(start, result) for start, result in zip(starts, results[:2], strict=True))
    others = [index for index in range(len(starts[0])) if index != row]
    if not is_kept and not same_bits(*results[:2]):
        raise NotFaithful(f"a reset depends on the state before it: {path}")
    rows = [value[row] for value in (results[2:4] if not is_kept else [*starts, *results[2:4]])]
    pairs = list(zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True))
    if not all(same_bits(one, other) for one, other in pairs):
        raise NotFaithful(f"a reset of one environment differs from a reset of all environments: {path}")
    if not all(
        same_bits(start[others], result[others]) for start, result in zip(starts, results[2:4], strict=True)
    ):
        raise NotFaithful(f"a reset of one environment changes others: {path}")
    if not all(same_bits(start, result) for start, result in zip(starts, results[4:], strict=True)):
        raise NotFaithful(f"an observation changes the state: {path}")
    return not is_kept


def _altered(value: Tensor) -> Tensor:
    """Return a tensor that differs from `value` in every element."""
    return ~value if value.dtype == torch.bool else value + 1


def check_steps(environment: EnvBase, *steps: PureStep, frames: int = _CHECKED_FRAMES) -> None:
    """Play a rollout with plain VMAS, with resets of some environments, and compare the pure steps in each frame.

    Differences by rounding are allowed. In a compiled step, a few numbers in ten thousand may differ more,
    because contact amplifies rounding and thresholds may be near. The traced graph has no such allowance;
    pass the graph as a step, too.

    Raises:
        NotFaithful: state, observations, rewards or flags differ by more than rounding explains.
    """
    slots, names = find_slots(environment), steps[0].names
    carried = environment.reset()
    constants = signatures({path: slots[path] for path in steps[0].constants})
    num_compared, num_excused = 0, [0] * len(steps)
    for index in range(frames):
        if index % _HELD_FRAMES == 0:
            action = environment.rand_action(carried)[ACTION]
        state = copies(slots, names)
        result = environment.step(carried.set(ACTION, action))["next"]
        expected = _by_name(copies(slots, names), result[OBSERVATION], result[REWARD], result[TERMINATED])
        num_compared += sum(value.numel() for value in expected.values())
        for number, step in enumerate(steps):
            num_wrong, description = _differences(_by_name(*step(state, action)), expected, _rounding(step, state))
            num_excused[number] += num_wrong
            allowed = max(_EXCUSED, _EXCUSED_RATIO * num_compared) if step.is_compiled else 0
            if num_excused[number] > allowed:
                raise NotFaithful(f"{description} differ after frame {index + 1} of the check")
        finished = result["done"] & (result["done"].cumsum(0) <= _RESETS)
        finished[index % len(finished)] = True
        carried = environment.reset(result.exclude(REWARD).set("_reset", finished))
        if written := changed_slots(constants, {path: slots[path] for path in steps[0].constants}):
            raise NotFaithful(f"a frame or a reset writes to a slot that was constant before: {min(written)}")
    if replaced := replaced_owners(environment, slots):
        raise NotFaithful(f"the scenario replaces an object, though not in every frame: {min(replaced)}")


def _by_name(state: StepState, observation: Tensor, reward: Tensor, terminated: Tensor) -> dict[str, Tensor]:
    return {**state, "observation": observation, "reward": reward, "terminated": terminated}


def _rounding(step: PureStep, state: StepState) -> float:
    """Return the tolerance below which numbers count as equal."""
    ratio = _ROUNDING_COMPILED if step.is_compiled else _ROUNDING
    return ratio * max([1.0, *(_largest(value) for value in state.values())])


def _differences(actual: dict[str, Tensor], expected: dict[str, Tensor], rounding: float) -> tuple[int, str]:
    """Return how many numbers differ by more than `rounding`, and a description of the first difference."""
    num_wrong, description = 0, ""
    for name, value in expected.items():
        result = actual[name]
        if result.shape != value.shape or result.dtype != value.dtype:
            kinds = f"{list(result.shape)} {result.dtype} instead of {list(value.shape)} {value.dtype}"
            raise NotFaithful(f"{name} is {kinds}")
        close = torch.isclose(result.double(), value.double(), rtol=rounding, atol=rounding, equal_nan=True)
        if num_differing := int((~close).sum()):
            index = tuple((~close).nonzero()[0].tolist())
            numbers = f"{num_differing} of {close.numel()} numbers"
            description = (
                description or f"{name}: {result[index].item()!r} instead of {value[index].item()!r}; {numbers}"
            )
            num_wrong += num_differing
    return num_wrong, description


def _largest(value: Tensor) -> float:
    return float(value.double().abs().nan_to_num(0.0, 0.0, 0.0).max()) if value.numel() else 0.0
