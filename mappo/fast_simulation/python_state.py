"""The reading of all that a scenario's Python can read or write, apart from the numbers in tensors.

A traced step repeats what Python did once. It is right in every later frame if Python does the same again, and
Python does the same again if a step finds everything that it may read as the step before left it. So a reading is
taken before and after steps and resets, and any difference is a reason to refuse the scenario.

The walk starts from the world, the scenario and the environment, and follows attributes, containers, classes,
closures, default arguments, and those globals of a function's module whose names its code mentions. It does not
enter the functions of packages in `_TRUSTED`. What may change without a trace in a reading, such as an iterator or
an open file, is refused when it is found.
"""

import array
import functools
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torchrl.envs import EnvBase

from mappo.environment.state_walk import GENERATORS, SCALARS, attributes, roots
from mappo.errors import NotFaithful
from mappo.fast_simulation.slots import Attribute, Slot, Slots

_CLOSED = {  # packages whose classes never change
    *sys.stdlib_module_names,
    *("torch", "torchrl", "tensordict", "numpy", "gym", "gymnasium", "typing_extensions"),
}
_TRUSTED = {*_CLOSED, "vmas.simulator"}  # packages whose functions keep no state that a scenario reads
_IGNORED = {"gym", "gymnasium", "logging"}  # packages of objects on which no result depends
_DYNAMIC = {"globals", "eval", "exec", "vars"}  # functions that reach every global
_MOST_VALUES = 300_000
_HEAP_TYPE = 1 << 9  # the flag of a class that Python code defines
_CONSTANT = (  # types whose values cannot change
    *(bool, int, float, complex, str, bytes, type(None), type(...), type(NotImplemented), range, slice),
    *(types.CodeType, types.ModuleType, types.GetSetDescriptorType, torch.Size),
    *(types.MemberDescriptorType, types.MethodDescriptorType, types.WrapperDescriptorType, types.GenericAlias),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_BYTES = (bytearray, memoryview, array.array)
_READ = (  # types without attributes whose content is read
    *(types.BuiltinFunctionType, types.MethodType, types.MethodWrapperType, functools.partial, staticmethod),
    *(classmethod, property, weakref.ref, types.CellType),
)
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)  # other environments have them under the same name
_IMMUTABLE = {
    "datetime",
    "re",
    "decimal",
    "typing",
    "numpy.dtypes",
    "_collections",
}  # modules of types whose values cannot change


@dataclass
class PythonState:
    """A reading. Values keep references to what was read, so that no id is used twice.

    content: what each path holds; the shape and type of a tensor, the class and identity of an object.
    slots: the places of tensors that can be replaced.
    fixed: the tensors in all other places, such as tuples, classes and closures.
    packages: the packages of functions and classes, but for those that never change.
    """

    content: dict[str, Any] = field(default_factory=dict)
    slots: Slots = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    packages: set[str] = field(default_factory=set)
    kept_alive: list[Any] = field(default_factory=list)

    def difference(self, later: "PythonState") -> str | None:
        """Return the first path that a later reading shows differently, or None."""
        if self.content == later.content:
            return None
        paths = {**self.content, **later.content}
        return next(path for path in paths if self.content.get(path) != later.content.get(path))


def read_python_state(environment: EnvBase) -> PythonState:
    """Read everything that the scenario's Python can reach.

    Raises:
        NotFaithful: something is reached whose state cannot be read, or too much is reached.
    """
    walk = _Walk()
    for name, root in roots(environment):
        walk.add(root, name, None)
    return walk.finish()


def find_slots(environment: EnvBase) -> Slots:
    """Return all slots that a walk finds. Some slots exist only after a reset and a step."""
    return read_python_state(environment).slots


class Identity(int):
    """The id of an object that the reading keeps alive."""


