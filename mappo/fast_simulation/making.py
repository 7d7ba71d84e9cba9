"""The making of a fast simulation: a scenario is traced, compiled and checked against VMAS, or refused.

What was made is kept for environments that hold the same: in this process, as for the trials of a study, and on
disk for later processes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchrl.envs import EnvBase

from mappo.config import EnvironmentConfig, ExperimentConfig
from mappo.environment.environment import make_twin
from mappo.environment.keys import ACTION
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NotFaithful
from mappo.fast_simulation.equivalence import check_first_frame, check_steps, first_frame
from mappo.fast_simulation.kept_steps import CheckedStep, find_step, keep_step, step_name
from mappo.fast_simulation.pure_step import PureStep, find_varying, trace_step
from mappo.fast_simulation.python_state import find_slots, read_python_state
from mappo.fast_simulation.resets import ResetCheck
from mappo.fast_simulation.simulation import FastSimulation
from mappo.fast_simulation.slots import copies
from mappo.fast_simulation.watch import constant_tensors, digest_of, require_equal, require_equal_tensors
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
    reading = read_python_state(environment)
    shapes = environment.batch_size, environment.device
    key = canonical_json(to_dict(config)), *shapes, is_compiled, most_operations, digest_of(reading)
    made = (_made or {}).get(key)
    if made is None or (isinstance(made, CheckedStep) and not made.fits(reading)):
        name = step_name(key, reading) if is_compiled else None
        made = find_step(name, reading) if name else None
        made = made or _make(config, environment, is_compiled, most_operations, name)
        if _made is not None:
            _made[key] = made
    if isinstance(made, NotFaithful):
        raise made
    return FastSimulation(environment, made.step, made.resets)


_made: dict[Any, CheckedStep | NotFaithful] | None = None  # a scenario that was refused stays refused


@contextmanager
def kept_simulations() -> Iterator[None]:
    """Keep what is made in the outermost such block; environments that hold the same are not traced again."""
    global _made
    if _made is not None:
        yield
        return
    _made = {}
    try:
        yield
    finally:
        _made = None


def _make(
    config: EnvironmentConfig,
    environment: EnvBase,
    is_compiled: bool,
    most_operations: int | None,
    name: str | None,
) -> CheckedStep | NotFaithful:
    """Return a new step, or the reason why there is none; keep the step for later processes if it has a name."""
    try:
        checked = _checked_step(config, environment, is_compiled, most_operations)
    except NotFaithful as reason:
        return reason
    if name:
        keep_step(name, checked)
    return checked


def _checked_step(
    config: EnvironmentConfig, environment: EnvBase, is_compiled: bool, most_operations: int | None
) -> CheckedStep:
    device = environment.device
    rehearsal = make_twin(config, environment)
    reading = read_python_state(environment)
    require_equal(reading, read_python_state(rehearsal))
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
    tensors = constant_tensors(read_python_state(rehearsal), step.constants)
    require_equal_tensors(constant_tensors(reading, step.constants), tensors)
    return CheckedStep(step, resets, tensors)


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
    reading, other = read_python_state(rehearsal), read_python_state(twin)
    require_equal(reading, other)
    constants = frozenset(other.slots.keys() - varying)
    require_equal_tensors(constant_tensors(reading, constants), constant_tensors(other, constants))


def most_operations(config: ExperimentConfig) -> int | None:
    """Return the most operations of a step that is compiled, or None if the configuration asks for any."""
    return None if config.collection.simulation == "fast" else _MOST_OPERATIONS_OF_AUTO
