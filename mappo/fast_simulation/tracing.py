"""A function of tensors as one graph, or the reason why there is none.

`trace` runs Python that computes with tensors once, and records what it does to them. What it records is what
the function does for every input only if the function never asks a tensor for its value: a branch, a loop or a
number taken from an input belongs to that input alone. Three things that VMAS and its scenarios do all the time
look like that and are not:

- An assertion asks for a value, and does nothing but fail. It is taken to hold.
- The broad phase of collisions asks whether two entities are near in any environment, and skips them if not. The
  work is done always, and what comes of it counts where the answer, now a tensor, is yes: `broad_phase`.
- `x[mask] = value` and `x[mask] += value` move as many elements as the mask has, a number that depends on values.
  They are recorded as `where(mask, value, x)`, which moves all.

Everything else of that kind is refused, and so is randomness.
"""

import ast
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import vmas
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.overrides import TorchFunctionMode
from vmas.simulator.core import Sphere, World

from mappo.compute.compiler import trace_graph
from mappo.errors import NotTraceable

_VALUES = {"__bool__", "__float__", "__int__", "__index__", "__array__", "item", "tolist", "numpy", "is_nonzero"}
_ELEMENTWISE = {  # what may be done with x[mask] before it is written to some y[mask]
    *("add", "sub", "mul", "div", "neg", "abs", "clamp", "clone", "detach", "to", "sqrt", "square", "pow", "sign"),
    *("add_", "sub_", "mul_", "div_", "neg_", "abs_", "clamp_", "float", "cos", "sin", "exp", "log", "tanh"),
    *("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__"),
    *("__truediv__", "__rtruediv__", "__itruediv__", "__neg__", "__pow__", "__invert__", "__and__", "__or__"),
    *("logical_not", "logical_and", "logical_or", "eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "minimum", "maximum", "clamp_min", "clamp_max"),
    *("__get__", "size", "dim", "numel"),  # shapes, dtypes and devices
}
_OWN_FILES = (str(Path(torch.__file__).parent), __file__)


def trace_simulation(
    function: Callable[..., Iterable[Tensor]], inputs: list[Tensor], world: World
) -> tuple[GraphModule, set[int]]:
    """The graph of a function that takes tensors and returns tensors, and which inputs the function writes into.

    Collisions are those of `world`. The function may write into its inputs, and keep tensors elsewhere; the graph
    does neither. It holds for all inputs of these shapes and types. What depends on no input is computed once.

    Raises:
        NotTraceable: the function depends on values, draws random numbers, or fails.
    """
    try:
        recording = _Recording()
        with torch.no_grad(), recording, _broad_phase(world, recording):
            recorded = trace_graph(function, [each.clone() for each in inputs])
    except NotTraceable:
        raise
    except Exception as error:  # a scenario is foreign code, and tensors that are traced do not allow everything
        raise NotTraceable(f"{_first_line(error)} ({_place_of(error)})") from error
    _require_deterministic(recorded)
    with torch.no_grad():
        graph = trace_graph(functionalize(recorded), inputs)
    written = _forget_writes(graph)
    _fold_constants(graph)
    return graph, written


class _Recording(TorchFunctionMode):
    """Sees every function of tensors before it is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self._selected: dict[int, tuple[Tensor, Tensor]] = {}  # the whole x for x[mask], by id, and the mask
        self.near: dict[
            frozenset[str], Tensor
        ] = {}  # by names of two entities: whether any environment has them near
        self._varying: set[Node] = set()  # of the nodes recorded so far, as far as they were asked for
        self._last: Node | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _VALUES and isinstance(args[0], Tensor):
            return self._value(func, args, kwargs)
        if name == "__getitem__" and (mask := _mask(args[1])) is not None:
            return self._select(_rest(args[0], args[1]), mask)
        if name == "__setitem__" and (mask := _mask(args[1])) is not None:
            return self._write(_rest(args[0], args[1]), mask, args[2])
        masks = [self._selected[id(each)][1] for each in args if id(each) in self._selected]
        result = func(*args, **kwargs)
        self._remember_place()
        if masks:
            self._require_elementwise(name, masks, [each for each in args if isinstance(each, Tensor)])
            if isinstance(result, Tensor):
                self._selected[id(result)] = result, masks[0]
        return result

    def _value(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """What a tensor holds that depends on no input, or that is only asserted."""
        frame = _caller()
        if frame.f_code is World.collides.__code__:
            self.near[_pair(frame.f_locals["a"], frame.f_locals["b"])] = args[0]
            return True
        if self._is_traced(args[0]) and not _is_assertion(frame):
            raise NotTraceable(f"Python depends on a tensor's value ({_place()})")
        with disable_proxy_modes_tracing():
            return func(*args, **kwargs)

    def _is_traced(self, tensor: Tensor) -> bool:
        """Whether it was computed from an input."""
        node = _node_of(tensor)
        if node is None:
            return False
        each = self._last.next if self._last else next(iter(node.graph.nodes))
        while each.op != "root":
            if each.op == "placeholder" or any(used in self._varying for used in each.all_input_nodes):
                self._varying.add(each)
            self._last, each = each, each.next
        return node in self._varying

    def _remember_place(self) -> None:
        """In the nodes that were just recorded, for messages."""
        mode = get_proxy_mode()
        node = mode.tracer.graph._root.prev if mode else None
        if node is None or "place" in node.meta:
            return
        frame = _caller()
        while node.op != "root" and "place" not in node.meta:
            node.meta["place"] = frame.f_code.co_filename, frame.f_lineno
            node = node.prev

    def _select(self, whole: Tensor, mask: Tensor) -> Tensor:
        copy = whole.clone()
        self._selected[id(copy)] = copy, mask
        return copy

    def _write(self, whole: Tensor, mask: Tensor, value: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) in self._selected:
                self._require_elementwise("__setitem__", [mask, self._selected[id(value)][1]], [value])
            elif value.ndim > whole.ndim - mask.ndim and value.numel() > 1:
                raise NotTraceable(f"as many values as a mask has are written ({_place()})")
        whole.copy_(torch.where(_like(mask, whole), value, whole))

    def _require_elementwise(self, name: str, masks: list[Tensor], operands: list[Tensor]) -> None:
        others = [each for each in operands if id(each) not in self._selected and each.numel() > 1]
        if (
            name not in _ELEMENTWISE | {"__setitem__"}
            or others
            or not all(_same(mask, masks[0]) for mask in masks)
        ):
            raise NotTraceable(f"{name} of as many values as a mask has ({_place()})")


@contextmanager
def _broad_phase(world: World, recording: _Recording) -> Iterator[None]:
    """Forces between entities that are near in no environment are 0, and their distance is infinite.

    That is what it comes to that VMAS leaves them out: forces reach a little further than the broad phase, and
    scenarios ask for the distance of those that may collide. Between spheres, forces reach no further.
    """

    def forces(a: Any, force_a: Tensor, torque_a: Any, b: Any, force_b: Tensor, torque_b: Any) -> None:
        near = recording.near.get(_pair(a, b))
        values = [force_a, torque_a, force_b, torque_b]
        if near is not None and not (isinstance(a.shape, Sphere) and isinstance(b.shape, Sphere)):
            values = [torch.where(near, each, 0.0) if isinstance(each, Tensor) else each for each in values]
        World.update_env_forces(world, a, *values[:2], b, *values[2:])

    def collides(a: Any, b: Any) -> bool:
        answer: bool = World.collides(world, a, b)
        asked[:] = [sys._getframe(1), _pair(a, b)]
        return answer

    def distance(a: Any, b: Any, env_index: int | None = None) -> Tensor:
        far: Tensor = World.get_distance(world, a, b, env_index)
        if asked != [sys._getframe(1), _pair(a, b)]:
            return far
        return torch.where(recording.near[_pair(a, b)], far, torch.inf)

    asked: list[Any] = []  # who asked last whether two entities collide, and which
    own = {"update_env_forces": forces, "collides": collides, "get_distance": distance}
    world.__dict__.update(own)
    try:
        yield
    finally:
        for name in own:
            del world.__dict__[name]


def _pair(a: Any, b: Any) -> frozenset[str]:
    return frozenset((a.name, b.name))


def _mask(index: Any) -> Tensor | None:
    """The mask of x[mask] and x[mask, 1]."""
    first = index[0] if isinstance(index, tuple) and index else index
    return first if isinstance(first, Tensor) and first.dtype == torch.bool and first.ndim else None


def _rest(whole: Tensor, index: Any) -> Tensor:
    """A view of what the mask of x[mask, 1] selects from: x[:, 1]."""
    if not isinstance(index, tuple):
        return whole
    if index[0].ndim > 1 or not all(isinstance(each, int | slice) for each in index[1:]):
        raise NotTraceable(f"a mask together with other indices ({_place()})")
    rest: Tensor = whole[(slice(None), *index[1:])]
    return rest


def _like(mask: Tensor, whole: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (whole.ndim - mask.ndim))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two masks were computed in the same way from the same tensors, such as `~done` and `~done`."""
    first, second = _node_of(one), _node_of(other)
    return one is other or (first is not None and second is not None and _equal(first, second))


def _equal(one: Node, other: Node) -> bool:
    if one is other:
        return not _is_written(one)
    if one.op != "call_function" or one.target is not other.target or len(one.args) != len(other.args):
        return False
    return one.kwargs == other.kwargs and all(
        _equal(first, second) if isinstance(first, Node) and isinstance(second, Node) else first is second
        for first, second in zip(one.args, other.args, strict=True)
    )


def _is_written(node: Node) -> bool:
    """In place, itself or a view of it, so that it may be another value afterwards."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        returned = schema.returns[0].alias_info if schema is not None and schema.returns else None
        if user.args[0] is node and (
            (schema is not None and schema.is_mutable) or (returned and _is_written(user))
        ):
            return True
    return False


def _node_of(tensor: Tensor) -> Node | None:
    mode = get_proxy_mode()
    entry = mode.tracer.tensor_tracker.get(tensor) if mode else None
    return entry.proxy.node if entry is not None else None


def _is_assertion(frame: FrameType) -> bool:
    return any(first <= frame.f_lineno <= last for first, last in _assertions(frame.f_code.co_filename))


@cache
def _assertions(path: str) -> list[tuple[int, int]]:
    """The lines of each."""
    nodes = ast.walk(ast.parse("".join(linecache.getlines(path))))
    return [(node.lineno, node.end_lineno or node.lineno) for node in nodes if isinstance(node, ast.Assert)]


def _caller() -> FrameType:
    """Who called a function of tensors: VMAS or a scenario."""
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_code.co_filename.startswith(_OWN_FILES):
        frame = frame.f_back
    assert frame
    return frame


def _place() -> str:
    frame = _caller()
    return _shown(frame.f_code.co_filename, frame.f_lineno)


def _place_of(error: BaseException) -> str:
    """The innermost line outside of torch that an error came through."""
    place, step = "", error.__traceback__
    while step:
        path = step.tb_frame.f_code.co_filename
        if not path.startswith(_OWN_FILES):
            place = _shown(path, step.tb_lineno)
        step = step.tb_next
    return place


def _shown(path: str, line: int) -> str:
    """Of the path, what is the same wherever packages are installed."""
    packages = Path(vmas.__file__).parent.parent
    shown = Path(path).relative_to(packages) if path.startswith(str(packages)) else Path(path).name
    return f"{shown}:{line}: {linecache.getline(path, line).strip()}"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _require_deterministic(graph: GraphModule) -> None:
    refused = {
        torch.Tag.nondeterministic_seeded: "it draws random numbers in a step",
        torch.Tag.dynamic_output_shape: "the number of values depends on values",
        torch.Tag.data_dependent_output: "Python depends on a tensor's value",
    }
    for node in graph.graph.nodes:
        for tag in getattr(node.target, "tags", ()):
            if tag in refused and not _is_indexed_by_numbers(node):
                raise NotTraceable(f"{refused[tag]}: {node.target} ({_shown(*node.meta['place'])})")


def _is_indexed_by_numbers(node: Node) -> bool:
    """Only masks select as many values as they hold; lists of indices do not."""
    if node.target not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
        return False
    given = node.args[1]
    assert isinstance(given, list | tuple)
    indices = [each for each in given if isinstance(each, Node)]
    return all(each.meta["val"].dtype not in (torch.bool, torch.uint8) for each in indices)


def _forget_writes(graph: GraphModule) -> set[int]:
    """Functional graphs end by writing back into their inputs, for nobody here. Which inputs these are."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    written = set()
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.copy_.default:
            if node.args[0].op != "placeholder":
                raise NotTraceable("it writes into a tensor that a walk through attributes does not find")
            written.add(inputs.index(node.args[0]))
            node.replace_all_uses_with(node.args[1])
            graph.graph.erase_node(node)
    return written


def _fold_constants(graph: GraphModule) -> None:
    """What depends on no input is computed now; numbers are written into the graph, where compilers see them."""
    varying: set[Node] = set()
    values: dict[Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output") or any(each in varying for each in node.all_input_nodes):
            varying.add(node)
        else:
            values[node] = _evaluate(graph, node, values)
    for index, (node, value) in enumerate(values.items()):
        if isinstance(value, Tensor) and any(user in varying for user in node.users):
            with graph.graph.inserting_before(node):
                constant = _constant(graph, value, f"constant_{index}")
            node.replace_all_uses_with(constant, lambda user: user in varying)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _evaluate(graph: GraphModule, node: Node, values: dict[Node, Any]) -> Any:
    if node.op == "get_attr":
        return getattr(graph, str(node.target))
    assert callable(node.target)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda each: values[each])
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _constant(graph: GraphModule, value: Tensor, name: str) -> Node:
    if value.numel() and bool((value == value.flatten()[0]).all()):
        number = value.flatten()[0].item()
        options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
        return graph.graph.call_function(torch.ops.aten.full.default, (list(value.shape), number), options)
    graph.register_buffer(name, value.detach().clone())
    return graph.graph.get_attr(name)
