"""The walk through the objects of a simulator, and access to the attributes that hold its state."""

import math
import random
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.envs import EnvBase

from mappo.errors import SimulationStateError, one_line

SCALARS = (bool, int, float, str, type(None))
NUMBERS = "biuf"  # the kinds of numpy's types that are captured
_MAX_BITS = 14_000  # of an integer; Python reads no more than 4300 digits
_MERSENNE_TWISTER_WORDS, _PHILOX_WORDS = 624, 4
CONTAINERS: dict[type, str] = {list: "list", dict: "dict", set: "set", deque: "deque"}


def _set_numpy_state(generator: np.random.Generator, state: Any) -> None:
    require_possible_numpy_state(state)
    generator.bit_generator.state = state


def _set_legacy_numpy_state(generator: np.random.RandomState, state: Any) -> None:
    require_possible_numpy_state(state)
    generator.set_state(state)


def require_possible_numpy_state(state: Any) -> None:
    """Check the positions of a generator of numpy, which reads its memory there without a check of its own.

    Raises:
        ValueError: a position is outside of the memory.
    """
    if isinstance(state, dict):
        position, buffer_position = state["state"].get("pos", 0), state.get("buffer_pos", 0)
    else:
        position, buffer_position = state[2], 0
    if not (0 <= position <= _MERSENNE_TWISTER_WORDS and 0 <= buffer_position <= _PHILOX_WORDS):
        raise ValueError(f"a random state at positions {position} and {buffer_position} is not possible")


