"""Whether a pure step does what plain VMAS does: in every frame of a trial, and where episodes end."""

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment.keys import ACTION, OBSERVATION, REWARD, TERMINATED
from mappo.environment.random_streams import random_states, set_random_states
from mappo.errors import NotFaithful
from mappo.fast_simulation.pure_step import PureStep, StepState
from mappo.fast_simulation.slots import changed, copies, find_slots, replaced_owners, same_bits, signatures

_ROUNDING = 1e-6  # how far a graph may be from what it records, relative to the largest number of the state
_ROUNDING_COMPILED = 1e-5  # compilers reorder, and contact amplifies
_EXCUSED, _EXCUSED_RATIO = 8, 2e-4  # numbers of a whole trial that may be further off, compiled
_CHECKED_FRAMES = 60
_HELD_FRAMES = 7  # random actions are kept for as long, so that agents get somewhere
_RESETS = 8  # of finished environments after a frame, which VMAS resets one by one; the others play on


def slots_of_resets(environment: EnvBase, step: PureStep) -> frozenset[str]:
    """Which slots of the state a reset gives a fresh value; it leaves the others as they are.

    Resets are compared that differ in nothing but the state before them, which in one case is nonsense.

    Raises:
        NotFaithful: what is fresh depends on what was before, a reset of one environment does something else than
            one of all, or something to others; or an observation changes the state.
    """
    slots, row = find_slots(environment), environment.batch_size[0] // 2
    simulator = environment.base_env._env
    simulator.reset()
    before = copies(slots, step.names)
    nonsense = {path: _nonsense(value) for path, value in before.items()}
    ways = (
        simulator.reset,
        lambda: simulator.reset_at(row),
        lambda: simulator.get_from_scenario(True, False, True, True),
    )
    states = random_states(environment.device)
    results = []
    for way in ways:
        for start in (before, nonsense):
            set_random_states(states, environment.device)
            for path, value in start.items():
                slots[path].put(value.clone())
            way()
            results.append(copies(slots, step.names))
    simulator.reset()
    return frozenset(
        path for path in step.names if _is_reset(path, before, nonsense, [each[path] for each in results], row)
    )


def _is_reset(path: str, before: StepState, nonsense: StepState, results: list[Tensor], row: int) -> bool:
    """Of one slot: after a reset of all, a reset of one row, an observation, each from both starts."""
    starts = before[path], nonsense[path]
    is_kept = all(same_bits(start, after) for start, after in zip(starts, results[:2], strict=True))
    others = [index for index in range(len(starts[0])) if index != row]
    if not is_kept and not same_bits(*results[:2]):
        raise NotFaithful(f"a reset depends on the state before it: {path}")
    rows = [each[row] for each in (results[2:4] if not is_kept else [*starts, *results[2:4]])]
    pairs = list(zip(rows[: len(rows) // 2], rows[len(rows) // 2 :], strict=True))
    if not all(same_bits(one, other) for one, other in pairs):
        raise NotFaithful(f"a reset of one environment is not like a reset of all: {path}")
    if not all(same_bits(start[others], after[others]) for start, after in zip(starts, results[2:4], strict=True)):
        raise NotFaithful(f"a reset of one environment changes others: {path}")
    if not all(same_bits(start, after) for start, after in zip(starts, results[4:], strict=True)):
        raise NotFaithful(f"an observation changes the state: {path}")
    return not is_kept


def _nonsense(value: Tensor) -> Tensor:
    """Another value in every element."""
    return ~value if value.dtype == torch.bool else value + 1


def check_steps(environment: EnvBase, *steps: PureStep, frames: int = _CHECKED_FRAMES) -> None:
    """Play on plainly, with resets of some environments on the way, and compare each frame with the pure steps.

    Rounding is allowed for. Compiled, it may also take a few numbers in ten thousand further, where contact
    amplifies it or a threshold is near; the graph itself, which is to be given too, may not.

    Raises:
        NotFaithful: state, observations, rewards or flags differ by more than rounding explains.
    """
    slots, names = find_slots(environment), steps[0].names
    carried = environment.reset()
    constants = signatures({path: slots[path] for path in steps[0].constants})
    compared, excused = 0, [0] * len(steps)
    for index in range(frames):
        if index % _HELD_FRAMES == 0:
            action = environment.rand_action(carried)[ACTION]
        before = copies(slots, names)
        played = environment.step(carried.set(ACTION, action))["next"]
        plain = _by_name(copies(slots, names), played[OBSERVATION], played[REWARD], played[TERMINATED])
        compared += sum(value.numel() for value in plain.values())
        for number, step in enumerate(steps):
            wrong, first = _differences(_by_name(*step(before, action)), plain, _rounding(step, before))
            excused[number] += wrong
            allowed = max(_EXCUSED, _EXCUSED_RATIO * compared) if step.is_compiled else 0
            if excused[number] > allowed:
                raise NotFaithful(f"{first} differ after frame {index + 1} of a trial")
        finished = played["done"] & (played["done"].cumsum(0) <= _RESETS)
        finished[index % len(finished)] = True
        carried = environment.reset(played.exclude(REWARD).set("_reset", finished))
        if written := changed(constants, {path: slots[path] for path in steps[0].constants}):
            raise NotFaithful(f"it is written into, though rarely: {min(written)}")
    if replaced := replaced_owners(environment, slots):
        raise NotFaithful(f"it replaces objects, though rarely: {min(replaced)}")


def _by_name(state: StepState, observation: Tensor, reward: Tensor, terminated: Tensor) -> dict[str, Tensor]:
    return {**state, "observation": observation, "reward": reward, "terminated": terminated}


def _rounding(step: PureStep, before: StepState) -> float:
    """How far numbers may be apart, and be called equal."""
    ratio = _ROUNDING_COMPILED if step.is_compiled else _ROUNDING
    return ratio * max([1.0, *(_largest(value) for value in before.values())])


def _differences(found: dict[str, Tensor], plain: dict[str, Tensor], rounding: float) -> tuple[int, str]:
    """How many numbers differ by more than rounding, and the first of them in words."""
    wrong, first = 0, ""
    for name, value in plain.items():
        got = found[name]
        if got.shape != value.shape or got.dtype != value.dtype:
            kinds = f"{list(got.shape)} {got.dtype}, and not {list(value.shape)} {value.dtype}"
            raise NotFaithful(f"{name} is {kinds}")
        close = torch.isclose(got.double(), value.double(), rtol=rounding, atol=rounding, equal_nan=True)
        if differing := int((~close).sum()):
            index = tuple((~close).nonzero()[0].tolist())
            numbers = f"{differing} of {close.numel()} numbers"
            first = first or f"{name}: {got[index].item()!r} and not {value[index].item()!r}; {numbers}"
            wrong += differing
    return wrong, first


def _largest(value: Tensor) -> float:
    return float(value.double().abs().nan_to_num(0.0, 0.0, 0.0).max()) if value.numel() else 0.0
