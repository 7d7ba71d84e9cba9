"""The fast path: VMAS stepped as one compiled function, and reset by the plain environment.

The plain environment makes fresh states, a whole set at once, and finished environments take the next ones of the
set. A scenario that cannot be captured faithfully is refused with the reason, and what was captured is compared
with the plain environment before it is used. docs/fast-simulation.md explains how.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.agreement import check_steps, slots_of_resets
from mappo.config import EnvironmentConfig, ExperimentConfig
from mappo.environment import (
    ACTION,
    CARRIED,
    DONE,
    EPISODE_RETURN,
    FOLLOWING,
    OBSERVATION,
    REWARD,
    STEP_COUNT,
    TERMINATED,
    TRUNCATED,
    Frames,
    Key,
    Stream,
    make_environment,
    nested,
    next_key,
    private_random_streams,
    random_states,
    require_finite_observations,
    set_random_states,
)
from mappo.fresh_states import FreshStates
from mappo.launching import Function, Launched
from mappo.pure_step import Frame, NotFaithful, PureStep, State, capture_step
from mappo.recording import Recorded, Way
from mappo.slots import changed, copies, find_slots, signatures


class FastSimulation:
    """Plays with a pure step, and lets a plain environment make fresh states."""

    def __init__(self, environment: EnvBase, step: PureStep, resets: frozenset[str]):
        self._environment, self._step, self._resets = environment, step, resets
        self._is_waited_for = environment.device.type == "cpu"  # then a look at a tensor costs nothing
        with _same_random_states(environment.device):
            environment.rand_step(environment.reset())
        self._slots = find_slots(environment)
        if missing := {*step.names, *step.constants} - self._slots.keys():
            raise NotFaithful(f"what was found in a trial is not there: {min(missing)}")

    def begin(self) -> tuple[State, Tensor, FreshStates]:
        """All environments reset as the plain one resets them, their observations, and no fresh states yet."""
        fresh, observation = self._reset()
        state = {**copies(self._slots, self._step.names), **fresh}
        return state, observation, FreshStates.none_like(fresh, observation)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the state."""
        return self._step.names

    @property
    def way(self) -> Way:
        """How frames are computed."""
        return "fast" if self._step.is_compiled else "plain"

    def step(self, state: State, action: Tensor) -> Frame:
        """One frame of all environments; no argument is changed."""
        return self._step(state, action)

    def reset_finished(
        self, done: Tensor, state: State, observation: Tensor, fresh: FreshStates
    ) -> tuple[State, Tensor, FreshStates]:
        """Environments that are done [envs, 1] take the next fresh states in order.

        The others, and slots that resets do not write, stay as they are. Where none is, all may be what was given.
        A GPU is waited for no longer than for its frame before this one, from which it is known what is left.
        """
        finished = done.squeeze(-1)
        if self._is_waited_for and not finished.any():
            return state, observation, fresh
        if fresh.num_left() < len(finished):
            fresh = fresh.with_another_set(*self._reset())
        starts, seen, fresh = fresh.take(finished)
        after = {name: _where(finished, starts[name], state[name]) for name in self._resets}
        return {**state, **after}, _where(finished, seen, observation), fresh

    def _reset(self) -> tuple[State, Tensor]:
        """One fresh state for each environment, by one reset of all; draws from the simulator's random state."""
        constants = {path: self._slots[path] for path in self._step.constants}
        before = signatures(constants)
        observation = self._environment.reset()[OBSERVATION]
        assert not changed(before, constants), "resets write into what never varied before"
        return copies(self._slots, self._resets), observation


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
        graph = step = capture_step(rehearsal)
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

    def __init__(self, simulation: FastSimulation, environment: EnvBase, max_episode_frames: int):
        self._simulation, self._environment, self._max_frames = simulation, environment, max_episode_frames
        self._plays: dict[TensorDictModuleBase, Function] = {}  # by policy

    def reset(self) -> TensorDictBase:
        """What a plain reset gives, and under `simulation` the state and the fresh states that are left."""
        state, observation, fresh = self._simulation.begin()
        started = self._environment.fake_tensordict().select(*CARRIED).zero_()
        return _carried(started.set(OBSERVATION, observation), state, fresh)

    def collect(
        self, policy: TensorDictModuleBase, rollout_frames: int, carried: TensorDictBase
    ) -> tuple[TensorDictBase, TensorDictBase]:
        """As `mappo.collection.collect`; frames have what is learned from, not the policy's intermediate results.

        Raises:
            NonFiniteObservation: naming the environment and the agent.
        """
        play, simulation, frames = self._play_by(policy), carried["simulation"], Frames(rollout_frames)
        state, shown = dict(simulation["state"].items()), {key: carried[key] for key in CARRIED}
        fresh = FreshStates.of(
            dict(simulation["fresh"].items()), simulation["fresh_observation"], simulation["is_taken"]
        )
        for _ in range(rollout_frames):
            action, *after = play(*shown.values(), *(state[name] for name in self._simulation.names))
            following = dict(zip(FOLLOWING, after[: len(FOLLOWING)], strict=True))
            state = dict(zip(self._simulation.names, after[len(FOLLOWING) :], strict=True))
            frames.append({**shown, ACTION: action, **{next_key(key): value for key, value in following.items()}})
            shown = {key: following[key] for key in CARRIED}
            done, before = following[DONE], fresh
            state, observation, fresh = self._simulation.reset_finished(done, state, shown[OBSERVATION], fresh)
            if fresh is not before:
                shown = {key: value.masked_fill(_rows(done, value), 0) for key, value in shown.items()}
                shown[OBSERVATION] = observation
        batch = frames.batch()
        if not batch[OBSERVATION].isfinite().all():
            for seen in batch[OBSERVATION].unbind(1):
                require_finite_observations(seen)
        return batch, _carried(nested(shown, [len(observation)]), state, fresh)

    def _play_by(self, policy: TensorDictModuleBase) -> Function:
        """A frame: (what is `CARRIED`, the state) -> (the policy's action, what is `FOLLOWING`, the state)."""
        if policy not in self._plays:
            play = self._make_play(policy)
            self._plays[policy] = Launched(play) if self._simulation.way == "fast" else play
        return self._plays[policy]

    def _make_play(self, policy: TensorDictModuleBase) -> Function:

        def act(observation: Tensor) -> list[Tensor]:
            with set_exploration_type(ExplorationType.RANDOM):
                return [policy(TensorDict({OBSERVATION: observation}, batch_size=[len(observation)]))[ACTION]]

        acting = Recorded(act, policy, self._environment.device, self._simulation.way)
        names = self._simulation.names

        def play(*tensors: Tensor) -> list[Tensor]:
            shown = dict(zip(CARRIED, tensors[: len(CARRIED)], strict=True))
            (action,) = acting(shown[OBSERVATION])
            before = dict(zip(names, tensors[len(CARRIED) :], strict=True))
            state, *seen = self._simulation.step(before, action)
            following = self._following(shown, *seen)
            return [action, *(following[key] for key in FOLLOWING), *(state[name] for name in names)]

        return play

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


