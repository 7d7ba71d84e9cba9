"""The audit of a running fast simulation: now and then, plain VMAS repeats one of its frames.

No check before training sees what a scenario's Python does for the first time after an hour, for example because
a file has appeared. An audit puts the state of a running simulation into the plain environment, repeats the frame
and a reset there, and compares. It changes neither the environment nor random states.
"""

from torch import Tensor
from torchrl.envs import EnvBase

from mappo.environment.random_streams import random_states, same_random_states, set_random_states
from mappo.environment.state_walk import same_bits
from mappo.errors import NotFaithful, SimulationDiffers
from mappo.fast_simulation.equivalence import (
    PlainFrame,
    allowed_differences,
    check_reset,
    compare_frame,
    play_frame,
)
from mappo.fast_simulation.pure_step import PureStep, StepState
from mappo.fast_simulation.python_state import find_slots
from mappo.fast_simulation.resets import Resets
from mappo.fast_simulation.slots import Slots, copies, put_copies, require_unwritten, signatures, view_of
from mappo.fast_simulation.watch import Watch

INTERVAL_FRAMES = 500  # of which one is audited; `python -m benchmarks.audit` measures what it costs


class Audit:
    """The comparison of frames of a running simulation with its plain environment."""

    def __init__(self, environment: EnvBase, step: PureStep, resets: Resets, slots: Slots):
        self._environment, self._step, self._resets, self._slots = environment, step, resets, slots
        self._graph = step.as_graph()
        self._constants = {path: slots[path] for path in step.constants if path in slots}
        self._num_frames, self._num_audits, self._num_compared, self._num_wrong = 0, 0, 0, 0
        self._watch: Watch | None = None

    def is_due(self) -> bool:
        """Count a frame and return whether it is to be audited."""
        self._num_frames += 1
        return self._num_frames % INTERVAL_FRAMES == 1

    def check(self, state: StepState, action: Tensor) -> None:
        """Repeat a frame from this state with plain VMAS and reset one environment after it.

        Raises:
            SimulationDiffers: the fast simulation gives other results; the message says what differs.
        """
        slots = find_slots(self._environment)  # again, because the first frame may have made some
        originals = {path: slots[path].get() for path in slots.keys() - self._constants.keys()}
        before = signatures(self._constants)
        with same_random_states(self._environment.device):
            try:
                self._put(slots, state)
                self._check_frame(play_frame(self._environment, self._slots, self._step.names, action))
                self._check_reset(state)
                require_unwritten(before, self._constants)
                self._require_same_python()
            except NotFaithful as reason:
                raise SimulationDiffers(
                    f"the fast simulation no longer equals VMAS, as an audit of frame {self._num_frames} of this "
                    f"process shows: {reason}; the last checkpoint is from before; start a new run with "
                    "--collection.simulation plain, and report the scenario"
                ) from reason
            finally:
                for path, value in originals.items():
                    slots[path].put(value)
        self._num_audits += 1

    def _check_frame(self, frame: PlainFrame) -> None:
        num_wrong, description = compare_frame(self._graph, frame)
        if num_wrong:
            raise NotFaithful(description)
        if self._step.is_compiled:
            num_wrong, description = compare_frame(self._step, frame)
            self._num_compared += sum(value.numel() for value in frame.results.values())
            self._num_wrong += num_wrong
            if self._num_wrong > allowed_differences(self._num_compared):
                raise NotFaithful(description)

    def _check_reset(self, start: StepState) -> None:
        """Reset one environment after the frame and, with the same random numbers, before it."""
        names, device = self._step.names, self._environment.device
        row = self._num_audits % self._environment.batch_size[0]
        after_frame, states = copies(self._slots, names), random_states(device)
        self._environment.base_env._env.reset_at(row)
        fresh = copies(self._slots, names)
        check_reset(after_frame, fresh, self._resets, row)
        self._put(self._slots, start)
        set_random_states(states, device)
        self._environment.base_env._env.reset_at(row)
        others = copies(self._slots, names)
        for name in sorted(self._resets.names):
            if not same_bits(fresh[name][row], others[name][row]):
                raise NotFaithful(f"a reset depends on the state before it: {name}")

    def _put(self, slots: Slots, state: StepState) -> None:
        """Put copies of a state into the environment, under each of several names of one tensor.

        A step may read one name, which is then the only one in the state, and a reset another one.
        """
        views = {view_of(slots[path].get()): value for path, value in state.items()}
        others = {path: slots[path].get() for path in slots.keys() - self._constants.keys() - state.keys()}
        put_copies(slots, {path: views.get(view_of(value), value) for path, value in others.items()} | state)

    def _require_same_python(self) -> None:
        if self._watch is None:  # some attributes exist only after the first frame
            self._watch = Watch(self._environment)
        self._watch.require_unchanged()
