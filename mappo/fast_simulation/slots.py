"""Where a VMAS environment keeps its tensors, and what else it keeps."""

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

_DRAWN = ("_color", "_render")  # attributes that only rendering looks at


@dataclass(frozen=True)
class Slot:
    """An attribute that holds a tensor, or a container in which keys lead to one.

    Containers are looked up each time: VMAS makes the dictionaries of forces anew in every step.
    """

    owner: Any
    attribute: str
    keys: tuple[Any, ...] = ()

    def get(self) -> Tensor:
        """The tensor that is there now."""
        value = reduce(getitem, self.keys, attributes(self.owner)[self.attribute])
        assert isinstance(value, Tensor)
        return value

    def put(self, value: Tensor) -> None:
        """Past setters, which VMAS uses to check and to tell observers."""
        if self.keys:
            *outer, last = self.keys
            reduce(getitem, outer, attributes(self.owner)[self.attribute])[last] = value
        else:
            set_attribute(self.owner, self.attribute, value)


Slots = dict[str, Slot]  # by path, such as world._agents[0]._state._pos


def find_slots(environment: EnvBase) -> Slots:
    """All slots that a walk finds: of a simulation that was reset and stepped, which makes some of them.

    Tensors in tuples are not among them, as these cannot be replaced.
    """
    return {
        f"{place}.{name}{path}": Slot(owner, name, keys)
        for place, owner in reachable(environment).items()
        if not isinstance(owner, list | dict | set | deque)
        for name, value in attributes(owner).items()
        for path, keys in _tensors_in(value)
    }


def signatures(slots: Slots) -> dict[str, tuple[Tensor, int]]:
    """By path, which tensor is there and how often it was written into: compare by `changed`."""
    return {path: (slot.get(), slot.get()._version) for path, slot in slots.items()}


def changed(before: dict[str, tuple[Tensor, int]], slots: Slots) -> set[str]:
    """The slots that hold another tensor than before, or one that was written into."""
    now = signatures(slots)
    return {
        path for path, (tensor, version) in before.items() if now[path][0] is not tensor or now[path][1] != version
    }


def replaced_owners(environment: EnvBase, slots: Slots) -> set[str]:
    """The slots whose objects are not those that are used now: they lead nowhere."""
    now = find_slots(environment)
    return {path for path, slot in slots.items() if path not in now or now[path].owner is not slot.owner}


def shared_memory(slots: Slots, path: str) -> str | None:
    """Another slot whose tensor shares memory with that of `path`."""
    memory = slots[path].get().untyped_storage()._cdata
    same = [name for name, slot in slots.items() if slot.get().untyped_storage()._cdata == memory and name != path]
    return same[0] if same else None


def copies(slots: Slots, paths: Iterable[str]) -> dict[str, Tensor]:
    """Copies of what is there now."""
    return {path: slots[path].get().clone() for path in paths}


def other_content(environment: EnvBase) -> dict[str, Any]:
    """All that is not in tensors, by path: numbers, text, arrays, which object is where."""
    state = capture(environment)
    content: dict[str, Any] = {}
    for place, (_, inside) in state.structure["objects"].items():
        if not place.endswith(_DRAWN):
            _flatten(inside, place, state.tensors, content)
    return content


def _tensors_in(value: Any) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Paths and keys to the tensors in nested lists and dictionaries, or to the value if it is one."""
    if isinstance(value, Tensor):
        yield "", ()
    elif isinstance(value, list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for index, (key, item) in enumerate(items):
            for path, keys in _tensors_in(item):
                yield f"[{index}]{path}", (key, *keys)


def _flatten(value: Any, path: str, memories: dict[str, Tensor], content: dict[str, Any]) -> None:
    """What `capture` wrote, as one entry for each number or word; tensors are left out."""
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
    """Whether two tensors hold the same, NaN being equal to NaN."""
    return one.shape == other.shape and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