def _carried(shown: TensorDictBase, state: State, fresh: FreshStates) -> TensorDictBase:
    fresh_state, fresh_observation, is_taken = fresh.sets()
    simulation = {
        "state": state,
        "fresh": fresh_state,
        "fresh_observation": fresh_observation,
        "is_taken": is_taken,
    }
    return shown.set("simulation", TensorDict(simulation, shown.batch_size))


def choose_simulation(config: ExperimentConfig, environment: EnvBase) -> tuple[EnvBase | FastEnvironment, str]:
    """What `collection.simulation` asks for, or the plain environment where that cannot be; a line for the log.

    The choice depends on the configuration and the versions of libraries alone. A checkpoint of the one does not
    restore the other.

    Raises:
        ConfigError: the fast one is asked for, and there is no compiler.
    """
    if config.collection.simulation == "plain":
        return environment, ""
    started = time.perf_counter()
    try:
        simulation = make_fast_simulation(config.environment, environment)
    except NotFaithful as reason:
        return environment, f"the simulation is plain: {config.environment.scenario} cannot be compiled: {reason}"
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


def _where(rows: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    return torch.where(_rows(rows, others), chosen, others)


def _rows(rows: Tensor, like: Tensor) -> Tensor:
    """A flag for each environment, to be used beside a tensor [envs, ...]."""
    return rows.reshape(-1, *[1] * (like.ndim - 1))
