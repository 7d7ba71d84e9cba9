"""Whether a pure step does what plain VMAS does: in every frame of a trial, and where episodes end."""

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment import ACTION, OBSERVATION, REWARD, TERMINATED, random_states, set_random_states
from mappo.pure_step import NotFaithful, PureStep, State
from mappo.slots import changed, copies, find_slots, replaced_owners, same_bits, signatures

_ROUNDING = 1e-6  # how far a graph may be from what it records, relative to the largest number of the state
_ROUNDING_COMPILED = 1e-5  # compilers reorder, and contact amplifies
_EXCUSED, _EXCUSED_RATIO = 8, 2e-4  # numbers of a whole trial that may be further off, compiled
_CHECKED_FRAMES = 60
_HELD_FRAMES = 7  # random actions are kept for as long, so that agents get somewhere


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


def _is_reset(path: str, before: State, nonsense: State, results: list[Tensor], row: int) -> bool:
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


def check_steps(environment: EnvBase, step: PureStep, frames: int = _CHECKED_FRAMES) -> None:
    """Play on plainly, with resets of some environments on the way, and compare each frame with the pure step.

    Rounding is allowed for. Compiled, it may also take a few numbers in ten thousand further, where contact
    amplifies it or a threshold is near; the graph itself, which is checked before, may not.

    Raises:
        NotFaithful: state, observations, rewards or flags differ by more than rounding explains.
    """
    slots = find_slots(environment)
    carried = environment.reset()
    constants = signatures({path: slots[path] for path in step.constants})
    compared = excused = 0
    for index in range(frames):
        if index % _HELD_FRAMES == 0:
            action = environment.rand_action(carried)[ACTION]
        before = copies(slots, step.names)
        played = environment.step(carried.set(ACTION, action))["next"]
        state, *shown = step(before, action)
        pairs = [(path, state[path], slots[path].get()) for path in step.names]
        expected = (played[OBSERVATION], played[REWARD], played[TERMINATED])
        pairs += zip(("observation", "reward", "terminated"), shown, expected, strict=True)
        rounding = _ROUNDING_COMPILED if step.is_compiled else _ROUNDING
        rounding *= max([1.0, *(_largest(value) for value in before.values())])
        for name, found, plain in pairs:
            compared += plain.numel()
            if difference := _difference(found, plain, rounding):
                excused += difference[0]
                if not step.is_compiled or excused > max(_EXCUSED, _EXCUSED_RATIO * compared):
                    raise NotFaithful(f"{name} differs after frame {index + 1} of a trial: {difference[1]}")
        finished = played["done"].clone()
        finished[index % len(finished)] = True
        carried = environment.reset(played.exclude(REWARD).set("_reset", finished))
        if written := changed(constants, {path: slots[path] for path in step.constants}):
            raise NotFaithful(f"it is written into, though rarely: {min(written)}")
    if replaced := replaced_owners(environment, slots):
        raise NotFaithful(f"it replaces objects, though rarely: {min(replaced)}")


def _difference(found: Tensor, plain: Tensor, rounding: float) -> tuple[int, str] | None:
    """How many numbers differ by more than rounding, and the first of them in words."""
    if found.shape != plain.shape or found.dtype != plain.dtype:
        raise NotFaithful(f"it is {list(found.shape)} {found.dtype}, and not {list(plain.shape)} {plain.dtype}")
    close = torch.isclose(found.double(), plain.double(), rtol=rounding, atol=rounding, equal_nan=True)
    wrong = int((~close).sum())
    if not wrong:
        return None
    index = tuple((~close).nonzero()[0].tolist())
    return wrong, (
        f"it is {found[index].item()!r} and not {plain[index].item()!r}; {wrong} of {close.numel()} numbers differ"
    )


def _largest(value: Tensor) -> float:
    return float(value.double().abs().nan_to_num(0.0, 0.0, 0.0).max()) if value.numel() else 0.0