class _Walk:
    """A breadth-first walk, which visits every object once and gives it its first path."""

    def __init__(self) -> None:
        self._state = PythonState()
        self._paths: dict[int, str] = {}
        self._pending: deque[tuple[str, Any, Slot | None]] = deque()

    def add(self, value: Any, path: str, place: Slot | None) -> None:
        """Add a value under its path; `finish` reads what the value refers to.

        place: where the value can be replaced, or None.
        """
        kind, content = type(value), self._state.content
        if kind in (float, complex):
            content[path] = kind, repr(value)  # NaN equals itself
        elif isinstance(value, _CONSTANT):
            content[path] = kind, value
        elif isinstance(value, Tensor):
            content[path] = kind, value.shape, value.dtype, value.device
            if place:
                self._state.slots[path] = place
            else:
                self._state.fixed[path] = value
            if vars(value):
                self.add(dict(vars(value)), f"{path}.__dict__", None)
        elif id(value) in self._paths:
            content[path] = "same", self._paths[id(value)]
        else:
            if len(self._paths) > _MOST_VALUES:
                raise NotFaithful(f"the scenario reaches more than {_MOST_VALUES} values, for example {path}")
            self._paths[id(value)] = path
            self._state.kept_alive.append(value)
            description = self._describe(value, path)
            # Of an object that is read completely and can be replaced, the content counts, and not the identity.
            content[path] = description[:1] if place and _is_replaceable(value) else description
            self._pending.append((path, value, place))

    def finish(self) -> PythonState:
        while self._pending:
            path, value, place = self._pending.popleft()
            for name, item, place_of_item in self._items(value, place):
                self.add(item, f"{path}{name}", place_of_item)
        return self._state

    def _describe(self, value: Any, path: str) -> Any:
        kind = type(value)
        if isinstance(value, np.ndarray | np.generic):
            numbers = np.asarray(value)
            return kind, numbers.dtype.str, numbers.shape, b"" if numbers.dtype.hasobject else numbers.tobytes()
        if kind in GENERATORS:
            return kind, repr(_plain(GENERATORS[kind][0](value)))
        if isinstance(value, _BYTES):
            return kind, bytes(value)
        if isinstance(value, list | dict | set | frozenset | tuple | deque | types.MappingProxyType):
            return kind, len(value)
        if isinstance(value, functools._lru_cache_wrapper):
            return Identity(id(value)), value.cache_info()[1:]
        if _is_opaque(value):
            raise NotFaithful(f"the state of {path} cannot be read: it is a {kind.__module__}.{kind.__qualname__}")
        if isinstance(value, _NAMED):
            if not _is_in(value.__module__, _CLOSED):
                self._state.packages.add(value.__module__.partition(".")[0])
            return kind, f"{value.__module__}.{value.__qualname__}", Identity(id(value))
        return kind, Identity(id(value))

    def _items(self, value: Any, place: Slot | None) -> Iterator[tuple[str, Any, Slot | None]]:
        """Yield the name, the value and the place of everything that a value refers to."""
        if isinstance(value, dict):
            for index, (key, item) in enumerate(value.items()):
                yield f".key[{index}]", key, None
                yield f"[{key!r}]" if isinstance(key, SCALARS) else f"[{index}]", item, _in(place, key)
        elif isinstance(value, list):
            yield from ((f"[{index}]", item, _in(place, index)) for index, item in enumerate(value))
        elif isinstance(value, tuple | deque) or (isinstance(value, np.ndarray) and value.dtype.hasobject):
            yield from ((f"[{index}]", item, None) for index, item in enumerate(value))
        elif isinstance(value, set | frozenset):
            ordered = sorted(value, key=lambda item: self._paths.get(id(item)) or repr(item))
            yield from ((f"[{index}]", item, None) for index, item in enumerate(ordered))
        elif isinstance(value, types.MappingProxyType):
            yield ".copy", dict(value), None
        for name, item in _references(value):
            yield name, item, None
        if _has_attributes(value):
            yield ".__class__", type(value), None
            for name, item in sorted(attributes(value).items()):
                yield f".{name}", item, _place_in(place, value, name)


def _in(place: Slot | None, key: Any) -> Slot | None:
    return place and replace(place, keys=(*place.keys, key))


def _place_in(place: Slot | None, value: Any, name: str) -> Slot:
    if place and _is_replaceable(value):
        return replace(place, keys=(*place.keys, Attribute(name)))
    return Slot(value, name)


def _is_replaceable(value: Any) -> bool:
    """Return whether all state of an object is in attributes, and a scenario may make it anew: its own classes."""
    if isinstance(value, nn.Module) or _is_in(type(value).__module__, {"vmas.simulator"}):
        return False
    if not isinstance(value, Distribution) and _is_in(type(value).__module__, _CLOSED):
        return False
    return _has_attributes(value) and all(kind.__flags__ & _HEAP_TYPE for kind in type(value).__mro__[:-1])


