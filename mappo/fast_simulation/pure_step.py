"""The pure step: one step of a VMAS environment as a function of its state and the agents' actions.

`trace_step` finds the slots that hold the state and traces one step of VMAS's own code as a graph
(state, action, random numbers) -> (state, observation, reward, terminated). docs/fast-simulation.md explains how.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchrl.envs import EnvBase
from vmas.simulator.environment import Environment

from mappo.compute.compiler import compile_graph
from mappo.environment.keys import ACTION
from mappo.environment.state_walk import same_bits
from mappo.environment.vmas_environment import stacked
from mappo.errors import NotFaithful, NotTraceable
from mappo.fast_simulation.guards import few_operations, no_outside_reads
from mappo.fast_simulation.python_state import find_slots
from mappo.fast_simulation.slots import Slots, changed_slots, shared_memory, signatures, view_of
from mappo.fast_simulation.step_draws import Draw, recorded_draws
from mappo.fast_simulation.tracing import Queries, run_simulation, trace_simulation
from mappo.fast_simulation.watch import Watch

_log = logging.getLogger(__name__)

StepState = dict[str, Tensor]  # tensors [envs, ...] by path of the slot
Frame = tuple[
    StepState, Tensor, Tensor, Tensor
]  # state; observation, reward [envs, agents, ...]; terminated [envs, 1]

_QUERIED_STATES = 3


@dataclass(frozen=True)
class PureStep:
    """The step of a simulation as a function, without the simulation's objects.

    names: the slots whose tensors are the state. A step reads them; a step or a reset writes them.
    constants: the slots that steps or resets may read and must never write.
    observed: the slots, not constants, on which the observation of a state depends, such as the one after a reset.
    draws: what a step draws. A draw returns new random numbers.
    graph: (the state's tensors, action, random numbers) -> (the state's tensors, observation, reward, terminated).
    """

    names: tuple[str, ...]
    constants: frozenset[str]
    observed: frozenset[str]
    draws: tuple[Draw, ...]
    graph: GraphModule
    run: Callable[..., Any]
    is_compiled: bool = False

    def __call__(self, state: StepState, action: Tensor, numbers: Sequence[Tensor] | None = None) -> Frame:
        """Compute one frame of all environments, without changing the arguments.

        action: [envs, agents, features].
        numbers: the random numbers of the step; by default, the step draws them.
        """
        numbers = [draw() for draw in self.draws] if numbers is None else numbers
        with torch.no_grad():
            inputs = (*(state[name] for name in self.names), action, *numbers)
            *values, observation, reward, terminated = self.run(*inputs)
        return dict(zip(self.names, values, strict=True)), observation, reward, terminated

    def compiled(self, state: StepState, action: Tensor) -> "PureStep":
        """Return the compiled step; the compiler caches its results on disk for later processes."""
        numbers = (draw() for draw in self.draws)
        run = compile_graph(self.graph, [*(state[name] for name in self.names), action, *numbers])
        return replace(self, run=run, is_compiled=True)

    def as_graph(self) -> "PureStep":
        """Return the step that runs the graph's operations one after the other, without the compiler."""
        return replace(self, run=self.graph, is_compiled=False)


def find_varying(environment: EnvBase) -> frozenset[str]:
    """Return the slots whose tensors a step or a reset replaces or writes to.

    The function resets and steps the environment, and so draws random numbers.

    Raises:
        NotFaithful: a step or a reset changes anything else that Python can read, or a step reads the clock or a
            file, or draws random numbers that cannot be drawn again, or has too many operations.
    """
    varying: set[str] = set()
    simulator, row = environment.base_env._env, environment.batch_size[0] - 1
    simulator.step(_random_actions(environment))
    simulator.reset()
    _require_few_operations(environment)
    slots, watch = find_slots(environment), Watch(environment)
    for reset in (simulator.reset, lambda: simulator.reset_at(row), lambda: simulator.reset_at(0)):
        for change in (lambda: _play_watched(environment), reset):
            previous = signatures(slots)
            change()
            varying |= changed_slots(previous, slots)
            _require_whole_views(previous, slots)
            watch.require_unchanged()
    return frozenset(varying)


def _require_whole_views(previous: dict[str, tuple[Tensor, int]], slots: Slots) -> None:
    """Refuse a tensor that was written to since the `previous` signatures if a slot holds a part of its memory.

    Copies of a state do not keep that connection, so that no later check could see it.
    """
    for path, (tensor, version) in previous.items():
        if slots[path].get() is tensor and tensor._version != version:
            for other in sorted(shared_memory(slots, path)):
                if view_of(slots[other].get()) != view_of(tensor):
                    raise NotFaithful(f"a frame or a reset writes into {path}, which shares memory with {other}")


