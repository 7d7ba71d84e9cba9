"""The comparison of what Python can read: before and after a step, and in two environments made alike."""

import hashlib
import types
from typing import Any

from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment.state_walk import same_bits
from mappo.errors import NotFaithful
from mappo.fast_simulation.python_state import Identity, PythonState, read_python_state


class Watch:
    """A guard that raises if a scenario keeps state elsewhere than in slots."""

    def __init__(self, environment: EnvBase):
        self._environment = environment
        self._before = read_python_state(environment)
        self._versions = {path: tensor._version for path, tensor in self._before.fixed.items()}

    def require_unchanged(self) -> None:
        """Compare everything that Python can reach with the first reading.

        Raises:
            NotFaithful: something differs that is not the number in a slot.
        """
        now = read_python_state(self._environment)
        if path := self._before.difference(now):
            old, new = self._before.content.get(path), now.content.get(path)
            if old and new and type(old[-1]) is Identity and old[:-1] == new[:-1]:
                raise NotFaithful(f"the scenario replaces objects, and not only tensors: {path}")
            raise NotFaithful(f"the scenario keeps state outside of tensors: {path}")
        for path, tensor in self._before.fixed.items():
            if now.fixed.get(path) is not tensor or tensor._version != self._versions[path]:
                raise NotFaithful(f"the scenario keeps a tensor where it cannot be replaced: {path}")


def require_equal(state: PythonState, twin: PythonState) -> None:
    """Compare the readings of two environments that were made in the same way.

    Raises:
        NotFaithful: they hold different things, apart from the numbers in tensors.
    """

    def content(reading: PythonState) -> dict[str, Any]:
        return {
            path: tuple(item for item in value if type(item) is not Identity)
            for path, value in reading.content.items()
        }

    own, others = content(state), content(twin)
    if own != others:
        path = next(path for path in {**own, **others} if own.get(path) != others.get(path))
        raise NotFaithful(f"each environment has a value of its own: {path}")


def constant_tensors(state: PythonState, constants: frozenset[str]) -> dict[str, Tensor]:
    """Return the tensors of a reading that never change, by path: those that are no slots, and these slots."""
    return {**state.fixed, **{path: slot.get() for path, slot in state.slots.items() if path in constants}}


def differing_tensor(tensors: dict[str, Tensor], twins: dict[str, Tensor]) -> str | None:
    """Return the first path at which the constant tensors of two environments differ, or None.

    Tensors that only one of the environments has are left out.
    """
    common = sorted(tensors.keys() & twins.keys())
    return next((path for path in common if not same_bits(tensors[path], twins[path])), None)


def require_equal_tensors(tensors: dict[str, Tensor], twins: dict[str, Tensor]) -> None:
    """Compare the constant tensors of two environments as `differing_tensor` does.

    Raises:
        NotFaithful: a tensor differs.
    """
    if path := differing_tensor(tensors, twins):
        raise NotFaithful(f"each environment has numbers of its own: {path}")


def digest_of(reading: PythonState) -> str:
    """Return a SHA-256 of all that a reading holds but for identities and tensors' numbers.

    It is the same in every process.
    """
    text = "\n".join(f"{path} {_text(value)}" for path, value in reading.content.items())
    return hashlib.sha256(text.encode()).hexdigest()


def _text(value: Any) -> str:
    match value:
        case Identity():
            return ""
        case tuple() | list():
            return f"({', '.join(map(_text, value))})"
        case frozenset():
            return f"({', '.join(sorted(map(_text, value)))})"
        case type():
            return f"{value.__module__}.{value.__qualname__}"
        case types.ModuleType():
            return value.__name__
        case types.CodeType():
            names = value.co_names, value.co_varnames, value.co_freevars, value.co_cellvars
            numbers = value.co_flags, value.co_argcount, value.co_posonlyargcount, value.co_kwonlyargcount
            return f"{names} {numbers} {value.co_code!r} {value.co_exceptiontable!r} {_text(value.co_consts)}"
    return repr(value)
