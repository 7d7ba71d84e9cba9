"""The slots in which a VMAS environment keeps its tensors."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

from torch import Tensor

from mappo.environment.state_walk import attributes, same_bits, set_attribute
from mappo.errors import NotFaithful


class Attribute(NamedTuple):
    """The name of an attribute among the keys of a slot."""

    name: str


@dataclass(frozen=True)
class Slot:
    """The location of a tensor: an attribute, or an attribute and the keys and attributes that lead to the tensor.

    `get` and `put` follow them in every call, because VMAS creates new dictionaries of forces in every step, and
    scenarios create new objects in every reset.
    """

    owner: Any
    attribute: str
    keys: tuple[Any, ...] = ()

    def get(self) -> Tensor:
        """Return the current tensor."""
        value = reduce(_follow, self.keys, attributes(self.owner)[self.attribute])
        assert isinstance(value, Tensor)
        return value

    def put(self, value: Tensor) -> None:
        """Set the tensor directly, without the setters by which VMAS checks values and notifies observers."""
        if self.keys:
            *outer, last = self.keys
            owner = reduce(_follow, outer, attributes(self.owner)[self.attribute])
            if isinstance(last, Attribute):
                set_attribute(owner, last.name, value)
            else:
                owner[last] = value
        else:
            set_attribute(self.owner, self.attribute, value)


def _follow(value: Any, key: Any) -> Any:
    return attributes(value)[key.name] if isinstance(key, Attribute) else value[key]


Slots = dict[str, Slot]  # by path, such as world._agents[0]._state._pos


def signatures(slots: Slots) -> dict[str, tuple[Tensor, int]]:
    """Return by path the tensor of each slot and its version, which counts writes; compare by `changed_slots`."""
    return {path: (slot.get(), slot.get()._version) for path, slot in slots.items()}


def changed_slots(previous: dict[str, tuple[Tensor, int]], slots: Slots) -> set[str]:
    """Return the slots whose tensor was replaced or written to since the `previous` signatures."""
    current = signatures(slots)
    return {
        path
        for path, (tensor, version) in previous.items()
        if current[path][0] is not tensor or current[path][1] != version
    }


def shared_memory(slots: Slots, path: str) -> set[str]:
    """Return the other slots whose tensors share memory with the tensor of `path`."""
    memory = slots[path].get().untyped_storage()._cdata
    return {name for name, slot in slots.items() if slot.get().untyped_storage()._cdata == memory} - {path}


def copies(slots: Slots, paths: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of the current tensors of some slots."""
    return {path: slots[path].get().clone() for path in paths}


def put_copies(slots: Slots, tensors: dict[str, Tensor]) -> None:
    """Put copies of tensors into their slots. Slots that hold the same view of a memory share one copy."""
    made: dict[object, Tensor] = {}
    for path, value in tensors.items():
        copy = made.setdefault(view_of(slots[path].get()), value.clone())
        slots[path].put(copy if same_bits(copy, value) else value.clone())


def view_of(tensor: Tensor) -> object:
    """Return what two tensors have in common that are the same view of the same memory."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype


def require_unwritten(before: dict[str, tuple[Tensor, int]], constants: Slots) -> None:
    """Compare constants with their signatures `before`.

    Raises:
        NotFaithful: one was replaced or written to.
    """
    if written := changed_slots(before, constants):
        raise NotFaithful(f"a frame or a reset writes to a slot that was constant before: {min(written)}")
