"""A step of a VMAS environment as a function of its state and the agents' actions, without objects.

`capture_step` finds the slots that hold the state, and records one step of VMAS's own code as a graph
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
    changed,
    find_slots,
    other_content,
    replaced_owners,
    same_bits,
    shared_memory,
    signatures,
)
from mappo.fast_simulation.tracing import trace_simulation

StepState = dict[str, Tensor]  # by path of the slot, each [envs, ...]
Frame = tuple[
    StepState, Tensor, Tensor, Tensor
]  # state; observation, reward [envs, agents, ...]; terminated [envs, 1]


@dataclass(frozen=True)
class PureStep:
    """A step of a simulation without its objects.

    names: the slots whose tensors are the state: what a step reads, and a step or a reset writes.
    constants: those that a step reads or a reset might, and that nothing may write into.
    graph: (the state's tensors, action) -> (the state's tensors, observation, reward, terminated).
    """

    names: tuple[str, ...]
    constants: frozenset[str]
    graph: GraphModule
    run: Callable[..., Any]
    is_compiled: bool = False

    def __call__(self, state: StepState, action: Tensor) -> Frame:
        """One frame of all environments. Arguments are not changed; action is [envs, agents, features]."""
        with torch.no_grad():
            *after, observation, reward, terminated = self.run(*(state[name] for name in self.names), action)
        return dict(zip(self.names, after, strict=True)), observation, reward, terminated

    def compiled(self, state: StepState, action: Tensor) -> "PureStep":
        """The same, through the compiler, whose results are kept on disk for later processes."""
        run = compile_graph(self.graph, [*(state[name] for name in self.names), action])
        return PureStep(self.names, self.constants, self.graph, run, is_compiled=True)


def trace_step(environment: EnvBase) -> PureStep:
    """Record one step of a plain environment, as graph that runs operation by operation.

    The environment is reset and played with; random numbers are drawn.

    Raises:
        NotFaithful: something that a step does or depends on is not a function of tensors that a walk finds.
    """
    try:
        carried = environment.step_and_maybe_reset(environment.rand_action(environment.reset()))[1]
        environment.reset()
        slots = find_slots(environment)
        varying = _varying_slots(environment, slots, carried)
        graph, names = _record(environment, slots, varying)
    except (NotTraceable, SimulationStateError) as error:
        raise NotFaithful(str(error)) from error
    _require_rows(environment, slots, varying, names)
    return PureStep(names, frozenset(slots.keys() - varying), graph, graph)


def _varying_slots(environment: EnvBase, slots: Slots, carried: TensorDictBase) -> set[str]:
    """Slots that steps and resets give another tensor, or write into."""
    varying: set[str] = set()
    content = other_content(environment)
    for action in (_play, _reset_all, _play, _reset_one, _play, _reset_one):
        before = signatures(slots)
        action(environment, carried)
        varying |= changed(before, slots)
        if replaced := replaced_owners(environment, slots):
            raise NotFaithful(f"it replaces objects, and not only tensors: {min(replaced)}")
        after = other_content(environment)
        for path in sorted(content.keys() | after.keys()):
            if content.get(path, "nothing") != after.get(path, "nothing"):
                raise NotFaithful(f"it keeps state outside of tensors: {path}")
    return varying


def _play(environment: EnvBase, carried: TensorDictBase) -> None:
    environment.rand_step(carried.clone())


def _reset_all(environment: EnvBase, _: TensorDictBase) -> None:
    environment.reset()


def _reset_one(environment: EnvBase, _: TensorDictBase) -> None:
    environment.base_env._env.reset_at(environment.batch_size[0] - 1)


def _record(environment: EnvBase, slots: Slots, varying: set[str]) -> tuple[GraphModule, tuple[str, ...]]:
    """The graph of a step, with the slots that it needs; `varying` grows by those that only this step wrote."""
    action = environment.rand_action()[ACTION]
    while True:
        paths = sorted(varying)
        with _unchanged(environment, slots):
            before = signatures({path: slots[path] for path in slots.keys() - varying})
            inputs = [slots[path].get() for path in paths]
            graph, written = trace_simulation(
                _step_of(environment, slots, paths), [*inputs, action], environment.base_env._env.world
            )
            more = changed(before, slots)
        if not more:
            break
        varying |= more
    for index in written - {len(paths)}:
        if other := shared_memory(slots, paths[index]):
            raise NotFaithful(f"a step writes into {paths[index]}, which shares memory with {other}")
    return graph, _reduce_to_live(graph, paths)


def _step_of(environment: EnvBase, slots: Slots, paths: list[str]) -> Callable[..., list[Tensor]]:
    simulator, (num_envs,) = environment.base_env._env, environment.batch_size

    def step(*inputs: Tensor) -> list[Tensor]:
        for path, value in zip(paths, inputs[:-1], strict=True):
            slots[path].put(value)
        actions = [each if each.ndim > 1 else each.unsqueeze(-1) for each in inputs[-1].unbind(1)]
        observations, rewards, terminated, _ = Environment.step.__wrapped__(simulator, actions)
        return [
            *(slots[path].get() for path in paths),
            torch.stack(observations, dim=1),
            torch.stack([reward.reshape(num_envs, 1) for reward in rewards], dim=1),
            terminated.reshape(num_envs, 1),
        ]

    return step


@contextmanager
def _unchanged(environment: EnvBase, slots: Slots) -> Iterator[None]:
    """Every slot holds afterwards what it did; actions out of range are clamped meanwhile, not refused."""
    simulator = environment.base_env._env
    before, clamps = {path: slot.get() for path, slot in slots.items()}, simulator.clamp_action
    simulator.clamp_action = True
    try:
        yield
    finally:
        simulator.clamp_action = clamps
        for path, slot in slots.items():
            slot.put(before[path])


def _reduce_to_live(graph: GraphModule, paths: list[str]) -> tuple[str, ...]:
    """Leave out of inputs and outputs what no observation, reward or flag ever depends on; the rest by name."""
    nodes = list(graph.graph.nodes)
    inputs = dict(zip(paths, (node for node in nodes if node.op == "placeholder"), strict=False))
    *after, observation, reward, terminated = nodes[-1].args[0]
    outputs = dict(zip(paths, after, strict=True))
    live: set[str] = set()
    needed = _ancestors([observation, reward, terminated])
    while more := {path for path in paths if inputs[path] in needed} - live:
        live |= more
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
    found, ahead = set(nodes), list(nodes)
    while ahead:
        for each in ahead.pop().all_input_nodes:
            if each not in found:
                found.add(each)
                ahead.append(each)
    return found


def _require_rows(environment: EnvBase, slots: Slots, varying: set[str], names: tuple[str, ...]) -> None:
    """State has a row for each environment; what never varies must not tell environments apart.

    Finished environments take whichever fresh state is next: that of another environment is as good.
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
