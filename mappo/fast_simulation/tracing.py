"""The tracer of simulations: it turns a function of tensors into one graph, or raises the reason why it cannot.

`trace_simulation` runs the function once and traces its operations on tensors. The graph is correct for every
input only if the function never reads the value of a tensor, because a branch, a loop or a number that comes
from an input holds for that input alone. VMAS and its scenarios often read values in three ways that a graph
can express:

- An assertion reads a value and can only fail. The tracer assumes that the assertion holds.
- The broad phase of collisions asks whether two entities are near in any environment, and skips the pair if they
  are not. The graph always computes the pair, and uses the result where the answer, now a tensor, is true: see
  `_broad_phase`.
- `x[mask] = value` and `x[mask] += value` write as many elements as the mask selects, a number that depends on
  values. They are traced as `where(mask, value, x)`, which writes all elements.

The tracer refuses every other read of a value. Random numbers are inputs of the graph, as `step_draws` says.

This file is long because the three exceptions and the refusals share the state of one trace.
"""

import ast
import enum
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode
from torch.overrides import TorchFunctionMode
from vmas.simulator.core import Sphere, World

from mappo.compute.compiler import end_if_stopped, trace_graph
from mappo.errors import NotFaithful, NotTraceable
from mappo.fast_simulation.source_lines import caller, error_location, format_location, location
from mappo.fast_simulation.step_draws import replayed_draws

_VALUES = {"__bool__", "__float__", "__int__", "__index__", "__array__", "item", "tolist", "numpy", "is_nonzero"}
_ELEMENTWISE = {  # operations that are allowed on x[mask] before the result is written to y[mask]
    *("add", "sub", "mul", "div", "neg", "abs", "clamp", "clone", "detach", "to", "sqrt", "square", "pow", "sign"),
    *("add_", "sub_", "mul_", "div_", "neg_", "abs_", "clamp_", "float", "cos", "sin", "exp", "log", "tanh"),
    *("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__", "__mul__", "__rmul__", "__imul__"),
    *("__truediv__", "__rtruediv__", "__itruediv__", "__neg__", "__pow__", "__invert__", "__and__", "__or__"),
    *("logical_not", "logical_and", "logical_or", "eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__"),
    *("__lt__", "__le__", "__gt__", "__ge__", "minimum", "maximum", "clamp_min", "clamp_max"),
    "dim",
}
_SHAPELESS = {
    "dtype",
    "device",
    "ndim",
    "layout",
    "is_cuda",
    "requires_grad",
    "is_sparse",
}  # attributes of x[mask]
MOST_OPERATIONS = 25_000  # of one step; more take minutes to trace and longer to compile
_MOST_NODES = 40_000  # of its graph before it is simplified, which has a node for each copy and each view, too


class Queries(enum.Enum):
    """The answers of a trace to a scenario's own calls of `World.collides`; VMAS's own calls are always traced.

    A scenario that asks in the way that a trace assumes does the same in the cases APART and SKIPPED.
    """

    TRACED = "yes, and whatever follows depends on whether the pair is near"
    APART = "yes, though the pair is near in no environment"
    SKIPPED = "no"


def run_simulation(
    function: Callable[..., Iterable[Tensor]],
    inputs: list[Tensor],
    numbers: list[Tensor],
    world: World,
    queries: Queries,
) -> list[Tensor]:
    """Return the results of a function of tensors under this assumption about the scenario's own queries.

    numbers: what the function's operations that draw random numbers return.
    """
    tracer = _Tracer(queries)
    with torch.no_grad(), tracer, _broad_phase(world, tracer), replayed_draws(numbers, lambda _: False):
        return [value.clone() for value in function(*(tensor.clone() for tensor in inputs))]


