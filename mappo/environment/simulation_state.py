"""The simulator's state as plain data: captured from a VMAS environment, restored in another of the same task.

VMAS keeps its state in objects: positions and velocities of entities, and the scenario's own attributes.
`capture` walks from the world and the scenario through every attribute, list and dictionary, breadth first.
`restore` writes the captured state into a new environment, and both simulations then continue
bit-identically. Slots that share one object, tensor or memory share it after `restore`, too, since VMAS and
scenarios write into tensors in place.

The walk reaches only objects that attributes refer to. It does not reach variables in closures or globals of
modules. `mappo validate` compares a restored simulation with the original and warns if they differ.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchrl.envs import EnvBase

from mappo.environment.state_walk import (
    CONTAINERS,
    GENERATORS,
    NUMBERS,
    SCALARS,
    Walk,
    attributes,
    class_name_of,
    reachable,
    require_class,
    roots,
    set_attribute,
)
from mappo.errors import SimulationStateError, one_line

_MAX_ELEMENTS = 1 << 28  # of a view that repeats elements; a view of more would take minutes to copy


@dataclass
class SimulationState:
    """The captured state: numbers in `tensors`, all other data in `structure`, which is JSON.

    An entry of `tensors` is one memory [elements], which several tensors of the structure may view.
    """

    structure: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def capture(environment: EnvBase, **others: Any) -> SimulationState:
    """Copy the state of a simulation and `others`: nested tensors, arrays, lists, dicts and scalars."""
    return _capture(dict(roots(environment)), others)


def capture_values(**others: Any) -> SimulationState:
    """Copy nested tensors, arrays, lists, dicts and scalars, without a simulation."""
    return _capture({}, others)


def _capture(roots: dict[str, Any], others: dict[str, Any]) -> SimulationState:
    walk = Walk()
    structure = {
        "simulation": {name: walk.walk(root, name) for name, root in roots.items()},
        "others": {name: walk.walk(value, name) for name, value in others.items()},
    }
    return SimulationState({**structure, "objects": walk.objects, "views": walk.views}, walk.memories())


def restore(state: SimulationState, environment: EnvBase) -> dict[str, Any]:
    """Write a captured simulation into a new environment of the same task and return the captured `others`.

    The environment is reset and stepped once first, so that it has the objects that the captured simulation
    had.

    Raises:
        SimulationStateError: the environment lacks objects of the captured simulation, or the data does not
            have the format of `capture`. The environment must not be used afterwards.
    """
    environment.rand_step(environment.reset())
    return _restore(state, reachable(environment), environment.device)


def restore_values(state: SimulationState) -> dict[str, Any]:
    """Return the `others` of `capture_values`.

    Raises:
        SimulationStateError: the data does not have the format of `capture_values`.
    """
    return _restore(state, {}, None)


def _restore(state: SimulationState, live_objects: dict[str, Any], device: torch.device | None) -> dict[str, Any]:
    try:
        decoder = _Decoder(state, live_objects, device)
        decoder.fill_objects()
        return {name: decoder.decode(value, name) for name, value in state.structure["others"].items()}
    except SimulationStateError:
        raise
    except Exception as error:  # any JSON may be in the structure, so that anything can fail
        raise SimulationStateError(
            f"not a captured simulation: {type(error).__name__}: {one_line(error)}"
        ) from error


class _Decoder:
    """The inverse of `Walk`: it decodes captured values and writes them into the live objects."""

    def __init__(self, state: SimulationState, live_objects: dict[str, Any], device: torch.device | None):
        self._state, self._live_objects, self._device = state, live_objects, device
        self._objects: dict[str, Any] = state.structure["objects"]
        self._memories: dict[tuple[str, bool], Tensor] = {}
        self._views: dict[int, Tensor] = {}
        self._targets: dict[str, Any] = {}  # the live or new object for each captured object, by path

    def decode(self, value: Any, path: str, current: Any = None) -> Any:
        """Decode a value; `current`, the live value at the path, replaces values that cannot be captured."""
        if type(value) in SCALARS:
            return value
        ((kind, content),) = dict.items(value)
        match kind:
            case "float":
                return float(str(content))
            case "tensor":
                return self._tensor(content)
            case "array":
                return self._array(**content)
            case "number":
                return self._array(**content)[()]
            case "object":
                return self._object(content)
            case "frozenset":
                return frozenset(self.decode(item, path) for item in content)
            case "tuple":
                return self._tuple(content, path, current)
            case "enum":
                require_class(current, content[0], path)
                return type(current)[content[1]]
            case "kept":
                require_class(current, content, path)
                return current
        raise SimulationStateError(f"{path}: {one_line(repr(kind))} is not a kind of value")

    def fill_objects(self) -> None:
        """Write the captured content into every object, in reverse order of the walk.

        An inner object is thus complete before an outer one uses it: for example, the dictionary that holds a
        generator's state is filled before the generator's state is set.
        """
        for path, (_, content) in reversed(list(self._objects.items())):
            self._fill(self._object(path), content, path)

    def _object(self, path: str) -> Any:
        """Return the live object at a path. Missing containers are created; other objects must exist."""
        if path not in self._targets:
            class_name = self._objects[path][0]
            value = self._live_objects.get(path)
            if class_name_of(value) != class_name and class_name in CONTAINERS.values():
                value = next(kind for kind, name in CONTAINERS.items() if name == class_name)()
            require_class(value, class_name, path)
            self._targets[path] = value
        return self._targets[path]

    def _tuple(self, captured: list[Any], path: str, current: Any) -> Any:
        class_name, content = captured
        items = current if isinstance(current, tuple) and len(current) == len(content) else [None] * len(content)
        decoded = [self.decode(item, f"{path}[{index}]", items[index]) for index, item in enumerate(content)]
        if class_name == class_name_of(()):
            return tuple(decoded)
        require_class(current, class_name, path)
        return type(current)._make(decoded) if hasattr(current, "_make") else type(current)(decoded)

    def _fill(self, value: Any, content: Any, path: str) -> None:
        if isinstance(value, dict):
            pairs = [(self.decode(key, f"{path}.key[{index}]"), item) for index, (key, item) in enumerate(content)]
            decoded = {key: self.decode(item, f"{path}[{key!r}]", value.get(key)) for key, item in pairs}
            value.clear()
            value.update(decoded)
        elif isinstance(value, list | deque | set):
            current = [*value, *[None] * len(content)]
            items = [self.decode(item, f"{path}[{index}]", current[index]) for index, item in enumerate(content)]
            value.clear()
            value.update(items) if isinstance(value, set) else value.extend(items)
        elif type(value) in GENERATORS:
            GENERATORS[type(value)][1](value, self.decode(content, path))
        else:
            self._fill_attributes(value, content, path)

    def _fill_attributes(self, value: Any, content: dict[str, Any], path: str) -> None:
        current = attributes(value)
        for name in current.keys() - content.keys():
            object.__delattr__(value, name)
        for name, item in content.items():
            if not name.isidentifier() or (name not in current and callable(getattr(type(value), name, None))):
                raise SimulationStateError(f"{path}: {name!r} is not the name of an attribute")
            decoded = self.decode(item, f"{path}.{name}", current.get(name))
            if name not in current or decoded is not current[name]:
                set_attribute(value, name, decoded)

    def _tensor(self, number: int) -> Tensor:
        if number not in self._views:
            view = self._state.structure["views"][number]
            memory = self._memory(view["memory"], bool(view["on_device"]))
            if math.prod(view["size"]) > max(_MAX_ELEMENTS, memory.numel()):
                raise SimulationStateError(f"view {number}: {view['size']} elements are too many")
            tensor = memory.as_strided(view["size"], view["stride"], view["offset"])
            self._views[number] = nn.Parameter(tensor, False) if view["is_parameter"] else tensor
        return self._views[number]

    def _memory(self, name: str, on_device: bool) -> Tensor:
        if (name, on_device) not in self._memories:
            memory = self._state.tensors[name].clone()
            self._memories[name, on_device] = memory.to(self._device) if on_device else memory
        return self._memories[name, on_device]

    def _array(self, memory: str, dtype: str, size: list[int]) -> np.ndarray[Any, Any]:
        if np.dtype(dtype).kind not in NUMBERS:
            raise SimulationStateError(f"{memory}: an array of {one_line(repr(dtype))} holds no numbers")
        return self._state.tensors[memory].numpy().copy().view(np.dtype(dtype)).reshape(size)
