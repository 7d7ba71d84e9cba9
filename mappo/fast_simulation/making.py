"""The making of a fast simulation: a scenario is traced, compiled and checked against VMAS, or refused.

What was made can be kept for environments that hold the same, such as those of the trials of a study.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torchrl.envs import EnvBase

from mappo.config import EnvironmentConfig, ExperimentConfig
from mappo.environment.environment import make_twin
from mappo.environment.keys import ACTION
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NotFaithful
from mappo.fast_simulation.equivalence import check_first_frame, check_steps, first_frame
from mappo.fast_simulation.pure_step import PureStep, find_varying, trace_step
from mappo.fast_simulation.python_state import PythonState, find_slots, read_python_state
from mappo.fast_simulation.resets import ResetCheck, Resets
from mappo.fast_simulation.simulation import FastSimulation
from mappo.fast_simulation.slots import copies
from mappo.fast_simulation.watch import require_equal, require_equal_tensors
from mappo.strict_json import canonical_json, to_dict

_MOST_OPERATIONS_OF_AUTO = 5_000  # compiled in about three minutes; joint_passage has 23,000


def make_fast_simulation(
    config: EnvironmentConfig,
    environment: EnvBase,
    is_compiled: bool = True,
    most_operations: int | None = None,
) -> FastSimulation:
    """Make the fast path of a plain environment that `config` made and nobody has used yet.

    most_operations: the most operations of a step that is compiled; None compiles any.

    The fast path is traced and checked in a second environment, which was made as the first one was and holds
    the same. The function changes neither the environment nor the caller's random states.

    Raises:
        NotFaithful: the scenario must use the plain path; the message names the reason.
    """
    key = canonical_json(to_dict(config)), environment.batch_size, environment.device, is_compiled
    kept = [] if _kept is None else _kept.setdefault(key, [])
    made = next((made for made in kept if isinstance(made, NotFaithful) or made.is_of(environment)), None)
    if made is None:
        try:
            made = _make(config, environment, is_compiled, most_operations)
        except NotFaithful as reason:
            made = reason
        kept.append(made)
    if isinstance(made, NotFaithful):
        raise made
    return FastSimulation(environment, made.step, made.resets)


@dataclass(frozen=True)
class _Made:
    """A checked step and its resets, with the environment in which they were checked and its first reading."""

    reading: PythonState
    rehearsal: EnvBase
    step: PureStep
    resets: Resets

    def is_of(self, environment: EnvBase) -> bool:
        """Return whether a new environment holds what the other one held."""
        try:
            require_equal(read_python_state(environment), self.reading)
            require_equal_tensors(environment, self.rehearsal, self.step.constants)
        except NotFaithful:
            return False
        return True


_kept: dict[Any, list[_Made | NotFaithful]] | None = None  # by task; a scenario that was refused stays refused


@contextmanager
def kept_simulations() -> Iterator[None]:
    """Keep what is made in the outermost such block; environments that hold the same are not traced again."""
    global _kept
    if _kept is not None:
        yield
        return
    _kept = {}
    try:
        yield
    finally:
        _kept = None


def _make(
    config: EnvironmentConfig, environment: EnvBase, is_compiled: bool, most_operations: int | None
) -> _Made:
    device = environment.device
    rehearsal = make_twin(config, environment)
    reading = read_python_state(rehearsal)
    require_equal(read_python_state(environment), reading)
    with private_random_streams(0, Stream.VALIDATION, device):
        first = first_frame(rehearsal)
        varying = find_varying(rehearsal)
        _require_same_after_first_frame(rehearsal, make_twin(config, environment), varying)
        reset_check = ResetCheck(rehearsal, varying)
        graph = step = trace_step(rehearsal, varying)
        check_first_frame(graph, first)
        resets = reset_check.resets(graph)
        if is_compiled:
            _require_short_compilation(graph, most_operations)
            slots = find_slots(rehearsal)
            step = graph.compiled(copies(slots, graph.names), rehearsal.rand_action()[ACTION])
        check_steps(rehearsal, resets, graph, *([step] if is_compiled else []))
    require_equal_tensors(environment, rehearsal, step.constants)
    return _Made(reading, rehearsal, step, resets)


def _require_short_compilation(step: PureStep, most_operations: int | None) -> None:
    operations = len(step.graph.graph.nodes)
    if most_operations is not None and operations > most_operations:
        raise NotFaithful(
            f"a step has {operations:,} operations, which take minutes to compile; "
            "--collection.simulation fast compiles them"
        )


def _require_same_after_first_frame(rehearsal: EnvBase, twin: EnvBase, varying: frozenset[str]) -> None:
    """Check that what an environment makes in its first frame does not depend on that frame.

    Raises:
        NotFaithful: it does, so the environment holds something else than the one that is traced.
    """
    first_frame(twin)
    twin.reset()
    require_equal(read_python_state(rehearsal), read_python_state(twin))
    require_equal_tensors(rehearsal, twin, frozenset(find_slots(twin).keys() - varying))


def most_operations(config: ExperimentConfig) -> int | None:
    """Return the most operations of a step that is compiled, or None if the configuration asks for any."""
    return None if config.collection.simulation == "fast" else _MOST_OPERATIONS_OF_AUTO