def trace_simulation(
    function: Callable[..., Iterable[Tensor]],
    inputs: list[Tensor],
    numbers: list[Tensor],
    world: World,
    may_read_numbers: bool = False,
) -> tuple[GraphModule, set[int], bool]:
    """Return the graph of a function of tensors, the indices of the inputs that it writes to, and whether it asks.

    numbers: what the function's operations that draw random numbers have returned. They are further inputs of the
    graph, after the function's own. If `may_read_numbers`, the graph may be valid for these numbers alone.

    `world` is the simulated world, whose collisions the function computes; a function that asks calls
    `World.collides` itself. The function may write to its inputs and keep tensors elsewhere; the graph does
    neither. The graph is valid for all inputs of these shapes and types. Results that depend on no input are
    computed once, here.

    Raises:
        NotTraceable: the function depends on values, fails, or has too many operations.
        NotFaithful: it draws other random numbers than `numbers`.
    """
    all_inputs = [*inputs, *numbers]
    tracer = _Tracer(Queries.TRACED, num_varying=len(inputs) if may_read_numbers else len(all_inputs))

    def replay(*tensors: Tensor) -> list[Tensor]:
        with replayed_draws(tensors[len(inputs) :], tracer.is_traced):
            return list(function(*tensors[: len(inputs)]))

    try:
        with torch.no_grad(), tracer, _broad_phase(world, tracer):
            # Two slots may hold one tensor, which a trace would take for one input: each input is a copy.
            traced = trace_graph(replay, [tensor.clone() for tensor in all_inputs])
    except (NotTraceable, NotFaithful):
        raise
    except Exception as error:  # a scenario is foreign code, and tracing does not support every operation
        raise NotTraceable(f"{_first_line(error)} ({error_location(error)})") from error
    for node in traced.graph.nodes:
        _require_deterministic(node)
    try:
        with torch.no_grad():
            graph = trace_graph(functionalize(traced), [tensor.clone() for tensor in all_inputs])
    except RuntimeError as error:  # it writes an input's number into a tensor that is no input
        raise NotTraceable(f"a tensor that a walk does not find takes part: {_first_line(error)}") from error
    written = _remove_writes(graph)
    _fold_constants(graph)
    return graph, written, tracer.has_asked


