"""The check of resets: what a reset overwrites, and how fresh states may be made.

On the plain path, VMAS resets a finished environment alone. On the fast path, a finished environment takes a fresh
state that another environment may have made, before. Both are the same if

- a reset of one environment depends neither on the state before it nor on the number of the environment,
- it leaves the other environments as they are, or does to them what `side_effects` traces, and
- the first observation depends only on what the reset overwrites.

Fresh states are made for all environments at once by VMAS's full reset if that draws the same distribution, and
independently for each environment. Otherwise each fresh state is made by a reset of one environment.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment.draws import least_probability, numbers_of
from mappo.environment.keys import ACTION
from mappo.environment.random_streams import random_states, set_random_states
from mappo.environment.state_walk import same_bits
from mappo.environment.vmas_environment import stacked
from mappo.errors import NotFaithful
from mappo.fast_simulation.pure_step import PureStep, StepState
from mappo.fast_simulation.python_state import find_slots
from mappo.fast_simulation.side_effects import SideEffect, trace_side_effect
from mappo.fast_simulation.slots import copies, put_copies, view_of
from mappo.fast_simulation.watch import Watch

_DRAWS = 24  # full resets whose numbers are compared; after each, `_ROWS` environments are reset alone
_ALTERED_DRAWS = 12  # of them, full resets that are repeated from an altered state
_ROWS = 8  # environments that are reset alone, in turns
_PLAYED_FRAMES = 5  # frames in which a number must show that it matters
_MIXTURES = 8  # random sums of all numbers of a state, which show how numbers go together
_ROUNDING = 1e-5  # by which VMAS computes the joint of a reset environment in two ways
_UNLIKELY = 1e-6  # probability by chance below which environments count as different
_SUSPICIOUS = 1e-4  # probability below which full resets are not used; by mistake, this only costs time


@dataclass(frozen=True)
class Resets:
    """The effect of resets.

    names: the slots of the state that a reset overwrites.
    one_by_one: whether fresh states must be made by resets of one environment.
    side_effect: what a reset of one environment does to the others.
    """

    names: frozenset[str]
    one_by_one: bool
    side_effect: SideEffect


class ResetCheck:
    """The comparison of resets from states of a rollout and from the same states with other numbers.

    It needs no graph, so it comes before tracing, which takes longer.
    """

    def __init__(self, environment: EnvBase, varying: frozenset[str]):
        """Draw resets of all environments and of one environment alone.

        varying: the slots that steps or resets write.

        Raises:
            NotFaithful: resets change what is not in slots, or fail, or the state cannot be captured.
        """
        self._environment, self._simulator = environment, environment.base_env._env
        self._slots, self._names = find_slots(environment), sorted(varying)
        self._problems: dict[str, str] = {}  # by slot, a reason why it may not be part of the state
        self._kept: set[str] = set()  # slots that no reset overwrites
        self._side_effect = SideEffect()
        self._is_lasting = True
        self._changed_in_others: set[str] = set()  # slots to which a reset of one environment writes in others
        self._resets_alone: list[tuple[int, StepState, StepState]] = []  # its number, the slots before and after
        self._overwritten: set[str] = set()  # slots that each reset overwrites, whatever they were before
        self._full: list[StepState] = []  # the slots after each full reset
        self._alone: list[tuple[int, StepState]] = []  # a reset environment's number, and its row of the slots
        self._rows = sorted({int(row) for row in np.linspace(0, environment.batch_size[0] - 1, _ROWS)})
        watch = Watch(environment)
        for draw in range(_DRAWS):
            self._draw(draw, 10.0 ** (draw % 6 - 1) if draw < _ALTERED_DRAWS else None)
            watch.require_unchanged()
            if draw == _ALTERED_DRAWS:
                self._find_side_effect()
                self._refuse_early()

    def _find_side_effect(self) -> None:
        """Trace what resets of one environment did to others, and compare; note problems."""
        names = sorted(self._changed_in_others - self._problems.keys())
        if not names:
            return
        try:
            if kept := {*names} - self._overwritten:
                raise NotFaithful(f"not every reset overwrites {min(kept)}")
            effect = trace_side_effect(self._environment, self._slots, self._names, names)
            self._compare_side_effect(effect)
        except NotFaithful as reason:
            for name in names:
                self._problems[name] = f"a reset of one environment changes others: {name}; {reason}"
        else:
            self._side_effect = effect

    def _compare_side_effect(self, effect: SideEffect) -> None:
        for row, before, after in self._resets_alone:
            others = [index for index in range(self._environment.batch_size[0]) if index != row]
            for name, value in effect(before).items():
                if not same_bits(value[others], after[name][others]):
                    raise NotFaithful("how, depends on more than the state")
        self._is_lasting = all(  # whether a state that was just reset stays as it is when another is reset
            torch.allclose(value, state[name], 0.0, _ROUNDING)
            for state in self._full
            for name, value in effect(state).items()
        )

    def _refuse_early(self) -> None:
        """Refuse the scenario if a slot that may not be part of the state changes what agents see or get."""
        for name, problem in sorted(self._problems.items()):
            self._simulator.reset()
            start = copies(self._slots, self._names)
            action = self._environment.rand_action()[ACTION]
            outputs, states = [], random_states(self._environment.device)
            for value in (start[name], _altered(start[name], 1.0)):
                set_random_states(states, self._environment.device)
                put_copies(self._slots, {**start, name: value})
                outputs.append([self._play(action) for _ in range(_PLAYED_FRAMES)])
            if not all(
                same_bits(one, other)
                for frame, changed in zip(*outputs, strict=True)
                for one, other in zip(frame, changed, strict=True)
            ):
                raise NotFaithful(problem)

    def resets(self, step: PureStep) -> Resets:
        """Return what resets do to the state of a step.

        Raises:
            NotFaithful: a reset of one environment depends on the state before it or on the environment, or
                changes other environments; or the first observation depends on what resets keep.
        """
        if unknown := {*step.names, *step.observed} - {*self._names}:
            raise NotFaithful(f"only some frames write to {min(unknown)}")
        for name in step.names:
            if name in self._problems:
                raise NotFaithful(self._problems[name])
        if kept := step.observed - self._overwritten:
            raise NotFaithful(f"the first observation after a reset depends on what resets keep: {min(kept)}")
        names = frozenset(step.names) - self._kept
        effect = self._side_effect.on(names)
        if missing := effect.needed - {*step.names}:
            raise NotFaithful(f"what a reset of one environment does to others depends on {min(missing)}")
        if not self._is_lasting and (changed := {*effect.names} & step.observed):
            raise NotFaithful(f"the first observation depends on later resets of others: {min(changed)}")
        return Resets(names, self._must_be_one_by_one(sorted(names | step.observed)), effect)

    def _draw(self, draw: int, magnitude: float | None) -> None:
        """Play a frame, and from its state reset all environments, and some environments alone.

        magnitude: if given, also reset from a state in which all numbers are others, of about this size.
        """
        row = self._rows[draw % len(self._rows)]
        self._play(self._environment.rand_action()[ACTION])
        start = copies(self._slots, self._names)
        states = random_states(self._environment.device)
        alone, full = (self._after(reset, start, states) for reset in self._resets(row))
        self._full.append(full)
        if magnitude is not None:
            self._compare_altered(row, magnitude, start, (full, alone), states)
        for other in self._rows:
            self._simulator.reset_at(other, return_observations=False)
            values = {name: self._slots[name].get() for name in self._names}
            values = {name: value[other].clone() for name, value in values.items() if self._has_rows(value)}
            self._alone.append((other, values))

    def _compare_altered(
        self,
        row: int,
        magnitude: float,
        start: StepState,
        results: tuple[StepState, StepState],
        states: dict[str, Any],
    ) -> None:
        """Repeat resets from a state in which all numbers are others, of about this size, and note problems."""
        full, alone = results
        self._resets_alone.append((row, start, alone))
        altered = self._altered_state(start, magnitude)
        observed, alone_too, full_too = (
            self._after(operation, altered, states) for operation in (self._observe, *self._resets(row))
        )
        self._resets_alone.append((row, altered, alone_too))
        for name in self._names:
            pairs = [(start[name], altered[name]), (full[name], full_too[name]), (alone[name], alone_too[name])]
            problem = self._compare(name, pairs, row)
            if not same_bits(altered[name], observed[name]):
                problem = f"an observation changes the state: {name}"
            if problem:
                self._problems.setdefault(name, problem)

    def _altered_state(self, state: StepState, magnitude: float) -> StepState:
        """Return a state in which all numbers are others; slots that hold the same tensor get the same numbers."""
        put_copies(self._slots, state)
        made: dict[object, Tensor] = {}
        for path, value in state.items():
            made.setdefault(view_of(self._slots[path].get()), _altered(value, magnitude))
        return {path: made[view_of(self._slots[path].get())] for path in state}

    def _play(self, action: Tensor) -> tuple[Tensor, ...]:
        actions = self._environment.base_env.read_action(action.clone())
        return stacked(*self._simulator.step(actions)[:3])

    def _resets(self, row: int) -> tuple[Callable[[], object], Callable[[], object]]:
        return (
            lambda: self._simulator.reset_at(row, return_observations=False),
            lambda: self._simulator.reset(return_observations=False),
        )

    def _observe(self) -> None:
        self._simulator.get_from_scenario(True, False, True, True)

    def _after(self, operation: Callable[[], object], start: StepState, states: dict[str, Any]) -> StepState:
        """Return the slots after an operation from a state, with these random numbers."""
        set_random_states(states, self._environment.device)
        put_copies(self._slots, start)
        try:
            operation()
        except Exception as error:  # a scenario is foreign code, and numbers that it never has may be impossible
            raise NotFaithful(f"a reset fails from another state: {type(error).__name__}: {error}") from error
        return copies(self._slots, self._names)

    def _compare(self, name: str, pairs: list[tuple[Tensor, Tensor]], row: int) -> str:
        """Compare a slot before, after a full reset and after a reset of `row`; each from two states.

        Return a reason why the slot may not be part of the state, or an empty text.
        """
        before, full, alone = pairs
        is_first = len(self._full) == 1
        is_kept = all(same_bits(*pair) for pair in zip(before, full, strict=True))
        is_overwritten = same_bits(*full) and self._has_rows(alone[0]) and same_bits(alone[0][row], alone[1][row])
        for is_true, names in ((is_kept, self._kept), (is_overwritten, self._overwritten)):
            if is_true and is_first:
                names.add(name)
            elif not is_true and name in names:
                names.remove(name)
        if not is_kept and not same_bits(*full):
            return f"a reset depends on the state before it: {name}"
        if is_kept != (name in self._kept):
            return f"a reset overwrites {name} in some episodes and keeps it in others"
        if not self._has_rows(before[0]):
            return "" if is_kept else f"environments share state: {name}"
        others = [index for index in range(len(before[0])) if index != row]
        if not all(same_bits(start[others], result[others]) for start, result in zip(before, alone, strict=True)):
            self._changed_in_others.add(name)
        elif is_kept and not all(same_bits(*pair) for pair in zip(before, alone, strict=True)):
            return f"a reset of one environment differs from a reset of all environments: {name}"
        if not is_kept and not is_overwritten:
            return f"a reset of one environment differs from a reset of all environments: {name}"
        return ""

    def _has_rows(self, value: Tensor) -> bool:
        """Return whether a tensor has a row for each environment; a colour, for example, has none."""
        return value.ndim > 0 and len(value) == self._environment.batch_size[0]

    def _must_be_one_by_one(self, names: list[str]) -> bool:
        """Return whether full resets draw other states than resets of one environment, or not independent ones.

        Raises:
            NotFaithful: resets of one environment differ by environment.
        """
        if not names:
            return False
        rows = sorted({row for row, _ in self._alone})
        full = np.stack([numbers_of({name: state[name][rows] for name in names}) for state in self._full])
        alone = np.stack([numbers_of({name: state[name][None] for name in names})[0] for _, state in self._alone])
        mixtures = np.random.default_rng(0).normal(size=(full.shape[-1], _MIXTURES))
        full, alone = (np.concatenate([numbers, numbers @ mixtures], -1) for numbers in (full, alone))
        by_row = [alone[[index for index, (row, _) in enumerate(self._alone) if row == each]] for each in rows]
        if least_probability(by_row) < _UNLIKELY:
            raise NotFaithful("environments differ: a reset of one environment depends on its number")
        one_of_each = full[np.arange(len(full)), np.arange(len(full)) % len(rows)]  # [draws, numbers]
        is_same = least_probability([one_of_each, alone]) > _SUSPICIOUS
        is_independent = least_probability([*full]) > _SUSPICIOUS
        is_interchangeable = least_probability([*full.swapaxes(0, 1)]) > _SUSPICIOUS
        return not (is_same and is_independent and is_interchangeable)


def _altered(value: Tensor, magnitude: float) -> Tensor:
    """Return a tensor of finite numbers of about this size, which differs from `value` in every element."""
    if value.dtype == torch.bool:
        return ~value
    if not value.is_floating_point():
        return value + torch.randint_like(value, 1, 4)
    number = magnitude * (0.5 + torch.rand_like(value)) * torch.randn_like(value).sign()
    number = number.float().to(value.dtype)  # a scenario may convert numbers to 32 bits
    return torch.where(number == value, 2 * number, number)
