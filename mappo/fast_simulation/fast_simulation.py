"""The fast path: one compiled function steps VMAS, and the plain environment resets it.

The plain environment makes fresh states, one set at a time, and each finished environment takes the next
state of a set. A scenario that cannot be traced faithfully is refused with the reason. The traced step is
compared with the plain environment before it is used. docs/fast-simulation.md explains how.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.compute.computation import Simulation, Way
from mappo.compute.cuda_graphs import CudaGraphed, Function
from mappo.compute.traced_function import TracedFunction
from mappo.config import ExperimentConfig
from mappo.environment.frames import Frames, nested, require_finite_observations
from mappo.environment.keys import (
    ACTION,
    CARRIED,
    DONE,
    EPISODE_RETURN,
    FRAME,
    OBSERVATION,
    REWARD,
    STEP_COUNT,
    TERMINATED,
    TRUNCATED,
    Key,
    next_key,
)
from mappo.environment.plain_simulation import PlainSimulation
from mappo.errors import NotFaithful
from mappo.fast_simulation.fresh_states import FreshStatePool, FreshStates
from mappo.fast_simulation.making import make_fast_simulation, most_operations
from mappo.fast_simulation.pure_step import StepState
from mappo.fast_simulation.simulation import FastSimulation, rows_like

_log = logging.getLogger(__name__)


class FastEnvironment:
    """The fast path with the interface of `PlainSimulation`, from which collectors collect batches.

    Step counts, the time limit and sums of rewards equal those of the plain environment's transforms.
    """

    way = "fast"

    def __init__(
        self,
        simulation: FastSimulation,
        environment: EnvBase,
        max_episode_frames: int,
        policies: Iterable["CompiledPolicy"] = (),
        memories: Sequence[Key] = (),
    ):
        """Play in the simulation of this environment. Policies other than these are compiled when they play.

        memories: the keys of the memory that the policies carry from frame to frame.
        """
        self._simulation, self._environment, self._max_frames = simulation, environment, max_episode_frames
        self._policies = {compiled.policy: compiled for compiled in policies}
        self._memories = tuple(memories)
        self._carried_keys, self._frame_keys = (*CARRIED, *memories), (*FRAME, *memories)
        self._frame_functions: dict[TensorDictModuleBase, Function] = {}  # by policy

    def reset(self) -> TensorDictBase:
        """Reset all environments and return the result of a plain reset.

        Under the key `simulation`, the result also has the state and the remaining fresh states.
        """
        state, observation, pool = self._simulation.begin()
        outputs = self._environment.fake_tensordict().select(*CARRIED).zero_()
        return _carried(outputs.set(OBSERVATION, observation), state, pool)

    def require_same_constants(self) -> None:
        """Check the plain environment as `FastSimulation.require_same_constants` does."""
        self._simulation.require_same_constants()

    def collect(
        self, policy: TensorDictModuleBase, rollout_frames: int, carried: TensorDictBase
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """Collect one batch as `PlainSimulation.collect` does, without the policy's intermediate results.

        Raises:
            NonFiniteObservation: an observation is not finite; the message names the environment and the agent.
            SimulationDiffers: an audit shows that the fast simulation no longer equals the plain one.
        """
        play, simulation = self._frame_function(policy), carried["simulation"]
        frames = Frames(rollout_frames, self._frame_keys)
        outputs, state = {key: carried[key] for key in self._carried_keys}, dict(simulation["state"].items())
        pool = FreshStatePool.from_tensors(
            dict(simulation["fresh"].items()), simulation["fresh_observation"], simulation["is_taken"]
        )
        for _ in range(rollout_frames):
            pool = self._simulation.refilled(pool)
            is_audited = self._simulation.audit.is_due()
            before = {name: value.clone() for name, value in state.items()} if is_audited else {}
            results = iter(play(*self._flatten(outputs, state, pool.fresh)))
            outputs, state, fresh = self._unflatten(results)
            frame = _named(self._frame_keys, results)
            frames.append(frame)
            if self._simulation.is_reset_as_a_whole and frame[next_key(DONE)].all():
                state, outputs[OBSERVATION] = self._simulation.reset_all(state)
            if is_audited:
                self._simulation.audit.check(before, frame[ACTION])
            pool = pool.after_frame(fresh)
        batch = frames.batch()
        # The sum is not finite if any observation is not; it costs a tenth of checking every number.
        if not batch[OBSERVATION].sum().isfinite():
            for observations in batch[OBSERVATION].unbind(1):
                require_finite_observations(observations)
        return batch, _carried(nested(outputs, [len(batch)]), state, pool).clone()

    def _flatten(self, outputs: dict[Key, Tensor], state: StepState, fresh: FreshStates) -> list[Tensor]:
        """Return the tensors that one frame passes to the next, in a fixed order."""
        states = (state[name] for name in self._simulation.names)
        fresh_states = (fresh.state[name] for name in self._simulation.resets)
        carried = (outputs[key] for key in self._carried_keys)
        return [*carried, *states, *fresh_states, fresh.observation, fresh.num_taken]

    def _unflatten(self, flat: Iterator[Tensor]) -> tuple[dict[Key, Tensor], StepState, FreshStates]:
        """Return the arguments of `_flatten` from the next tensors."""
        outputs, state = _named(self._carried_keys, flat), _named(self._simulation.names, flat)
        return outputs, state, FreshStates(_named(self._simulation.resets, flat), next(flat), next(flat))

    def _frame_function(self, policy: TensorDictModuleBase) -> Function:
        """Return the function of one frame: flat tensors before -> flat tensors after, then those of the batch."""
        if policy not in self._frame_functions:
            play = self._make_frame_function(policy)
            is_fast = self._simulation.way == "fast"
            self._frame_functions[policy] = CudaGraphed(play, is_chained=True) if is_fast else play
        return self._frame_functions[policy]

    def _make_frame_function(self, policy: TensorDictModuleBase) -> Function:
        act = self._policies.get(policy) or CompiledPolicy(
            policy, self._environment, self._simulation.way, self._memories
        )

        def play(*flat: Tensor) -> list[Tensor]:
            outputs, state, fresh = self._unflatten(iter(flat))
            action, *memories = act(outputs[OBSERVATION], *(outputs[key] for key in self._memories))
            state, *step_results = self._simulation.step(state, action)
            next_outputs = {
                **self._outputs_of_step(outputs, *step_results),
                **dict(zip(self._memories, memories, strict=True)),
            }
            frame = {**outputs, ACTION: action, **{next_key(key): value for key, value in next_outputs.items()}}
            return [
                *self._flatten(*self._reset_finished(next_outputs, state, fresh)),
                *(frame[key] for key in self._frame_keys),
            ]

        return play

    def _reset_finished(
        self, outputs: dict[Key, Tensor], state: StepState, fresh: FreshStates
    ) -> tuple[dict[Key, Tensor], StepState, FreshStates]:
        """Reset finished environments and return the arguments of `_flatten` for the next frame."""
        done, previous = outputs[DONE], fresh
        state, observation, fresh = self._simulation.reset_finished(done, state, outputs[OBSERVATION], fresh)
        if fresh is previous:
            return outputs, state, fresh
        zeroed = {key: outputs[key].masked_fill(rows_like(done, outputs[key]), 0) for key in self._carried_keys}
        return {**zeroed, OBSERVATION: observation}, state, fresh

    def _outputs_of_step(
        self, outputs: dict[Key, Tensor], observation: Tensor, reward: Tensor, terminated: Tensor
    ) -> dict[Key, Tensor]:
        """Return the environment's outputs after a step, before finished environments are reset."""
        step_count = outputs[STEP_COUNT] + 1
        truncated = step_count >= self._max_frames
        return {
            OBSERVATION: observation,
            REWARD: reward,
            EPISODE_RETURN: outputs[EPISODE_RETURN] + reward,
            STEP_COUNT: step_count,
            TERMINATED: terminated,
            TRUNCATED: truncated,
            DONE: terminated | truncated,
        }


