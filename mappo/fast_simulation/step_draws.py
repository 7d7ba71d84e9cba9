"""The random numbers that a step draws from torch: they become inputs of its graph.

Each operation that draws becomes a `Draw`, which repeats it for the next frame, so that the distribution is the
same. The graph takes what the draws return. A frame of plain VMAS is compared with a graph that takes the numbers
which VMAS drew in this frame.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mappo.environment.random_streams import (
    random_states,
    same_random_states,
    set_random_states,
    simulator_random_state,
)
from mappo.environment.state_walk import same_bits
from mappo.errors import NotFaithful
from mappo.fast_simulation.source_lines import location


@dataclass(frozen=True)
class Draw:
    """A call of an operation that draws random numbers.

    operation: an operation of torch, such as `aten.rand.default` or `aten.uniform_.default`.
    args, kwargs: its arguments. If the operation fills its first argument or takes the shape from it, this is
        any tensor of that shape.
    location: the line that called the operation.
    """

    operation: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    location: str

    def __call__(self) -> Tensor:
        """Draw from torch's default generator."""
        args = self.args
        if self.operation._schema.is_mutable:
            args = _of_shape(args[0]), *args[1:]
        numbers: Tensor = self.operation(*args, **self.kwargs)
        return numbers

    def is_like(self, other: "Draw") -> bool:
        """Return whether the other draw has the same operation, shape and distribution."""
        start = _num_shapes(self.operation)
        own, structure = tree_flatten((self.args[start:], self.kwargs))
        others, other_structure = tree_flatten((other.args[start:], other.kwargs))
        return (
            self.operation is other.operation
            and structure == other_structure
            and all(map(_is_same, own, others))
            and all(map(_is_of_same_shape, self.args[:start], other.args[:start]))
        )


@dataclass
class StepDraws:
    """The draws of one step of plain VMAS in their order, and the numbers that they gave."""

    draws: list[Draw] = field(default_factory=list)
    numbers: list[Tensor] = field(default_factory=list)


def require_like(draws: Sequence[Draw], others: Sequence[Draw]) -> None:
    """Compare the draws of two steps.

    Raises:
        NotFaithful: what a step draws depends on the state.
    """
    for draw, other in zip(draws, others, strict=False):
        if not draw.is_like(other):
            raise NotFaithful(f"a step does not always draw the same random numbers ({draw.location})")
    if len(draws) != len(others):
        place = max(draws, others, key=len)[min(len(draws), len(others))].location
        raise NotFaithful(f"only some steps draw random numbers here: {place}")


@contextmanager
def recorded_draws(device: torch.device) -> Iterator[StepDraws]:
    """Record what a step of plain VMAS draws in the block, and repeat the draws after it, to compare.

    Raises:
        NotFaithful: the step draws random numbers that the repetition does not give, because they come from numpy,
            from Python or from a generator of the scenario, or because the step sets a random state.
    """
    step, before = StepDraws(), random_states(device)
    vmas_before = simulator_random_state()
    with _Recorder(step):
        yield step
    after, vmas_after = random_states(device), simulator_random_state()
    for source, old, new in zip(("numpy", "Python's random module"), vmas_before[1:], vmas_after[1:], strict=True):
        if old != new:
            raise NotFaithful(f"a step draws random numbers from {source}")
    with same_random_states(device):
        set_random_states({**before, "torch": before["vmas"][0]}, device)
        for draw, numbers in zip(step.draws, step.numbers, strict=True):
            if not same_bits(draw(), numbers):
                raise NotFaithful(f"a random number cannot be drawn again ({draw.location})")
        repeated = random_states(device)
    is_same = torch.equal(repeated["torch"], after["vmas"][0])
    if repeated["cuda"] is not None:
        is_same &= torch.equal(repeated["cuda"], after["cuda"])
    if not is_same:
        raise NotFaithful("a step draws random numbers from torch that cannot be drawn again, or sets its seed")


@contextmanager
def replayed_draws(numbers: Sequence[Tensor], is_traced: Callable[[Tensor], bool]) -> Iterator[None]:
    """Give these numbers to the operations in the block that draw random numbers, in their order.

    is_traced: whether a tensor is computed from an input of the function that is traced.

    Raises:
        NotFaithful: the block draws others, or a distribution depends on an input.
    """
    with _Replay(numbers, is_traced):
        yield


def _is_drawing(operation: Any) -> bool:
    """Return whether an operation of torch draws random numbers."""
    return torch.Tag.nondeterministic_seeded in operation.tags


def _num_shapes(operation: Any) -> int:
    """Return how many of the first arguments matter by their shapes alone, such as x in `uniform_(x)`."""
    return int(operation._schema.is_mutable or "_like" in operation._schema.name)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, step: StepDraws):
        super().__init__()  # type: ignore[no-untyped-call]
        self._step = step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_drawing(func):
            if any(isinstance(value, torch.Generator) for value in (*args, *(kwargs or {}).values())):
                raise NotFaithful(f"a step draws random numbers from a generator of its own ({location()})")
            if not isinstance(result, Tensor) or func._schema.overload_name.endswith("out"):
                raise NotFaithful(f"a step draws random numbers: {func} ({location()})")
            start = _num_shapes(func)
            shapes = (_of_shape(tensor) for tensor in args[:start])
            values = (_copy(value) for value in args[start:])
            keywords = {name: _copy(value) for name, value in (kwargs or {}).items()}
            self._step.draws.append(Draw(func, (*shapes, *values), keywords, location()))
            self._step.numbers.append(result.clone())
        return result


class _Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, numbers: Sequence[Tensor], is_traced: Callable[[Tensor], bool]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._numbers, self._is_traced = iter(numbers), is_traced

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_drawing(func):
            return func(*args, **(kwargs or {}))
        start = _num_shapes(func)
        for value in tree_flatten((args[start:], kwargs))[0]:
            if isinstance(value, Tensor) and self._is_traced(value):
                raise NotFaithful(f"the distribution of a random number depends on the state ({location()})")
        number = next(self._numbers, None)
        if number is None:
            raise NotFaithful(f"only some steps draw random numbers here: {location()}")
        return args[0].copy_(number) if func._schema.is_mutable else number.clone()


def _of_shape(tensor: Tensor) -> Tensor:
    """Return a tensor with the shape, the strides, the type and the device of another."""
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _is_same(value: Any, other: Any) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.dtype == other.dtype and same_bits(value, other)
    return type(value) is type(other) and bool(value == other)


def _is_of_same_shape(tensor: Tensor, other: Tensor) -> bool:
    return (tensor.shape, tensor.stride(), tensor.dtype) == (other.shape, other.stride(), other.dtype)
