"""The simulator's state as plain data: read from a VMAS environment, and put into another of the same task.

VMAS keeps its state in objects: positions and velocities of entities, and whatever a scenario keeps in attributes
of its own. `capture` walks from the world and the scenario through every attribute, list and dictionary, breadth
first. `restore` puts what it found into an environment that was just built, so that both go on the same, bit by
bit. Which slots share one object, tensor or memory is kept: VMAS and scenarios write into tensors in place.

A walk sees what is reachable through attributes. It does not see what functions close over, nor what a module
keeps in globals; `mappo validate` compares a restored simulation with the captured one, and says if they part.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.envs import EnvBase

from mappo.errors import SimulationStateError

_SCALARS = (bool, int, float, str, type(None))
_CONTAINERS: dict[type, str] = {list: "list", dict: "dict", set: "set", deque: "deque"}
_GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], object]]] = {
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, np.random.RandomState.set_state),
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    np.random.Generator: (
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
}
_NOT_WALKED = ("torch", "numpy", "gym", "builtins", "functools", "itertools", "types")  # top-level packages
_DTYPES = {  # by name
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass
class SimulationState:
    """Nested Python data taken apart: numbers in `tensors`, everything else in `structure`, which is JSON.

    Each entry of tensors is one memory [elements], which several tensors of the structure may view.
    """

    structure: Any = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


def capture(environment: EnvBase, **others: Any) -> SimulationState:
    """Copies of all state of a simulation, and of `others`: nested tensors, arrays, lists, dicts and scalars."""
    return _captured(dict(_roots(environment)), others)


def capture_values(**others: Any) -> SimulationState:
    """Copies of nested tensors, arrays, lists, dicts and scalars, without a simulation."""
    return _captured({}, others)


def _captured(roots: dict[str, Any], others: dict[str, Any]) -> SimulationState:
    capturing = _Capture()
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


def reachable(environment: EnvBase) -> dict[str, Any]:
    """Every object and container of a simulation that a walk finds, by the path on which it was first met."""
    walked = _Capture()
    for name, root in _roots(environment):
        walked.walk(root, name)
    return walked.found


def _roots(environment: EnvBase) -> Iterator[tuple[str, Any]]:
    """The world comes first, so that its entities are named by their places in it."""
    simulator = environment.base_env._env
    yield "world", simulator.world
    yield "scenario", simulator.scenario
    yield "environment", simulator


class _Capture:
    """Walks a graph of objects, and meets every object, container and tensor once."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}  # by the path on which each was first met: its class and content
        self.found: dict[str, Any] = {}  # the objects themselves, which also keeps their ids from being reused
        self.views: list[dict[str, Any]] = []
        self._paths: dict[int, str] = {}
        self._met: deque[str] = deque()  # those whose content is yet to be looked at
        self._views: dict[int, int] = {}
        self._viewed: list[Tensor] = []
        self._storages: dict[int, str] = {}
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}  # the copy of a memory, and which elements are viewed

    def walk(self, value: Any, path: str) -> Any:
        """Encode a value and all that is reachable from it: what is near gets its name before what is far."""
        encoded = self._encode(value, path)
        while self._met:
            path = self._met.popleft()
            self.objects[path] = [_class_name(self.found[path]), self._content(self.found[path], path)]
        return encoded

    def _encode(self, value: Any, path: str) -> Any:
        """JSON: a scalar, or an object with one key that says what its value means."""
        if type(value) is float and not math.isfinite(value):
            return {"float": repr(value)}
        if type(value) in _SCALARS:
            return value
        if isinstance(value, Enum):
            return {"enum": [_class_name(value), value.name]}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, path)}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
            return {"array" if isinstance(value, np.ndarray) else "number": self._array(np.asarray(value))}
        if type(value) is frozenset:
            return {"frozenset": [self._encode(item, path) for item in sorted(value, key=repr)]}
        if isinstance(value, tuple):
            items = [self._encode(item, f"{path}[{index}]") for index, item in enumerate(value)]
            return {"tuple": [_class_name(value), items]}
        if not _is_walked(value):
            return {"kept": _class_name(value)}
        if id(value) not in self._paths:
            while path in self.found:
                path += "'"
            self._paths[id(value)] = path
            self.found[path] = value
            self._met.append(path)
        return {"object": self._paths[id(value)]}

    def memories(self) -> dict[str, Tensor]:
        """Elements that no tensor views may hold anything; they become 0, so that equal states are equal bytes."""
        for copy, viewed in self._copies.values():
            copy[~viewed] = 0
        return {name: copy for name, (copy, _) in self._copies.items()}

    def _content(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return [
                [
                    self._encode(key, f"{path}.key[{index}]"),
                    self._encode(item, f"{path}[{key!r}]" if type(key) in _SCALARS else f"{path}.item[{index}]"),
                ]
                for index, (key, item) in enumerate(value.items())
            ]
        if isinstance(value, set):
            value = sorted(value, key=lambda item: self._paths.get(id(item)) or repr(item))
        if isinstance(value, list | deque):
            return [self._encode(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if type(value) in _GENERATORS:
            return self._encode(_GENERATORS[type(value)][0](value), f"{path}.state")
        return {name: self._encode(item, f"{path}.{name}") for name, item in sorted(attributes(value).items())}

    def _tensor(self, tensor: Tensor, path: str) -> int:
        if id(tensor) not in self._views:
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _DTYPES or tensor.layout != torch.strided:
                raise SimulationStateError(f"{path}: a {tensor.layout} tensor of {dtype} cannot be captured")
            self._views[id(tensor)] = len(self.views)
            self._viewed.append(tensor)
            self.views.append(
                {
                    "memory": self._memory(tensor, dtype, path),
                    "size": list(tensor.shape),
                    "stride": list(tensor.stride()),
                    "offset": tensor.storage_offset(),
                    "on_device": tensor.device.type != "cpu",
                    "is_parameter": isinstance(tensor, nn.Parameter),
                }
            )
        return self._views[id(tensor)]

    def _memory(self, tensor: Tensor, dtype: str, path: str) -> str:
        storage = tensor.untyped_storage()
        name = self._storages.setdefault(storage._cdata, f"{len(self._storages)}.{dtype}")
        if not name.endswith(f".{dtype}"):
            raise SimulationStateError(f"{path}: its memory is viewed as {dtype} and as another type")
        if name not in self._copies:
            whole = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            self._copies[name] = (whole.to("cpu", copy=True), torch.zeros(len(whole), dtype=torch.bool))
        viewed = self._copies[name][1]
        viewed.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        return name

    def _array(self, array: np.ndarray[Any, Any]) -> dict[str, Any]:
        name = f"{len(self._copies)}.array"
        bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._copies[name] = (torch.from_numpy(bits.copy()), torch.ones(bits.size, dtype=torch.bool))
        return {"memory": name, "dtype": array.dtype.str, "size": list(array.shape)}


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
        if type(value) in _SCALARS:
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
                _require_class(now, content[0], path)
                return type(now)[content[1]]
            case "kept":
                _require_class(now, content, path)
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
            if _class_name(value) != wanted and wanted in _CONTAINERS.values():
                value = next(kind for kind, name in _CONTAINERS.items() if name == wanted)()
            _require_class(value, wanted, path)
            self._made[path] = value
        return self._made[path]

    def _tuple(self, named: list[Any], path: str, now: Any) -> Any:
        class_name, content = named
        items = now if isinstance(now, tuple) and len(now) == len(content) else [None] * len(content)
        decoded = [self.decode(item, f"{path}[{index}]", items[index]) for index, item in enumerate(content)]
        if class_name == _class_name(()):
            return tuple(decoded)
        _require_class(now, class_name, path)
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
        elif type(value) in _GENERATORS:
            _GENERATORS[type(value)][1](value, self.decode(content, path))
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


def _is_walked(value: Any) -> bool:
    if isinstance(value, list | dict | set | deque | nn.Module | Distribution) or type(value) in _GENERATORS:
        return True
    if isinstance(value, type) or type(value).__module__.partition(".")[0] in _NOT_WALKED:
        return False
    return hasattr(value, "__dict__") or hasattr(type(value), "__slots__")


def attributes(value: Any) -> dict[str, Any]:
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    return {
        **{name: getattr(value, name) for name in slots if hasattr(value, name)},
        **getattr(value, "__dict__", {}),
    }


def _slots(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    return [name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__")]


def set_attribute(value: Any, name: str, item: Any) -> None:
    """Past setters, which VMAS uses to check and to tell observers."""
    if any(name in _slots(kind) for kind in type(value).__mro__):
        object.__setattr__(value, name, item)
    else:
        value.__dict__[name] = item


def _class_name(value: Any) -> str:
    kind = type(value)
    return _CONTAINERS.get(kind) or f"{kind.__module__}.{kind.__qualname__}"


def _require_class(value: Any, class_name: str, path: str) -> None:
    if _class_name(value) != class_name:
        raise SimulationStateError(f"{path}: was a {class_name}, and there is a {_class_name(value)}")