def _references(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what functions, classes and other objects refer to."""
    match value:
        case types.FunctionType():
            yield from _references_of_function(value)
        case types.MethodType():
            yield from ((".__self__", value.__self__), (".__func__", value.__func__))
        case types.BuiltinFunctionType() | types.MethodWrapperType():
            yield ".__self__", value.__self__
        case functools.partial():
            yield from ((".func", value.func), (".args", value.args), (".keywords", value.keywords))
        case staticmethod() | classmethod() | functools._lru_cache_wrapper():
            yield ".__wrapped__", value.__wrapped__
        case property():
            yield from ((".fget", value.fget), (".fset", value.fset))
        case functools.cached_property():
            yield ".func", value.func
        case weakref.ref():
            yield "()", value()
        case type():
            yield from _references_of_class(value)


def _references_of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    if _is_in(function.__module__, _TRUSTED):
        return
    yield ".__code__", function.__code__
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        yield f".{name}", _content_of(cell)
    yield ".__defaults__", function.__defaults__
    yield ".__kwdefaults__", function.__kwdefaults__
    yield from ((f".{name}", item) for name, item in vars(function).items())
    names = _names(function.__code__)
    known = function.__globals__
    for name in sorted(known if names & _DYNAMIC else names & known.keys()):
        value = known[name]
        yield f" -> {name}", value
        if isinstance(value, types.ModuleType):
            is_trusted = _is_in(value.__name__, _TRUSTED)
            for item in sorted(names & vars(value).keys()):
                if not (
                    is_trusted and (callable(vars(value)[item]) or isinstance(vars(value)[item], types.ModuleType))
                ):
                    yield f" -> {name}.{item}", vars(value)[item]


def _references_of_class(kind: type) -> Iterator[tuple[str, Any]]:
    if _is_in(kind.__module__, _CLOSED):
        return
    for name, item in vars(kind).items():
        if not (name.startswith("__") and name.endswith("__") and not callable(item)) and name not in _NO_STATE:
            yield f".{name}", item
    yield from ((f".__bases__[{index}]", base) for index, base in enumerate(kind.__bases__))


_NO_STATE = {  # attributes of classes
    "vmas_random_state",  # random states are compared on their own
    "_abc_impl",
}


@functools.cache
def _names(code: types.CodeType) -> frozenset[str]:
    """Return the names and strings that a function's code mentions, with those of its inner functions."""
    inner = (_names(item) for item in code.co_consts if isinstance(item, types.CodeType))
    strings = (item for item in code.co_consts if isinstance(item, str) and item.isidentifier())
    return frozenset(code.co_names).union(strings, *inner)


def _content_of(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _is_in(module: str | None, packages: set[str]) -> bool:
    parts = (module or "builtins").split(".")
    return any(".".join(parts[: index + 1]) in packages for index in range(len(parts)))


def _has_attributes(value: Any) -> bool:
    """Return whether a walk enters the attributes of a value, because a scenario may keep something there."""
    if isinstance(value, types.FunctionType | types.ModuleType | type | np.ndarray | np.generic):
        return False
    if type(value) in GENERATORS or _is_in(type(value).__module__, _IGNORED):
        return False
    if isinstance(value, Distribution | nn.Module | types.SimpleNamespace):
        return True
    return hasattr(value, "__dict__") or hasattr(type(value), "__slots__")


def _is_opaque(value: Any) -> bool:
    """Return whether a value may keep state that cannot be read."""
    if hasattr(type(value), "__next__") or type(value).__module__.partition(".")[0] in {"ctypes", "_ctypes"}:
        return not isinstance(value, type)
    if isinstance(value, type) or hasattr(value, "__dict__") or hasattr(type(value), "__slots__"):
        return False
    if hasattr(type(value), "__get__"):  # a descriptor, which belongs to a class
        return False
    return not isinstance(value, (*_CONSTANT, *_READ)) and not _is_in(type(value).__module__, _IMMUTABLE)


def _plain(state: Any) -> Any:
    """Return a generator's state in a form whose text shows all of it."""
    if isinstance(state, Tensor):
        return bytes(state.tolist())
    if isinstance(state, np.ndarray):
        return state.tolist()
    if isinstance(state, dict):
        return {key: _plain(item) for key, item in state.items()}
    return tuple(map(_plain, state)) if isinstance(state, tuple | list) else state
