"""The check that a pure step equals plain VMAS in every frame of a rollout, and where episodes end."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment.keys import ACTION
from mappo.environment.state_walk import same_bits
from mappo.environment.vmas_environment import stacked
from mappo.errors import NotFaithful
from mappo.fast_simulation.pure_step import PureStep, StepState
from mappo.fast_simulation.python_state import find_slots
from mappo.fast_simulation.resets import Resets
from mappo.fast_simulation.slots import Slots, copies, require_unwritten, signatures
from mappo.fast_simulation.step_draws import StepDraws, recorded_draws, require_like
from mappo.fast_simulation.watch import Watch

# Tolerances, relative to the largest number that this place of a tensor holds in any environment, and to 1.
_ROUNDING = 1e-6  # for a traced graph, whose operations are VMAS's own
_ROUNDING_COMPILED = 1e-4  # larger: compilers reorder operations, and rewards and contact amplify that
_ROUNDING_ELSEWHERE = 1e-4  # for an environment in another place, where another part of a vector computes it
_EXCUSED, _EXCUSED_RATIO = 8, 2e-4  # numbers of a whole rollout that may exceed the tolerance in a compiled step
_DISTURBANCES, _AMPLIFIED = 4, 16.0  # states that differ by rounding; a step rounds more often than they do
_INEXACT_RATIO = 0.01  # of a frame's numbers, which a graph on a CPU may round in another way; few CPUs do
_CHECKED_FRAMES = 40
_ROTATION_INTERVAL = 2  # frames of which one is also computed with environments in other places
_HELD_FRAMES = 7  # frames that repeat a random action, so that agents move far enough to touch
_RESETS = 8  # finished environments that are reset after a frame, one by one; further ones continue to play


@dataclass(frozen=True)
class PlainFrame:
    """A frame of plain VMAS: the state [envs, ...] and the action before it, its draws, its results by name."""

    state: StepState
    action: Tensor
    drawn: StepDraws
    results: dict[str, Tensor]


def first_frame(environment: EnvBase) -> PlainFrame:
    """Reset an environment that is new and play its first frame by a random action."""
    environment.reset()
    slots, action = find_slots(environment), environment.rand_action()[ACTION]
    return play_frame(environment, slots, tuple(slots), action)


def play_frame(environment: EnvBase, slots: Slots, names: tuple[str, ...], action: Tensor) -> PlainFrame:
    """Play one frame of plain VMAS from the state in the slots.

    Raises:
        NotFaithful: the step draws random numbers that cannot be drawn again.
    """
    state = copies(slots, names)
    with recorded_draws(environment.device) as drawn:
        actions = environment.base_env.read_action(action.clone())
        observations, rewards, terminated, _ = environment.base_env._env.step(actions)
    results = stacked(observations, rewards, terminated)
    return PlainFrame(state, action, drawn, _by_name(copies(slots, names), *(value.clone() for value in results)))


def check_first_frame(step: PureStep, frame: PlainFrame) -> None:
    """Compare a step with the first frame of an environment, in which Python may do what it does only once.

    Raises:
        NotFaithful: the frame differs, or the scenario makes a part of the state in it.
    """
    if missing := set(step.names) - frame.state.keys():
        raise NotFaithful(f"the first frame makes a part of the state: {min(missing)}")
    expected = {name: value for name, value in frame.results.items() if name in step.names or name in _OUTPUTS}
    state = {name: frame.state[name] for name in step.names}
    require_like(step.draws, frame.drawn.draws)
    results = _by_name(*step(state, frame.action, frame.drawn.numbers))
    num_wrong, description = _differences(step, results, expected)
    if num_wrong:
        raise NotFaithful(f"{description} differ in the first frame")


def check_steps(environment: EnvBase, resets: Resets, *steps: PureStep, frames: int = _CHECKED_FRAMES) -> None:
    """Play a rollout with plain VMAS, with resets of some environments, and compare the pure steps in each frame.

    Differences by rounding are allowed. In a compiled step, a few numbers in ten thousand may differ more,
    because contact amplifies rounding and thresholds may be near. The traced graph has no such allowance;
    pass the graph as the first step, too.

    Raises:
        NotFaithful: state, observations, rewards or flags differ by more than rounding explains, environments
            are not interchangeable, or a frame or a reset changes what it must not change.
    """
    environment.reset()
    watch, slots, names = Watch(environment), find_slots(environment), steps[0].names
    simulator, (num_envs,) = environment.base_env._env, environment.batch_size
    constants = {path: slots[path] for path in steps[0].constants}
    constants_before = signatures(constants)
    num_compared, num_moved, num_excused = 0, 0, [0] * len(steps)
    for index in range(frames):
        if index % _HELD_FRAMES == 0:
            action = environment.rand_action()[ACTION]
        frame = play_frame(environment, slots, names, action)
        num_compared += sum(value.numel() for value in frame.results.values())
        for number, step in enumerate(steps):
            num_wrong, description = compare_frame(step, frame)
            num_excused[number] += num_wrong
            if num_excused[number] > (allowed_differences(num_compared) if step.is_compiled else 0):
                raise NotFaithful(f"{description} differ after frame {index + 1} of the check")
        if index % _ROTATION_INTERVAL == 0:
            num_wrong, description = _compare_rotated(steps[0], frame, 1 + index % max(1, num_envs - 1))
            num_moved += num_wrong
            if num_moved > allowed_differences(num_compared):
                raise NotFaithful(f"environments differ: {description} differ in another place")
        finished = frame.results["terminated"].squeeze(-1)
        for row in {index % num_envs, *finished.nonzero().flatten().tolist()[:_RESETS]}:
            before = copies(slots, names)
            simulator.reset_at(row, return_observations=False)
            check_reset(before, copies(slots, names), resets, row)
        watch.require_unchanged()
        require_unwritten(constants_before, constants)


def compare_frame(step: PureStep, frame: PlainFrame) -> tuple[int, str]:
    """Return how many numbers of a pure step differ from a frame of plain VMAS, and the first difference.

    Raises:
        NotFaithful: the frame draws other random numbers than the step.
    """
    require_like(step.draws, frame.drawn.draws)
    results = _by_name(*step(frame.state, frame.action, frame.drawn.numbers))
    num_wrong, description = _differences(step, results, frame.results)
    if num_wrong and step.is_compiled:
        return differences(results, frame.results, _ROUNDING_COMPILED, _reach_of_rounding(step, frame))
    return num_wrong, description


def _reach_of_rounding(step: PureStep, frame: PlainFrame) -> dict[str, Tensor]:
    """Return by how much results may differ because of rounding, for each number.

    Stiff contacts and joints amplify. So the traced graph computes the frame from states that differ by rounding.
    """
    graph, reach = step.as_graph(), dict[str, Tensor]()
    for _ in range(_DISTURBANCES):
        state = {
            name: value * (1 + torch.finfo(value.dtype).eps * torch.randn_like(value))
            if value.is_floating_point()
            else value
            for name, value in frame.state.items()
        }
        results = _by_name(*graph(state, frame.action, frame.drawn.numbers))
        for name, value in results.items():
            change = (value.double() - frame.results[name].double()).abs().nan_to_num(0.0, 0.0)
            reach[name] = torch.maximum(reach.get(name, change), _AMPLIFIED * change)
    return reach


def _differences(step: PureStep, results: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[int, str]:
    """Return how many results differ by more than rounding, and the first difference.

    A traced graph on a CPU computes the same bits, but for a few numbers that another part of a vector computes.
    """
    num_wrong, description = differences(results, expected, _ROUNDING_COMPILED if step.is_compiled else _ROUNDING)
    if not num_wrong and not step.is_compiled and expected["reward"].device.type == "cpu":
        num_inexact, description = differences(results, expected, 0.0)
        if num_inexact > max(_EXCUSED, _INEXACT_RATIO * sum(value.numel() for value in expected.values())):
            return num_inexact, description
    return num_wrong, description


def allowed_differences(num_compared: int) -> float:
    """Return how many of the numbers of a compiled step may differ by more than rounding."""
    return max(_EXCUSED, _EXCUSED_RATIO * num_compared)


def _compare_rotated(step: PureStep, frame: PlainFrame, places: int) -> tuple[int, str]:
    """Return how many numbers a step gives otherwise to environments in other places, and the first difference."""

    def rotated(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.roll(places, 0) for name, value in tensors.items()}

    num_envs = len(frame.action)
    numbers = [
        value.roll(places, 0) if value.ndim and len(value) == num_envs else value for value in frame.drawn.numbers
    ]
    results = _by_name(*step(rotated(frame.state), frame.action.roll(places, 0), numbers))
    return differences(results, rotated(frame.results), _ROUNDING_ELSEWHERE)


def check_reset(before: StepState, after: StepState, resets: Resets, row: int) -> None:
    """Compare states before and after a reset of one environment.

    Raises:
        NotFaithful: the reset changes a slot that resets keep, or other environments in another way than its side
            effect.
    """
    for name, value in {**before, **resets.side_effect(before)}.items():
        expected = value.clone()
        if name in resets.names:
            expected[row] = after[name][row]
        if not same_bits(expected, after[name]):
            raise NotFaithful(f"a reset of one environment changes others: {name}")


_OUTPUTS = "observation", "reward", "terminated"


def _by_name(state: StepState, observation: Tensor, reward: Tensor, terminated: Tensor) -> dict[str, Tensor]:
    return {**state, **dict(zip(_OUTPUTS, (observation, reward, terminated), strict=True))}


def differences(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    rounding: float,
    reach: dict[str, Tensor] | None = None,
) -> tuple[int, str]:
    """Return how many numbers differ by more than `rounding`, and a description of the first difference.

    rounding: relative to the largest finite number at the same place in any environment, and to 1.
    reach: further differences that are allowed, for each number.
    """
    num_wrong, description = 0, ""
    for name, value in expected.items():
        result = actual[name]
        if result.shape != value.shape or result.dtype != value.dtype:
            kinds = f"{list(result.shape)} {result.dtype} instead of {list(value.shape)} {value.dtype}"
            raise NotFaithful(f"{name} is {kinds}")
        close = _are_close(result.double(), value.double(), rounding)
        if reach:
            close |= (result.double() - value.double()).abs() <= reach[name]
        if num_differing := int((~close).sum()):
            index = tuple((~close).nonzero()[0].tolist())
            numbers = f"{num_differing} of {close.numel()} numbers"
            description = (
                description or f"{name}: {result[index].item()!r} instead of {value[index].item()!r}; {numbers}"
            )
            num_wrong += num_differing
    return num_wrong, description


def _are_close(result: Tensor, expected: Tensor, rounding: float) -> Tensor:
    same = (result == expected) | (result.isnan() & expected.isnan())
    finite = expected.abs().nan_to_num(0.0, 0.0, 0.0)
    tolerance = rounding * finite.amax(0, keepdim=True).clamp(min=1.0) if finite.numel() else finite
    return same | ((result - expected).abs() <= tolerance)