GENERATORS: dict[type, tuple[Callable[[Any], Any], Callable[[Any, Any], object]]] = {
    random.Random: (random.Random.getstate, random.Random.setstate),
    np.random.RandomState: (np.random.RandomState.get_state, _set_legacy_numpy_state),
    torch.Generator: (torch.Generator.get_state, torch.Generator.set_state),
    np.random.Generator: (lambda generator: generator.bit_generator.state, _set_numpy_state),
}
_MOVED_MODULES = {"mappo.scenarios.": "mappo.environment.scenarios."}  # old names, in checkpoints before 0.5
_NOT_WALKED = ("torch", "numpy", "gym", "builtins", "functools", "itertools", "types")  # packages without state
_DTYPES = {  # by name
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def reachable(environment: EnvBase) -> dict[str, Any]:
    """Return the objects and containers of a simulation that a walk reaches, by their first path."""
    walk = Walk()
    for name, root in roots(environment):
        walk.walk(root, name)
    return walk.live_objects


def tensors_by_path(environment: EnvBase) -> dict[str, Tensor]:
    """Return every tensor [envs, ...] that attributes hold, by path."""
    (num_envs,) = environment.batch_size
    tensors = {}
    for path, owner in reachable(environment).items():
        if isinstance(owner, dict):
            items = {f"{path}[{key!r}]": item for key, item in owner.items() if isinstance(key, str | int)}
        elif isinstance(owner, list | deque):
            items = {f"{path}[{index}]": item for index, item in enumerate(owner)}
        else:
            items = {f"{path}.{name}": item for name, item in attributes(owner).items()}
        for name, item in items.items():
            if isinstance(item, Tensor) and item.ndim and len(item) == num_envs:
                tensors[name] = item
    return tensors


def roots(environment: EnvBase) -> Iterator[tuple[str, Any]]:
    """Yield the roots of a walk; the world is first, so that paths of entities begin with it."""
    simulator = environment.base_env._env
    yield "world", simulator.world
    yield "scenario", simulator.scenario
    yield "environment", simulator


class Walk:
    """A breadth-first walk through a graph of objects, which visits every object, container and tensor once."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}  # class name and encoded content, by the first path to the object
        self.live_objects: dict[str, Any] = {}  # by the same path; the references keep ids from being reused
        self.views: list[dict[str, Any]] = []
        self._paths: dict[int, str] = {}  # by id of the object
        self._pending: deque[str] = deque()  # paths of objects whose content is not encoded yet
        self._view_numbers: dict[int, int] = {}  # by id of the tensor
        self._viewed: list[Tensor] = []  # tensors in `views`; the references keep ids from being reused
        self._storages: dict[int, str] = {}
        self._copies: dict[str, Tensor] = {}  # of memories
        self._masks: dict[str, Tensor] = {}  # of the elements that are viewed, where not all of them are

    def walk(self, value: Any, path: str) -> Any:
        """Encode a value and all objects that are reachable from it; shorter paths get their names first."""
        encoded = self._encode(value, path)
        while self._pending:
            path = self._pending.popleft()
            live = self.live_objects[path]
            try:
                self.objects[path] = [class_name_of(live), self._content(live, path)]
            except RecursionError:
                raise SimulationStateError(
                    f"{path}: tuples in tuples, too deep to be captured: use lists"
                ) from None
        return encoded

    def _encode(self, value: Any, path: str) -> Any:
        """Return JSON: a scalar, or an object with one key, which names the kind of its value."""
        if type(value) is float and not math.isfinite(value):
            return {"float": repr(value)}
        if type(value) is int and value.bit_length() > _MAX_BITS:
            raise SimulationStateError(f"{path}: an integer of {value.bit_length()} bits cannot be captured")
        if type(value) in SCALARS:
            return value
        if isinstance(value, Enum):
            return {"enum": [class_name_of(value), value.name]}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value, path)}
        if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in NUMBERS:
            return {"array" if isinstance(value, np.ndarray) else "number": self._array(np.asarray(value))}
        if type(value) is frozenset:
            return {"frozenset": [self._encode(item, path) for item in sorted(value, key=repr)]}
        if isinstance(value, tuple):
            items = [self._encode(item, f"{path}[{index}]") for index, item in enumerate(value)]
            return {"tuple": [class_name_of(value), items]}
        if not _is_walked(value):
            return {"kept": class_name_of(value)}
        if id(value) not in self._paths:
            while path in self.live_objects:
                path += "'"
            self._paths[id(value)] = path
            self.live_objects[path] = value
            self._pending.append(path)
        return {"object": self._paths[id(value)]}

    def memories(self) -> dict[str, Tensor]:
        """Return the copies of all memories.

        Elements that no tensor views may hold any value. They become 0, so that equal states have equal bytes.
        """
        for name, viewed in self._masks.items():
            self._copies[name][~viewed] = 0
        return self._copies

    def _content(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return [
                [
                    self._encode(key, f"{path}.key[{index}]"),
                    self._encode(item, f"{path}[{key!r}]" if type(key) in SCALARS else f"{path}.item[{index}]"),
                ]
                for index, (key, item) in enumerate(value.items())
            ]
        if isinstance(value, set):
            value = sorted(value, key=lambda item: self._paths.get(id(item)) or repr(item))
        if isinstance(value, list | deque):
            return [self._encode(item, f"{path}[{index}]") for index, item in enumerate(value)]
        if type(value) in GENERATORS:
            return self._encode(GENERATORS[type(value)][0](value), f"{path}.state")
        return {name: self._encode(item, f"{path}.{name}") for name, item in sorted(attributes(value).items())}

    def _tensor(self, tensor: Tensor, path: str) -> int:
        if id(tensor) not in self._view_numbers:
            dtype = str(tensor.dtype).removeprefix("torch.")
            if dtype not in _DTYPES or tensor.layout != torch.strided:
                raise SimulationStateError(f"{path}: a {tensor.layout} tensor of {dtype} cannot be captured")
            self._view_numbers[id(tensor)] = len(self.views)
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
        return self._view_numbers[id(tensor)]

    def _memory(self, tensor: Tensor, dtype: str, path: str) -> str:
        storage = tensor.untyped_storage()
        name = self._storages.setdefault(storage._cdata, f"{len(self._storages)}.{dtype}")
        if not name.endswith(f".{dtype}"):
            raise SimulationStateError(f"{path}: its memory is viewed as {dtype} and as another type")
        num_elements = storage.nbytes() // tensor.element_size()
        is_whole = tensor.numel() == num_elements and tensor.is_contiguous()
        is_new = name not in self._copies
        if is_new:
            self._copies[name] = tensor.detach().as_strided((num_elements,), (1,), 0).to("cpu", copy=True)
        if is_whole:
            self._masks.pop(name, None)
        elif is_new or name in self._masks:
            mask = self._masks.setdefault(name, torch.zeros(num_elements, dtype=torch.bool))
            mask.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        return name

    def _array(self, array: np.ndarray[Any, Any]) -> dict[str, Any]:
        name = f"{len(self._copies)}.array"
        bits = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._copies[name] = torch.from_numpy(bits.copy())
        return {"memory": name, "dtype": array.dtype.str, "size": list(array.shape)}


def _is_walked(value: Any) -> bool:
    if isinstance(value, list | dict | set | deque | nn.Module | Distribution) or type(value) in GENERATORS:
        return True
    if isinstance(value, type) or type(value).__module__.partition(".")[0] in _NOT_WALKED:
        return False
    return hasattr(value, "__dict__") or hasattr(type(value), "__slots__")


def attributes(value: Any) -> dict[str, Any]:
    kind: Any = type(value)
    slots = _all_slots(kind)
    return {
        **{name: getattr(value, name) for name in slots if hasattr(value, name)},
        **getattr(value, "__dict__", {}),
    }


@cache
def _all_slots(kind: type) -> tuple[str, ...]:
    return tuple(name for base in kind.__mro__ for name in _slots(base))


def _slots(kind: type) -> list[str]:
    slots = kind.__dict__.get("__slots__", ())
    return [name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__")]


def set_attribute(value: Any, name: str, item: Any) -> None:
    """Set an attribute directly, without the setters by which VMAS checks values and notifies observers."""
    if any(name in _slots(kind) for kind in type(value).__mro__):
        object.__setattr__(value, name, item)
    else:
        value.__dict__[name] = item


def class_name_of(value: Any) -> str:
    kind = type(value)
    return CONTAINERS.get(kind) or f"{kind.__module__}.{kind.__qualname__}"


def require_class(value: Any, class_name: str, path: str) -> None:
    for old, new in _MOVED_MODULES.items():
        class_name = class_name.replace(old, new)
    if class_name_of(value) != class_name:
        raise SimulationStateError(
            f"{one_line(path)}: the captured simulation has a {one_line(class_name)}, this one has a "
            f"{class_name_of(value)}"
        )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal, with NaN equal to NaN."""
    return one.shape == other.shape and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
