"""The side effect of resets: what a reset of one environment does to the others.

VMAS moves the landmark of a joint in all environments when it resets one. Such an effect is traced as a function
of the state, and the fast path applies it to the environments that play on while others are reset.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule
from torchrl.envs import EnvBase
from vmas.simulator.environment import Environment

from mappo.errors import NotFaithful, NotTraceable
from mappo.fast_simulation.pure_step import StepState, needed_inputs, restored_slots
from mappo.fast_simulation.slots import Slots
from mappo.fast_simulation.step_draws import recorded_draws
from mappo.fast_simulation.tracing import trace_simulation


@dataclass(frozen=True)
class SideEffect:
    """The effect of a reset on the environments that are not reset.

    names: the slots that it writes.
    paths: the inputs of the graphs.
    graphs: (tensors of `paths`, numbers) -> (tensors of `names`) after a reset of environment 0, and of
        environment 1.
    numbers: what one reset has drawn, which has no effect on the other environments.
    """

    names: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    graphs: tuple[GraphModule, ...] = ()
    numbers: tuple[Tensor, ...] = ()

    def __call__(self, state: StepState) -> StepState:
        """Return the slots `names` of each environment after the reset of another environment.

        state: the slots `needed` [envs, ...], which stay as they are.
        """
        if not self.names:
            return {}
        inputs = [state.get(path) for path in self.paths]
        with torch.no_grad():
            without_first, without_second = (graph(*inputs, *self.numbers) for graph in self.graphs)
        return {
            name: torch.cat([second[:1], first[1:]])
            for name, first, second in zip(self.names, without_first, without_second, strict=True)
        }

    @property
    def needed(self) -> frozenset[str]:
        """The slots on which the effect depends."""
        return frozenset().union(*(needed_inputs(graph, self.paths) for graph in self.graphs))

    def on(self, names: frozenset[str]) -> "SideEffect":
        """Return the effect on these slots alone."""
        kept = [index for index, name in enumerate(self.names) if name in names]
        graphs = tuple(_with_results(graph, kept) for graph in self.graphs)
        return replace(self, names=tuple(self.names[index] for index in kept), graphs=graphs if kept else ())


def trace_side_effect(environment: EnvBase, slots: Slots, paths: list[str], names: list[str]) -> SideEffect:
    """Trace what a reset of one environment does to slots of the others.

    paths: the slots that vary. names: those of them that the reset of another environment writes.

    Raises:
        NotFaithful: the effect is not a function of the state.
    """
    simulator = environment.base_env._env

    def reset(row: int) -> Callable[..., list[Tensor]]:
        def run(*tensors: Tensor) -> list[Tensor]:
            for path, value in zip(paths, tensors, strict=True):
                slots[path].put(value)
            Environment.reset_at.__wrapped__(simulator, row, return_observations=False)
            return [slots[name].get() for name in names]

        return run

    with restored_slots(environment, slots):
        inputs = [slots[path].get().clone() for path in paths]
        with recorded_draws(environment.device) as drawn:
            simulator.reset_at(0, return_observations=False)
        try:
            traced = [
                trace_simulation(reset(row), inputs, drawn.numbers, simulator.world, may_read_numbers=True)
                for row in (0, 1)
            ]
        except NotTraceable as error:
            raise NotFaithful(str(error)) from error
    if any(has_asked for _, _, has_asked in traced):
        raise NotFaithful("a reset calls World.collides")
    return SideEffect(tuple(names), tuple(paths), tuple(graph for graph, _, _ in traced), tuple(drawn.numbers))


def _with_results(graph: GraphModule, kept: list[int]) -> GraphModule:
    graph = copy.deepcopy(graph)
    output = list(graph.graph.nodes)[-1]
    output.args = ([output.args[0][index] for index in kept],)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph
