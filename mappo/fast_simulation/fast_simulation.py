"""The fast path: VMAS stepped as one compiled function, and reset by the plain environment.

The plain environment makes fresh states, a whole set at once, and finished environments take the next ones of the
set. A scenario that cannot be captured faithfully is refused with the reason, and what was captured is compared
with the plain environment before it is used. docs/fast-simulation.md explains how.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.compute.cuda_graphs import CudaGraphed, Function
from mappo.compute.traced_function import TracedFunction, Way
from mappo.config import EnvironmentConfig, ExperimentConfig
from mappo.environment.environment import make_environment
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
from mappo.environment.random_streams import Stream, private_random_streams, random_states, set_random_states
from mappo.errors import NotFaithful
from mappo.fast_simulation.equivalence import check_steps, slots_of_resets
from mappo.fast_simulation.fresh_states import FreshStatePool, FreshStates
from mappo.fast_simulation.pure_step import Frame, PureStep, StepState, trace_step
from mappo.fast_simulation.slots import changed, copies, find_slots, signatures


class FastSimulation:
    """Plays with a pure step, and lets a plain environment make fresh states."""

    def __init__(self, environment: EnvBase, step: PureStep, resets: frozenset[str]):
        self._environment, self._step = environment, step
        self.resets = tuple(sorted(resets))  # names of the state's slots that resets write
        self._is_waited_for = environment.device.type == "cpu"  # then a look at a tensor costs nothing
        with _same_random_states(environment.device):
            environment.rand_step(environment.reset())
        self._slots = find_slots(environment)
        if missing := {*step.names, *step.constants} - self._slots.keys():
            raise NotFaithful(f"what was found in a trial is not there: {min(missing)}")

    def begin(self) -> tuple[StepState, Tensor, FreshStatePool]:
        """All environments reset as the plain one resets them, their observations, and no fresh states yet."""
        fresh, observation = self._reset()
        state = {**copies(self._slots, self._step.names), **fresh}
        return state, observation, FreshStatePool.none_like(fresh, observation)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the state."""
        return self._step.names

    @property
    def way(self) -> Way:
        """How frames are computed."""
        return "fast" if self._step.is_compiled else "plain"

    def step(self, state: StepState, action: Tensor) -> Frame:
        """One frame of all environments; no argument is changed."""
        return self._step(state, action)

    def supplied(self, supply: FreshStatePool) -> FreshStatePool:
        """With enough fresh states for a frame, in which all environments may finish. Call it before each.

        A GPU is waited for no longer than for the frame before the last one.
        """
        while supply.is_low():
            supply = supply.with_another_set(*self._reset())
        return supply

    def reset_finished(
        self, done: Tensor, state: StepState, observation: Tensor, fresh: FreshStates
    ) -> tuple[StepState, Tensor, FreshStates]:
        """Environments that are done [envs, 1] take the next fresh states in order.

        The others, and slots that resets do not write, stay as they are. Where none is, all may be what was given.
        """
        finished = done.squeeze(-1)
        if self._is_waited_for and not finished.any():
            return state, observation, fresh
        starts, seen, fresh = fresh.take(finished)
        after = {name: _where(finished, starts[name], state[name]) for name in self.resets}
        return {**state, **after}, _where(finished, seen, observation), fresh

    def _reset(self) -> tuple[StepState, Tensor]:
        """One fresh state for each environment, by one reset of all; draws from the simulator's random state."""
        constants = {path: self._slots[path] for path in self._step.constants}
        before = signatures(constants)
        observation = self._environment.reset()[OBSERVATION]
        assert not changed(before, constants), "resets write into what never varied before"
        return copies(self._slots, self.resets), observation


