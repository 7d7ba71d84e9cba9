"""The slots in which a VMAS environment keeps its tensors, and its content outside of tensors."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment.simulation_state import capture
from mappo.environment.state_walk import attributes, reachable, set_attribute

_DRAWN = ("_color", "_render")  # attributes that only rendering reads


@dataclass(frozen=True)
class Slot:
    """The location of a tensor: an attribute, or an attribute with a container and the keys to the tensor in it.

    `get` and `put` look the container up in every call, because VMAS creates new dictionaries of forces in
    every step.
    """

    owner: Any
    attribute: str
    keys: tuple[Any, ...] = ()

    def get(self) -> Tensor:
        """Return the current tensor."""
        value = reduce(getitem, self.keys, attributes(self.owner)[self.attribute])
        assert isinstance(value, Tensor)
        return value

    def put(self, value: Tensor) -> None:
        """Set the tensor directly, without the setters by which VMAS checks values and notifies observers."""
        if self.keys:
            *outer, last = self.keys
            reduce(getitem, outer, attributes(self.owner)[self.attribute])[last] = value
        else:
            set_attribute(self.owner, self.attribute, value)


Slots = dict[str, Slot]  # by path, such as world._agents[0]._state._pos


def find_slots(environment: EnvBase) -> Slots:
    """Return all slots that a walk through the environment finds.

    Reset and step the environment before, because some slots exist only after that. Tensors in tuples are
    left out, because they cannot be replaced.
    """
    return {
        f"{owner_path}.{name}{path}": Slot(owner, name, keys)
        for owner_path, owner in reachable(environment).items()
        if not isinstance(owner, list | dict | set | deque)
        for name, value in attributes(owner).items()
        for path, keys in _tensors_in(value)
    }


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


def replaced_owners(environment: EnvBase, slots: Slots) -> set[str]:
    """Return the slots whose object is no longer part of the environment, because another one replaced it."""
    current = find_slots(environment)
    return {path for path, slot in slots.items() if path not in current or current[path].owner is not slot.owner}


def shared_memory(slots: Slots, path: str) -> str | None:
    """Return another slot whose tensor shares memory with the tensor of `path`, or None."""
    memory = slots[path].get().untyped_storage()._cdata
    others = [
        name for name, slot in slots.items() if slot.get().untyped_storage()._cdata == memory and name != path
    ]
    return others[0] if others else None


def copies(slots: Slots, paths: Iterable[str]) -> dict[str, Tensor]:
    """Return copies of the current tensors of some slots."""
    return {path: slots[path].get().clone() for path in paths}


def other_content(environment: EnvBase) -> dict[str, Any]:
    """Return by path all content that is not in tensors: numbers, text, arrays and references to objects."""
    state = capture(environment)
    content: dict[str, Any] = {}
    for path, (_, object_content) in state.structure["objects"].items():
        if not path.endswith(_DRAWN):
            _flatten(object_content, path, state.tensors, content)
    return content


def _tensors_in(value: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the path and the keys of each tensor in nested lists and dictionaries; the value may be a tensor."""
    if isinstance(value, Tensor):
        yield "", ()
    elif isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for index, (key, item) in enumerate(items):
            for path, keys in _tensors_in(item):
                yield f"[{index}]{path}", (key, *keys)


def _flatten(value: Any, path: str, memories: dict[str, Tensor], content: dict[str, Any]) -> None:
    """Add to `content` an entry for each number and text in a captured value; the data of tensors is left out."""
    if isinstance(value, dict) and "tensor" in value:
        content[path] = "a tensor"
    elif isinstance(value, dict) and "array" in value:
        content[path] = memories[value["array"]["memory"]].tolist()
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in _DRAWN:
                _flatten(item, f"{path}.{name}", memories, content)
    elif isinstance(value, list):
        content[f"{path}.length"] = len(value)
        for index, item in enumerate(value):
            _flatten(item, f"{path}[{index}]", memories, content)
    else:
        content[path] = value


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, with NaN equal to NaN."""
    return one.shape == other.shape and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
