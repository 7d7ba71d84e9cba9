"""The pure step: one step of a VMAS environment as a function of its state and the agents' actions.

`trace_step` finds the slots that hold the state and traces one step of VMAS's own code as a graph
(state, action) -> (state, observation, reward, terminated). docs/fast-simulation.md explains how.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torch.fx import GraphModule, Node
from torchrl.envs import EnvBase
from vmas.simulator.environment import Environment

from mappo.compute.compiler import compile_graph
from mappo.environment.keys import ACTION
from mappo.errors import NotFaithful, NotTraceable, SimulationStateError
from mappo.fast_simulation.slots import (
    Slots,
    changed_slots,
    find_slots,
    other_content,
    replaced_owners,
    same_bits,
    shared_memory,
    signatures,
)
from mappo.fast_simulation.tracing import trace_simulation

StepState = dict[str, Tensor]  # tensors [envs, ...] by path of the slot
Frame = tuple[
    StepState, Tensor, Tensor, Tensor
]  # state; observation, reward [envs, agents, ...]; terminated [envs, 1]


@dataclass(frozen=True)
class PureStep:
    """The step of a simulation as a function, without the simulation's objects.

    names: the slots whose tensors are the state. A step reads them; a step or a reset writes them.
    constants: the slots that steps or resets may read and must never write.
    graph: (the state's tensors, action) -> (the state's tensors, observation, reward, terminated).
    """

    names: tuple[str, ...]
    constants: frozenset[str]
    graph: GraphModule
    run: Callable[..., Any]
    is_compiled: bool = False

    def __call__(self, state: StepState, action: Tensor) -> Frame:
        """Compute one frame of all environments, without changing the arguments.

        action: [envs, agents, features].
        """
        with torch.no_grad():
            *values, observation, reward, terminated = self.run(*(state[name] for name in self.names), action)
        return dict(zip(self.names, values, strict=True)), observation, reward, terminated

    def compiled(self, state: StepState, action: Tensor) -> "PureStep":
        """Return the compiled step; the compiler caches its results on disk for later processes."""
        run = compile_graph(self.graph, [*(state[name] for name in self.names), action])
        return PureStep(self.names, self.constants, self.graph, run, is_compiled=True)


def trace_step(environment: EnvBase) -> PureStep:
    """Trace one step of a plain environment as a graph, which runs one operation after the other.

    The function resets and steps the environment, and so draws random numbers.

    Raises:
        NotFaithful: a step is not a function of the tensors that a walk through the environment finds.
    """
    try:
        carried = environment.step_and_maybe_reset(environment.rand_action(environment.reset()))[1]
        environment.reset()
        slots = find_slots(environment)
        varying = _varying_slots(environment, slots, carried)
        graph, names = _trace(environment, slots, varying)
    except (NotTraceable, SimulationStateError) as error:
        raise NotFaithful(str(error)) from error
    _require_rows(environment, slots, varying, names)
    return PureStep(names, frozenset(slots.keys() - varying), graph, graph)


def _varying_slots(environment: EnvBase, slots: Slots, carried: TensorDictBase) -> set[str]:
    """Return the slots whose tensors a step or a reset replaces or writes to.

    Raises:
        NotFaithful: a step or a reset replaces an object, or changes state that is not in a tensor.
    """
    varying: set[str] = set()
    content = other_content(environment)
    for action in (_play, _reset_all, _play, _reset_one, _play, _reset_one):
        previous = signatures(slots)
        action(environment, carried)
        varying |= changed_slots(previous, slots)
        if replaced := replaced_owners(environment, slots):
            raise NotFaithful(f"the scenario replaces objects, and not only tensors: {min(replaced)}")
        current = other_content(environment)
        for path in sorted(content.keys() | current.keys()):
            if content.get(path, "nothing") != current.get(path, "nothing"):
                raise NotFaithful(f"the scenario keeps state outside of tensors: {path}")
    return varying


def _play(environment: EnvBase, carried: TensorDictBase) -> None:
    environment.rand_step(carried.clone())


def _reset_all(environment: EnvBase, _: TensorDictBase) -> None:
    environment.reset()


def _reset_one(environment: EnvBase, _: TensorDictBase) -> None:
    environment.base_env._env.reset_at(environment.batch_size[0] - 1)


def _trace(environment: EnvBase, slots: Slots, varying: set[str]) -> tuple[GraphModule, tuple[str, ...]]:
    """Return the graph of a step and the slots that the graph needs.

    If the traced step writes to a slot that is not in `varying`, the function adds the slot and traces again.
    """
    action = environment.rand_action()[ACTION]
    while True:
        paths = sorted(varying)
        with _restored_slots(environment, slots):
            previous = signatures({path: slots[path] for path in slots.keys() - varying})
            inputs = [slots[path].get() for path in paths]
            graph, written = trace_simulation(
                _step_of(environment, slots, paths), [*inputs, action], environment.base_env._env.world
            )
            new_slots = changed_slots(previous, slots)
        if not new_slots:
            break
        varying |= new_slots
    for index in written - {len(paths)}:
        if other := shared_memory(slots, paths[index]):
            raise NotFaithful(f"a step writes into {paths[index]}, which shares memory with {other}")
    return graph, _reduce_to_live(graph, paths)


def _step_of(environment: EnvBase, slots: Slots, paths: list[str]) -> Callable[..., list[Tensor]]:
    simulator, (num_envs,) = environment.base_env._env, environment.batch_size

    def step(*inputs: Tensor) -> list[Tensor]:
        for path, value in zip(paths, inputs[:-1], strict=True):
            slots[path].put(value)
        actions = [action if action.ndim > 1 else action.unsqueeze(-1) for action in inputs[-1].unbind(1)]
        observations, rewards, terminated, _ = Environment.step.__wrapped__(simulator, actions)
        return [
            *(slots[path].get() for path in paths),
            torch.stack(observations, dim=1),
            torch.stack([reward.reshape(num_envs, 1) for reward in rewards], dim=1),
            terminated.reshape(num_envs, 1),
        ]

    return step


@contextmanager
def _restored_slots(environment: EnvBase, slots: Slots) -> Iterator[None]:
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


def _ancestors(nodes: list[Node]) -> set[Node]:
    ancestors, queue = set(nodes), list(nodes)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in ancestors:
                ancestors.add(node)
                queue.append(node)
    return ancestors


def _require_rows(environment: EnvBase, slots: Slots, varying: set[str], names: tuple[str, ...]) -> None:
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