def make_fast_simulation(
    config: EnvironmentConfig, environment: EnvBase, is_compiled: bool = True
) -> FastSimulation:
    """The fast path of a plain environment that `config` made, checked against another one like it.

    Whether there is one depends on the configuration and the versions of libraries alone. Neither the environment
    nor any random numbers of the caller are touched.

    Raises:
        NotFaithful: the scenario must run plainly, and why.
    """
    device, (num_envs,) = environment.device, environment.batch_size
    with private_random_streams(0, Stream.VALIDATION, device):
        rehearsal = make_environment(config, num_envs, 0, Stream.VALIDATION, device)
        graph = step = trace_step(rehearsal)
        resets = slots_of_resets(rehearsal, graph)
        if is_compiled:
            slots = find_slots(rehearsal)
            step = graph.compiled(copies(slots, graph.names), rehearsal.rand_action()[ACTION])
        check_steps(rehearsal, graph, *([step] if is_compiled else []))
    return FastSimulation(environment, step, resets)


class FastEnvironment:
    """The fast path as batches are collected from it.

    Step counts, the time limit and sums of rewards are those of the transforms that the plain environment has.
    """

    way = "fast"

    def __init__(self, simulation: FastSimulation, environment: EnvBase, max_episode_frames: int):
        self._simulation, self._environment, self._max_frames = simulation, environment, max_episode_frames
        self._plays: dict[TensorDictModuleBase, Function] = {}  # by policy

    def reset(self) -> TensorDictBase:
        """What a plain reset gives, and under `simulation` the state and the fresh states that are left."""
        state, observation, supply = self._simulation.begin()
        started = self._environment.fake_tensordict().select(*CARRIED).zero_()
        return _carried(started.set(OBSERVATION, observation), state, supply)

    def collect(
        self, policy: TensorDictModuleBase, rollout_frames: int, carried: TensorDictBase
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """Play one batch as `PlainSimulation.collect` does; frames leave out the policy's intermediate results.

        Raises:
            NonFiniteObservation: naming the environment and the agent.
        """
        play, simulation, frames = self._play_by(policy), carried["simulation"], Frames(rollout_frames)
        shown, state = {key: carried[key] for key in CARRIED}, dict(simulation["state"].items())
        supply = FreshStatePool.of(
            dict(simulation["fresh"].items()), simulation["fresh_observation"], simulation["is_taken"]
        )
        for _ in range(rollout_frames):
            supply = self._simulation.supplied(supply)
            played = iter(play(*self._flat(shown, state, supply.fresh)))
            shown, state, fresh = self._apart(played)
            frames.append(_named(FRAME, played))
            supply = supply.after(fresh)
        batch = frames.batch()
        if not batch[OBSERVATION].sum().isfinite():  # which costs a tenth of a look at each
            for seen in batch[OBSERVATION].unbind(1):
                require_finite_observations(seen)
        return batch, _carried(nested(shown, [len(batch)]), state, supply).clone()

    def _flat(self, shown: dict[Key, Tensor], state: StepState, fresh: FreshStates) -> list[Tensor]:
        """What goes from frame to frame."""
        states = (state[name] for name in self._simulation.names)
        starts = (fresh.state[name] for name in self._simulation.resets)
        return [*(shown[key] for key in CARRIED), *states, *starts, fresh.observation, fresh.taken]

    def _apart(self, flat: Iterator[Tensor]) -> tuple[dict[Key, Tensor], StepState, FreshStates]:
        """What `_flat` put together, from the next tensors."""
        shown, state = _named(CARRIED, flat), _named(self._simulation.names, flat)
        return shown, state, FreshStates(_named(self._simulation.resets, flat), next(flat), next(flat))

    def _play_by(self, policy: TensorDictModuleBase) -> Function:
        """A frame: what is `_flat` before it -> what is so after it, and what is `FRAME`."""
        if policy not in self._plays:
            play = self._make_play(policy)
            self._plays[policy] = CudaGraphed(play, is_chained=True) if self._simulation.way == "fast" else play
        return self._plays[policy]

    def _make_play(self, policy: TensorDictModuleBase) -> Function:

        def act(observation: Tensor) -> list[Tensor]:
            with set_exploration_type(ExplorationType.RANDOM):
                return [policy(TensorDict({OBSERVATION: observation}, batch_size=[len(observation)]))[ACTION]]

        acting = TracedFunction(act, policy, self._environment.device, self._simulation.way)

        def play(*flat: Tensor) -> list[Tensor]:
            shown, state, fresh = self._apart(iter(flat))
            (action,) = acting(shown[OBSERVATION])
            state, *seen = self._simulation.step(state, action)
            following = self._following(shown, *seen)
            frame = {**shown, ACTION: action, **{next_key(key): value for key, value in following.items()}}
            return [*self._flat(*self._restarted(following, state, fresh)), *(frame[key] for key in FRAME)]

        return play

    def _restarted(
        self, following: dict[Key, Tensor], state: StepState, fresh: FreshStates
    ) -> tuple[dict[Key, Tensor], StepState, FreshStates]:
        """What the next frame begins with."""
        done, before = following[DONE], fresh
        state, observation, fresh = self._simulation.reset_finished(done, state, following[OBSERVATION], fresh)
        if fresh is before:
            return following, state, fresh
        shown = {key: following[key].masked_fill(_rows(done, following[key]), 0) for key in CARRIED}
        return {**shown, OBSERVATION: observation}, state, fresh

    def _following(
        self, shown: dict[Key, Tensor], observation: Tensor, reward: Tensor, terminated: Tensor
    ) -> dict[Key, Tensor]:
        """What is shown after a frame, before finished episodes are reset."""
        step_count = shown[STEP_COUNT] + 1
        truncated = step_count >= self._max_frames
        return {
            OBSERVATION: observation,
            REWARD: reward,
            EPISODE_RETURN: shown[EPISODE_RETURN] + reward,
            STEP_COUNT: step_count,
            TERMINATED: terminated,
            TRUNCATED: truncated,
            DONE: terminated | truncated,
        }


def _carried(shown: TensorDictBase, state: StepState, supply: FreshStatePool) -> TensorDictBase:
    fresh_state, fresh_observation, is_taken = supply.kept()
    simulation = {
        "state": state,
        "fresh": fresh_state,
        "fresh_observation": fresh_observation,
        "is_taken": is_taken,
    }
    return shown.set("simulation", TensorDict(simulation, shown.batch_size))


def choose_simulation(
    config: ExperimentConfig, environment: EnvBase
) -> tuple[PlainSimulation | FastEnvironment, str]:
    """What `collection.simulation` asks for, or the plain environment where that cannot be; a line for the log.

    The choice depends on the configuration and the versions of libraries alone. A checkpoint of the one does not
    restore the other.

    Raises:
        ConfigError: the fast one is asked for, and there is no compiler.
    """
    if config.collection.simulation == "plain":
        return PlainSimulation(environment), ""
    started = time.perf_counter()
    try:
        simulation = make_fast_simulation(config.environment, environment)
    except NotFaithful as reason:
        said = f"the simulation is plain: {config.environment.scenario} cannot be compiled: {reason}"
        return PlainSimulation(environment), said
    seconds = time.perf_counter() - started
    fast = FastEnvironment(simulation, environment, config.environment.max_episode_frames)
    return fast, f"the simulation is fast: compiled and checked in {seconds:.0f} s"


@contextmanager
def _same_random_states(device: torch.device) -> Iterator[None]:
    before = random_states(device)
    try:
        yield
    finally:
        set_random_states(before, device)


def _named(names: Iterable[Any], tensors: Iterator[Tensor]) -> dict[Any, Tensor]:
    """The next tensors, by name."""
    return {name: next(tensors) for name in names}


def _where(rows: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    return torch.where(_rows(rows, others), chosen, others)


def _rows(rows: Tensor, like: Tensor) -> Tensor:
    """A flag for each environment, to be used beside a tensor [envs, ...]."""
    return rows.reshape(-1, *[1] * (like.ndim - 1))