def trace_step(environment: EnvBase, varying: frozenset[str]) -> PureStep:
    """Trace one step of a plain environment as a graph, which runs one operation after the other.

    varying: what `find_varying` has returned for this environment.

    Raises:
        NotFaithful: a step is not a function of the tensors that a walk through the environment finds.
    """
    try:
        slots = find_slots(environment)
        draws, numbers = _record(environment, slots)
        graph, names, varying = _trace(environment, slots, set(varying), numbers)
        observed = _observed(environment, slots, sorted(varying))
    except NotTraceable as error:
        raise NotFaithful(str(error)) from error
    _require_rows(environment, slots, varying, names)
    return PureStep(names, frozenset(slots.keys() - varying), observed, draws, graph, graph)


def _require_few_operations(environment: EnvBase) -> None:
    """Count the operations of a step in which all entities touch each other, as a trace has them."""
    simulator = environment.base_env._env
    for entity in simulator.world.entities:
        entity.state.pos = torch.zeros_like(entity.state.pos)
    try:
        with few_operations():
            simulator.step(_random_actions(environment))
    except NotFaithful:
        raise
    except Exception as error:  # a scenario is foreign code, to which this state may be impossible
        _log.debug("the operations of a step are not counted: %s", error)
    simulator.reset()


def _play_watched(environment: EnvBase) -> None:
    actions = _random_actions(environment)
    with no_outside_reads(), recorded_draws(environment.device):
        environment.base_env._env.step(actions)


def _record(environment: EnvBase, slots: Slots) -> tuple[tuple[Draw, ...], list[Tensor]]:
    """Return the draws of a step and the numbers that they gave."""
    actions = _random_actions(environment)
    with restored_slots(environment, slots), recorded_draws(environment.device) as step:
        environment.base_env._env.step(actions)
    return tuple(step.draws), step.numbers


def _trace(
    environment: EnvBase, slots: Slots, varying: set[str], numbers: list[Tensor]
) -> tuple[GraphModule, tuple[str, ...], frozenset[str]]:
    """Return the graph of a step, the slots that the graph needs, and the slots that vary.

    If the traced step writes to a slot that is not in `varying`, the function adds the slot and traces again.
    """
    action, world = environment.rand_action()[ACTION], environment.base_env._env.world
    while True:
        paths = sorted(varying)
        with restored_slots(environment, slots):
            previous = signatures({path: slots[path] for path in slots.keys() - varying})
            inputs = [*(slots[path].get() for path in paths), action]
            graph, written, has_asked = trace_simulation(
                _step_of(environment, slots, paths), inputs, numbers, world
            )
            new_slots = changed_slots(previous, slots)
        if not new_slots:
            break
        varying |= new_slots
    if has_asked:
        _check_queries(environment, slots, paths, numbers)
    names = _reduce_to_live(graph, paths)
    for index in sorted(index for index in written if index < len(paths)):
        if others := shared_memory(slots, paths[index]) & {*names}:
            raise NotFaithful(f"a step writes into {paths[index]}, which shares memory with {min(others)}")
    return graph, names, frozenset(varying)


def _check_queries(environment: EnvBase, slots: Slots, paths: list[str], numbers: list[Tensor]) -> None:
    """Check that a scenario skips a pair that is not near, and does nothing else, when it calls `World.collides`.

    Raises:
        NotFaithful: the answer decides something else.
    """
    world, step = environment.base_env._env.world, _step_of(environment, slots, paths)
    with restored_slots(environment, slots):
        inputs = [*(slots[path].get() for path in paths), environment.rand_action()[ACTION]]
        for _ in range(_QUERIED_STATES):
            inputs = [_altered_state(value) for value in inputs]
            apart, skipped = (
                run_simulation(step, inputs, numbers, world, queries)
                for queries in (Queries.APART, Queries.SKIPPED)
            )
            if not all(same_bits(one, other) for one, other in zip(apart, skipped, strict=True)):
                raise NotFaithful("the scenario uses an answer of World.collides for more than skipping a pair")


def _altered_state(value: Tensor) -> Tensor:
    return value + 0.1 * torch.randn_like(value) if value.is_floating_point() else value


