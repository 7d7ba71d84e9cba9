"""The side effect of resets: what a reset of one environment does to the others.

VMAS moves the landmark of a joint in all environments when it resets one. Such an effect is traced as a function
of the state, and the fast path applies it to the environments that play on while others are reset.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torchrl.envs import EnvBase
from vmas.simulator.environment import Environment

from mappo.errors import NotFaithful, NotTraceable
from mappo.fast_simulation.pure_step import StepState, ancestors, restored_slots
from mappo.fast_simulation.slots import Slots
from mappo.fast_simulation.step_draws import recorded_draws, replayed_draws
from mappo.fast_simulation.tracing import trace_simulation


@dataclass(frozen=True)
class SideEffect:
    """The effect of a reset on the environments that are not reset.

    names: the slots that it writes.
    needed: the slots that it reads.
    """

    names: tuple[str, ...] = ()
    needed: frozenset[str] = frozenset()
    runs: tuple[Callable[..., Any], ...] = ()  # with environment 0 reset, and with environment 1 reset
    paths: tuple[str, ...] = ()  # the inputs of `runs`, which hold the numbers that one reset has drawn

    def __call__(self, state: StepState) -> StepState:
        """Return the slots `names` of each environment after the reset of another environment.

        state: the slots `needed` and `names` [envs, ...], which stay as they are.
        """
        if not self.names:
            return {}
        some = next(iter(state.values()))
        inputs = [state.get(path, some) for path in self.paths]
        with torch.no_grad():
            without_first, without_second = (run(*inputs) for run in self.runs)
        return {
            name: torch.cat([second[:1], first[1:]])
            for name, first, second in zip(self.names, without_first, without_second, strict=True)
        }


def trace_side_effect(environment: EnvBase, slots: Slots, paths: list[str], names: list[str]) -> SideEffect:
    """Trace what a reset of one environment does to slots of the others.

    paths: the slots that vary. names: those of them that the reset of another environment writes.

    Raises:
        NotFaithful: the effect is not a function of the state.
    """
    simulator = environment.base_env._env
    runs, needed = [], set[str]()
    with restored_slots(environment, slots):
        inputs = [slots[path].get().clone() for path in paths]
        with recorded_draws(environment.device) as drawn:
            simulator.reset_at(0, return_observations=False)
        for row in (0, 1):

            def reset(*tensors: Tensor, row: int = row) -> list[Tensor]:
                for path, value in zip(paths, tensors, strict=True):
                    slots[path].put(value)
                with replayed_draws(drawn.numbers, is_traced=lambda _: False):
                    Environment.reset_at.__wrapped__(simulator, row, return_observations=False)
                return [slots[name].get() for name in names]

            try:
                graph, _, has_asked = trace_simulation(reset, inputs, [], simulator.world)
            except NotTraceable as error:
                raise NotFaithful(f"{min(names)}: {error}") from error
            if has_asked:
                raise NotFaithful("a reset calls World.collides")
            nodes = list(graph.graph.nodes)
            results = ancestors([item for item in nodes[-1].args[0] if isinstance(item, Node)])
            placeholders = [node for node in nodes if node.op == "placeholder"]
            needed |= {path for path, node in zip(paths, placeholders, strict=False) if node in results}
            runs.append(graph)
    return SideEffect(tuple(names), frozenset(needed), tuple(runs), tuple(paths))