class CompiledPolicy:
    """A policy as a traced function: observations and memories -> sampled actions and the next memories."""

    def __init__(self, policy: TensorDictModuleBase, environment: EnvBase, way: Way, memories: Sequence[Key] = ()):
        """Wrap the policy. `memories` are the keys of the memory that it carries from frame to frame."""
        self.policy = policy

        def act(observation: Tensor, *before: Tensor) -> list[Tensor]:
            state = TensorDict({OBSERVATION: observation}, batch_size=[len(observation)])
            for key, memory in zip(memories, before, strict=True):
                state[key] = memory
            with set_exploration_type(ExplorationType.RANDOM):
                acted = policy(state)
            return [acted[ACTION], *(acted[next_key(key)] for key in memories)]

        self._act = TracedFunction(act, policy, environment.device, way)

    def __call__(self, observation: Tensor, *memories: Tensor) -> Sequence[Tensor]:
        """Return the actions of all agents, and the memories after the frame."""
        return self._act(observation, *memories)

    def prepare(self, environment: EnvBase, *memories: Tensor) -> None:
        """Start to compile for all environments of the batch."""
        self._act.prepare(environment.fake_tensordict()[OBSERVATION], *memories)

    def wait(self) -> None:
        """Wait until the policy is compiled; raise `CompilationFailed` if that fails."""
        self._act.wait()


def _carried(outputs: TensorDictBase, state: StepState, pool: FreshStatePool) -> TensorDictBase:
    fresh_state, fresh_observation, is_taken = pool.to_tensors()
    simulation = {
        "state": state,
        "fresh": fresh_state,
        "fresh_observation": fresh_observation,
        "is_taken": is_taken,
    }
    return outputs.set("simulation", TensorDict(simulation, outputs.batch_size))


def choose_simulation(
    config: ExperimentConfig,
    environment: EnvBase,
    simulation: Simulation,
    policy: TensorDictModuleBase,
    memories: Mapping[Key, Tensor],
) -> tuple[PlainSimulation | FastEnvironment, str]:
    """Return the simulation of this kind, in which the policy will act, and a line for the log.

    memories: the memory of the policy at the start of episodes, by key; empty for a policy without memory.

    If the scenario cannot be compiled, the plain simulation replaces the fast one. Only the configuration and
    the versions of libraries decide this, because a checkpoint of one simulation cannot be restored in the
    other.

    Raises:
        CompilationFailed: the simulation is fast, and the compiler is missing or failed.
    """
    if simulation == "plain":
        return PlainSimulation(environment), ""
    started = time.perf_counter()
    _log.info("the simulation of %s is traced and checked against VMAS", config.environment.scenario)
    compiled = CompiledPolicy(policy, environment, "fast", tuple(memories))
    compiled.prepare(environment, *memories.values())
    try:
        made = make_fast_simulation(config.environment, environment, most_operations=most_operations(config))
    except NotFaithful as reason:
        note = f"the simulation is plain: {config.environment.scenario} cannot be compiled: {reason}"
        return PlainSimulation(environment), note
    compiled.wait()
    seconds = time.perf_counter() - started
    max_frames = config.environment.max_episode_frames
    fast = FastEnvironment(made, environment, max_frames, [compiled], tuple(memories))
    return fast, f"the simulation is fast: compiled and checked in {seconds:.0f} s"


def _named(names: Iterable[Any], tensors: Iterator[Tensor]) -> dict[Any, Tensor]:
    """Return the next tensors by name."""
    return {name: next(tensors) for name in names}