class _Tracer(TorchFunctionMode):
    """The mode that handles every function of tensors before the function is traced.

    near: flags by two entities: whether the two entities are near in any environment.
    has_asked: whether the scenario itself has called `World.collides`.
    """

    def __init__(self, queries: Queries, num_varying: int = 0) -> None:
        super().__init__()
        self._num_varying, self._num_inputs = num_varying, 0  # of the inputs, the first ones vary
        self.queries, self.has_asked, self.is_asking = queries, False, False
        self._selected: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # for x[mask], by id: a copy of all of x, and the mask
        self.near: dict[frozenset[int], Tensor] = {}
        self._varying: set[Node] = set()  # nodes that depend on an input, up to the node `_last`
        self._last: Node | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        end_if_stopped()
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name == "__get__":  # of an attribute, such as shape
            name = getattr(func, "__self__", func).__name__
        if name in _VALUES and isinstance(args[0], Tensor):
            return self._read_value(func, args, kwargs)
        if name == "__getitem__" and (mask := _mask(args[1])) is not None:
            return self._select(_rest(args[0], args[1]), mask)
        if name == "__setitem__" and (mask := _mask(args[1])) is not None:
            return self._write(_rest(args[0], args[1]), mask, args[2])
        masks = [self._selected[id(arg)][1] for arg in args if id(arg) in self._selected]
        result = func(*args, **kwargs)
        self._mark_location()
        if masks:
            self._require_elementwise(name, masks, [arg for arg in args if isinstance(arg, Tensor)])
            if isinstance(result, Tensor):
                self._selected[id(result)] = result, masks[0]
        return result

    def _read_value(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Return the value of a tensor that depends on no input or that is only asserted."""
        frame = caller()
        if frame.f_code is World.collides.__code__:
            # The answer is true, so that every pair is traced; `_broad_phase` applies the flag to the result.
            apart = self.is_asking and self.queries is Queries.APART
            near = torch.zeros_like(args[0]) if apart else args[0]
            self.near[_pair(frame.f_locals["a"], frame.f_locals["b"])] = near
            return not (self.is_asking and self.queries is Queries.SKIPPED)
        if self.is_traced(args[0]) and not _is_assertion(frame):
            raise NotTraceable(f"Python depends on a tensor's value ({location()})")
        with disable_proxy_modes_tracing():
            return func(*args, **kwargs)

    def is_traced(self, tensor: Tensor) -> bool:
        """Return whether a tensor was computed from an input."""
        tensor_node = _node_of(tensor)
        if tensor_node is None:
            return False
        node = self._last.next if self._last else next(iter(tensor_node.graph.nodes))
        while node.op != "root":
            self._num_inputs += node.op == "placeholder"
            is_input = node.op == "placeholder" and self._num_inputs <= self._num_varying
            if is_input or any(source in self._varying for source in node.all_input_nodes):
                self._varying.add(node)
            self._last, node = node, node.next
        return tensor_node in self._varying

    def _mark_location(self) -> None:
        """Store the caller's file and line in the newest nodes, for messages."""
        mode = get_proxy_mode()
        node = mode.tracer.graph._root.prev if mode else None
        if node is None or "location" in node.meta:
            return
        frame = caller()
        while node.op != "root" and "location" not in node.meta:
            node.meta["location"] = frame.f_code.co_filename, frame.f_lineno
            _require_deterministic(node)
            node = node.prev
        if mode and len(mode.tracer.graph.nodes) > _MOST_NODES:
            raise NotTraceable(f"a step has more than {_MOST_NODES} operations ({location()})")

    def _select(self, whole: Tensor, mask: Tensor) -> Tensor:
        copy = whole.clone()
        self._selected[id(copy)] = copy, mask
        return copy

    def _write(self, whole: Tensor, mask: Tensor, value: Any) -> None:
        if isinstance(value, Tensor):
            if id(value) in self._selected:
                self._require_elementwise("__setitem__", [mask, self._selected[id(value)][1]], [value])
            elif value.ndim > whole.ndim - mask.ndim and value.numel() > 1:
                raise NotTraceable(f"a write to x[mask] depends on how many elements it selects ({location()})")
        whole.copy_(torch.where(_like(mask, whole), value, whole))

    def _require_elementwise(self, name: str, masks: list[Tensor], operands: list[Tensor]) -> None:
        if name in _SHAPELESS:
            return
        others = [operand for operand in operands if id(operand) not in self._selected and operand.numel() > 1]
        if (
            name not in _ELEMENTWISE | {"__setitem__"}
            or others
            or not all(_same(mask, masks[0]) for mask in masks)
        ):
            raise NotTraceable(f"{name} of x[mask] depends on how many elements it selects ({location()})")


@contextmanager
def _broad_phase(world: World, tracer: _Tracer) -> Iterator[None]:
    """Set forces to 0 and distances to infinity between entities that are near in no environment.

    This equals VMAS's skipping of the pair. Skipping changes results, because forces reach a little further
    than the broad phase, and because scenarios read the distance of pairs that may collide. Between spheres,
    forces do not reach further, and their forces stay as they are. The world's own methods compute everything,
    also if a subclass or an attribute replaces VMAS's.
    """
    names = "update_env_forces", "collides", "get_distance"
    own = {name: getattr(world, name) for name in names}
    own_attributes = {name: world.__dict__[name] for name in names if name in world.__dict__}

    def forces(entity_a: Any, f_a: Tensor, t_a: Any, entity_b: Any, f_b: Tensor, t_b: Any) -> None:
        near = tracer.near.get(_pair(entity_a, entity_b))
        values = [f_a, t_a, f_b, t_b]
        are_spheres = isinstance(entity_a.shape, Sphere) and isinstance(entity_b.shape, Sphere)
        if near is not None and not are_spheres:
            values = [torch.where(near, value, 0.0) if isinstance(value, Tensor) else value for value in values]
        own["update_env_forces"](entity_a, *values[:2], entity_b, *values[2:])

    def collides(a: Any, b: Any) -> bool:
        caller = sys._getframe(1)
        tracer.is_asking = caller.f_code is not World._apply_vectorized_enviornment_force.__code__
        tracer.has_asked |= tracer.is_asking
        tracer.near.pop(_pair(a, b), None)  # of the last query; this one may not come to compare positions
        result: bool = own["collides"](a, b)
        last_query[:] = [caller, _pair(a, b)]
        return result

    def distance(entity_a: Any, entity_b: Any, env_index: int | None = None) -> Tensor:
        value: Tensor = own["get_distance"](entity_a, entity_b, env_index)
        near = tracer.near.get(_pair(entity_a, entity_b))
        if near is None or last_query != [sys._getframe(1), _pair(entity_a, entity_b)]:
            return value
        return torch.where(near, value, torch.inf)

    # The Python frame and the pair of the last call of `collides`. A scenario calls `get_distance` next in the
    # same frame, for the same pair, only if the pair is near in some environment.
    last_query: list[Any] = []
    replacements = {"update_env_forces": forces, "collides": collides, "get_distance": distance}
    world.__dict__.update(replacements)
    try:
        yield
    finally:
        for name in replacements:
            del world.__dict__[name]
        world.__dict__.update(own_attributes)


def _pair(a: Any, b: Any) -> frozenset[int]:
    return frozenset((id(a), id(b)))


def _mask(index: Any) -> Tensor | None:
    """Return the mask of an index such as x[mask] or x[mask, 1], or None."""
    first = index[0] if isinstance(index, tuple) and index else index
    return first if isinstance(first, Tensor) and first.dtype == torch.bool and first.ndim else None


def _rest(whole: Tensor, index: Any) -> Tensor:
    """Return the view from which the mask selects: x[:, 1] for x[mask, 1]."""
    if not isinstance(index, tuple):
        return whole
    if index[0].ndim > 1 or not all(isinstance(item, int | slice) for item in index[1:]):
        raise NotTraceable(f"an index combines a mask with unsupported indices ({location()})")
    rest: Tensor = whole[(slice(None), *index[1:])]
    return rest


def _like(mask: Tensor, whole: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (whole.ndim - mask.ndim))


def _same(one: Tensor, other: Tensor) -> bool:
    """Return whether two masks were computed in the same way from the same tensors, such as `~done` twice."""
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
    """Return whether an operation writes to the node's tensor or a view of it, so that the value may change."""
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
    """Return the first and last line of every assertion in a file."""
    nodes = ast.walk(ast.parse("".join(linecache.getlines(path))))
    return [(node.lineno, node.end_lineno or node.lineno) for node in nodes if isinstance(node, ast.Assert)]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _require_deterministic(node: Node) -> None:
    reasons = {
        torch.Tag.nondeterministic_seeded: "a step draws random numbers",
        torch.Tag.dynamic_output_shape: "the shape of a result depends on a tensor's value",
        torch.Tag.data_dependent_output: "Python depends on a tensor's value",
    }
    for tag in getattr(node.target, "tags", ()):
        if tag in reasons and not _is_indexed_by_numbers(node):
            location = format_location(*node.meta["location"])
            raise NotTraceable(f"{reasons[tag]}: {node.target} ({location})")


def _is_indexed_by_numbers(node: Node) -> bool:
    """Return whether a node indexes by numbers, not by masks, which select a varying number of values."""
    if node.target not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default):
        return False
    items = node.args[1]
    assert isinstance(items, list | tuple)
    indices = [item for item in items if isinstance(item, Node)]
    return all(index.meta["val"].dtype not in (torch.bool, torch.uint8) for index in indices)


def _remove_writes(graph: GraphModule) -> set[int]:
    """Remove the writes to inputs with which a functional graph ends; return the indices of these inputs."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    written = set()
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.copy_.default:
            if node.args[0].op != "placeholder":
                raise NotTraceable("a step writes to a tensor that a walk through attributes does not find")
            written.add(inputs.index(node.args[0]))
            node.replace_all_uses_with(node.args[1])
            graph.graph.erase_node(node)
    return written


def _fold_constants(graph: GraphModule) -> None:
    """Compute the nodes that depend on no input, and write the numbers into the graph, for the compiler to use."""
    varying: set[Node] = set()
    values: dict[Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op in ("placeholder", "output") or any(source in varying for source in node.all_input_nodes):
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
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda source: values[source])
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _constant(graph: GraphModule, value: Tensor, name: str) -> Node:
    if value.numel() and bool((value == value.flatten()[0]).all()):
        number = value.flatten()[0].item()
        options: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
        return graph.graph.call_function(torch.ops.aten.full.default, (list(value.shape), number), options)
    graph.register_buffer(name, value.detach().clone())
    return graph.graph.get_attr(name)