def _observed(environment: EnvBase, slots: Slots, paths: list[str]) -> frozenset[str]:
    """Return those of the slots on which the observations of a state depend."""

    def observe(*inputs: Tensor) -> list[Tensor]:
        for path, value in zip(paths, inputs, strict=True):
            slots[path].put(value)
        observations: list[Tensor] = environment.base_env._env._get_from_scenario(True, False, False, False)[0]
        return observations

    with restored_slots(environment, slots):
        inputs = [slots[path].get() for path in paths]
        with recorded_draws(environment.device) as drawn:
            environment.base_env._env.get_from_scenario(True, False, False, False)
        graph, _, has_asked = trace_simulation(observe, inputs, drawn.numbers, environment.base_env._env.world)
    if has_asked:
        raise NotFaithful("an observation calls World.collides")
    return needed_inputs(graph, paths)


def _random_actions(environment: EnvBase) -> list[Tensor]:
    actions: list[Tensor] = environment.base_env.read_action(environment.rand_action()[ACTION])
    return actions


def _step_of(environment: EnvBase, slots: Slots, paths: list[str]) -> Callable[..., list[Tensor]]:
    base = environment.base_env
    simulator = base._env

    def step(*inputs: Tensor) -> list[Tensor]:
        for path, value in zip(paths, inputs[:-1], strict=True):
            slots[path].put(value)
        observations, rewards, terminated, _ = Environment.step.__wrapped__(
            simulator, base.read_action(inputs[-1])
        )
        return [
            *(slots[path].get() for path in paths),
            *stacked(observations, rewards, terminated),
        ]

    return step


@contextmanager
def restored_slots(environment: EnvBase, slots: Slots) -> Iterator[None]:
    """Put the tensors of all slots back after the block; clamp actions within the block."""
    simulator = environment.base_env._env
    tensors, clamp_action = {path: slot.get() for path, slot in slots.items()}, simulator.clamp_action
    simulator.clamp_action = True  # without it, VMAS refuses actions out of range
    try:
        yield
    finally:
        simulator.clamp_action = clamp_action
        for path, slot in slots.items():
            slot.put(tensors[path])


def _reduce_to_live(graph: GraphModule, paths: list[str]) -> tuple[str, ...]:
    """Remove inputs and outputs on which no observation, reward or flag depends; return the other slots."""
    nodes = list(graph.graph.nodes)
    inputs = dict(zip(paths, (node for node in nodes if node.op == "placeholder"), strict=False))
    *values, observation, reward, terminated = nodes[-1].args[0]
    outputs = dict(zip(paths, values, strict=True))
    live: set[str] = set()
    needed = _ancestors([observation, reward, terminated])
    while new_paths := {path for path in paths if inputs[path] in needed} - live:
        live |= new_paths
        needed = _ancestors([observation, reward, terminated, *(outputs[path] for path in live)])
    names = tuple(path for path in paths if path in live)
    nodes[-1].args = ([*(outputs[path] for path in names), observation, reward, terminated],)
    graph.graph.eliminate_dead_code()
    for path in paths:
        if path not in live:
            graph.graph.erase_node(inputs[path])
    graph.recompile()
    return names


def needed_inputs(graph: GraphModule, paths: Sequence[str]) -> frozenset[str]:
    """Return those of the first inputs of a graph, which `paths` names, on which its results depend."""
    nodes = list(graph.graph.nodes)
    needed = _ancestors([item for item in nodes[-1].args[0] if isinstance(item, Node)])
    placeholders = [node for node in nodes if node.op == "placeholder"]
    return frozenset(path for path, node in zip(paths, placeholders, strict=False) if node in needed)


def _ancestors(nodes: list[Node]) -> set[Node]:
    ancestors, queue = set(nodes), list(nodes)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in ancestors:
                ancestors.add(node)
                queue.append(node)
    return ancestors


def _require_rows(environment: EnvBase, slots: Slots, varying: frozenset[str], names: tuple[str, ...]) -> None:
    """Check that state has a row for each environment, and that constants are equal in all environments.

    A finished environment takes the next fresh state, which another environment may have made. Constants that
    differ between environments would not fit such a state.

    Raises:
        NotFaithful: environments share a tensor of the state, or a constant differs between them.
    """
    (num_envs,) = environment.batch_size
    for path in names:
        value = slots[path].get()
        if value.ndim == 0 or len(value) != num_envs:
            raise NotFaithful(f"environments share state: {path}")
    for path in slots.keys() - varying:
        value = slots[path].get()
        if value.ndim and len(value) == num_envs and not same_bits(value, value[:1].expand_as(value)):
            raise NotFaithful(f"environments differ: {path}")
