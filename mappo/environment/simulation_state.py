"""The simulator's state as plain data: read from a VMAS environment, and put into another of the same task.

VMAS keeps its state in objects: positions and velocities of entities, and whatever a scenario keeps in attributes
of its own. `capture` walks from the world and the scenario through every attribute, list and dictionary, breadth
first. `restore` puts what it found into an environment that was just built, so that both go on the same, bit by
bit. Which slots share one object, tensor or memory is kept: VMAS and scenarios write into tensors in place.

A walk sees what is reachable through attributes. It does not see what functions close over, nor what a module
keeps in globals; `mappo validate` compares a restored simulation with the captured one, and says if they part.
"""

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
    SCALARS,
    Walk,
    attributes,
    class_name_of,
    reachable,
    require_class,
    roots,
    set_attribute,
)
from mappo.errors import SimulationStateError


@dataclass
class SimulationState:
    """Nested Python data taken apart: numbers in `tensors`, everything else in `structure`, which is JSON.

    Each entry of tensors is one memory [elements], which several tensors of the structure may view.
    """

    structure: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def capture(environment: EnvBase, **others: Any) -> SimulationState:
    """Copies of all state of a simulation, and of `others`: nested tensors, arrays, lists, dicts and scalars."""
    return _captured(dict(roots(environment)), others)


def capture_values(**others: Any) -> SimulationState:
    """Copies of nested tensors, arrays, lists, dicts and scalars, without a simulation."""
    return _captured({}, others)


def _captured(roots: dict[str, Any], others: dict[str, Any]) -> SimulationState:
    capturing = Walk()
    structure = {
        "simulation": {name: capturing.walk(root, name) for name, root in roots.items()},
        "others": {name: capturing.walk(value, name) for name, value in others.items()},
    }
    return SimulationState(
        {**structure, "objects": capturing.objects, "views": capturing.views}, capturing.memories()
    )


def restore(state: SimulationState, environment: EnvBase) -> dict[str, Any]:
    """Put a captured simulation into a new environment of the same task, and return the `others`.

    The environment is reset and stepped once first, so that it has the objects that the captured one had.

    Raises:
        SimulationStateError: objects of the captured simulation are not in this one, or the data is not what
            `capture` makes. The environment is then not to be used.
    """
    environment.rand_step(environment.reset())
    return _restored(state, reachable(environment), environment.device)


def restore_values(state: SimulationState) -> dict[str, Any]:
    """The `others` of `capture_values`.

    Raises:
        SimulationStateError: the data is not what `capture_values` makes.
    """
    return _restored(state, {}, None)


def _restored(state: SimulationState, living: dict[str, Any], device: torch.device | None) -> dict[str, Any]:
    try:
        restoring = _Restore(state, living, device)
        restoring.fill_objects()
        return {name: restoring.decode(value, name) for name, value in state.structure["others"].items()}
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise SimulationStateError(f"not a captured simulation: {type(error).__name__}: {error}") from error


class _Restore:
    """Makes of captured data what it was, in place of what the living objects hold."""

    def __init__(self, state: SimulationState, living: dict[str, Any], device: torch.device | None):
        self._state, self._living, self._device = state, living, device
        self._objects: dict[str, Any] = state.structure["objects"]
        self._memories: dict[tuple[str, bool], Tensor] = {}
        self._views: dict[int, Tensor] = {}
        self._made: dict[str, Any] = {}

    def decode(self, value: Any, path: str, now: Any = None) -> Any:
        """`now` is what is in that place, for what cannot be captured and stays as it is."""
        if type(value) in SCALARS:
            return value
        ((kind, content),) = value.items()
        match kind:
            case "float":
                return float(content)
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
                return self._tuple(content, path, now)
            case "enum":
                require_class(now, content[0], path)
                return type(now)[content[1]]
            case "kept":
                require_class(now, content, path)
                return now
        raise SimulationStateError(f"{path}: {kind!r} is not a kind of value")

    def fill_objects(self) -> None:
        """Give every living object the content that its captured counterpart had, what is far first.

        A generator's state is a dictionary, for example, which is filled by the time that it is set.
        """
        for path, (_, content) in reversed(list(self._objects.items())):
            self._fill(self._object(path), content, path)

    def _object(self, path: str) -> Any:
        """The living object in that place; containers that are not there are made, other objects are not."""
        if path not in self._made:
            wanted = self._objects[path][0]
            value = self._living.get(path)
            if class_name_of(value) != wanted and wanted in CONTAINERS.values():
                value = next(kind for kind, name in CONTAINERS.items() if name == wanted)()
            require_class(value, wanted, path)
            self._made[path] = value
        return self._made[path]

    def _tuple(self, named: list[Any], path: str, now: Any) -> Any:
        class_name, content = named
        items = now if isinstance(now, tuple) and len(now) == len(content) else [None] * len(content)
        decoded = [self.decode(item, f"{path}[{index}]", items[index]) for index, item in enumerate(content)]
        if class_name == class_name_of(()):
            return tuple(decoded)
        require_class(now, class_name, path)
        return type(now)._make(decoded) if hasattr(now, "_make") else type(now)(decoded)

    def _fill(self, value: Any, content: Any, path: str) -> None:
        if isinstance(value, dict):
            pairs = [(self.decode(key, f"{path}.key[{index}]"), item) for index, (key, item) in enumerate(content)]
            filled = {key: self.decode(item, f"{path}[{key!r}]", value.get(key)) for key, item in pairs}
            value.clear()
            value.update(filled)
        elif isinstance(value, list | deque | set):
            now = [*value, *[None] * len(content)]
            items = [self.decode(item, f"{path}[{index}]", now[index]) for index, item in enumerate(content)]
            value.clear()
            value.update(items) if isinstance(value, set) else value.extend(items)
        elif type(value) in GENERATORS:
            GENERATORS[type(value)][1](value, self.decode(content, path))
        else:
            self._fill_attributes(value, content, path)

    def _fill_attributes(self, value: Any, content: dict[str, Any], path: str) -> None:
        now = attributes(value)
        for name in now.keys() - content.keys():
            object.__delattr__(value, name)
        for name, item in content.items():
            if not name.isidentifier() or (name not in now and callable(getattr(type(value), name, None))):
                raise SimulationStateError(f"{path}: {name!r} is not the name of an attribute")
            after = self.decode(item, f"{path}.{name}", now.get(name))
            if name not in now or after is not now[name]:
                set_attribute(value, name, after)

    def _tensor(self, number: int) -> Tensor:
        if number not in self._views:
            view = self._state.structure["views"][number]
            memory = self._memory(view["memory"], bool(view["on_device"]))
            tensor = memory.as_strided(view["size"], view["stride"], view["offset"])
            self._views[number] = nn.Parameter(tensor, False) if view["is_parameter"] else tensor
        return self._views[number]

    def _memory(self, name: str, on_device: bool) -> Tensor:
        if (name, on_device) not in self._memories:
            memory = self._state.tensors[name].clone()
            self._memories[name, on_device] = memory.to(self._device) if on_device else memory
        return self._memories[name, on_device]

    def _array(self, memory: str, dtype: str, size: list[int]) -> np.ndarray[Any, Any]:
        return self._state.tensors[memory].numpy().copy().view(np.dtype(dtype)).reshape(size)
