"""Who collects batches: this process, or several that simulate a share of the environments each.

Both know all that goes on between batches, give it as plain data, and go on from that bit by bit.
"""

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.config import ExperimentConfig, override
from mappo.environment.environment import make_environment
from mappo.environment.frames import Frames, require_finite_observations
from mappo.environment.keys import OBSERVATION
from mappo.environment.random_streams import Stream, private_random_streams, random_states, set_random_states
from mappo.environment.simulation_state import SimulationState, capture, capture_values, restore, restore_values
from mappo.errors import ConfigError, NonFiniteObservation, ProcessDied, SimulationStateError
from mappo.fast_simulation.fast_simulation import FastEnvironment, choose_simulation
from mappo.learning.networks import make_networks

_CPU = torch.device("cpu")
_EXIT_SECONDS = 2.0


class Collector(Protocol):
    """Plays the environments of a training run.

    environment: of the task, whose specs networks are made for.
    said: which way the environments are simulated, and why, where that is worth a line in the log.
    """

    environment: EnvBase
    said: str

    def begin(self) -> None:
        """Reset all environments."""

    def collect(self, policy: TensorDictModuleBase) -> TensorDictBase:
        """The next batch [envs, rollout_frames], which continues the episodes of the one before.

        Raises:
            NonFiniteObservation: naming the environment and the agent.
            ProcessDied: a process ended that had a share of the environments.
        """

    def capture(self) -> SimulationState:
        """Copies of all that changes here, and of the random states of this process."""

    def restore(self, state: SimulationState) -> None:
        """Go on from where another one was, of the same configuration; call it after `begin`.

        Raises:
            SimulationStateError: the state is not that of such a collector. This one is then not to be used.
        """

    def close(self) -> None:
        """End what was started."""


def make_collector(config: ExperimentConfig, device: torch.device, after_frames: int = 0) -> Collector:
    """The collector that `collection.processes` asks for. Call it inside `private_random_streams`.

    Raises:
        ConfigError: the task cannot be made, or its fast simulation is asked for and there is no compiler.
    """
    if config.collection.processes > 1:
        return ProcessCollector(config, device, after_frames)
    return LocalCollector(config, device, after_frames)


class LocalCollector:
    """Simulates all environments in this process."""

    def __init__(self, config: ExperimentConfig, device: torch.device, after_frames: int = 0, process: int = 0):
        """`process` counts from 1 where several share a run: each draws other random numbers."""
        self._config = config
        self.environment = make_environment(
            config.environment,
            config.collection.num_envs,
            config.seed,
            Stream.TRAINING,
            device,
            after_frames,
            process,
        )
        self.said = ""
        self._simulation: EnvBase | FastEnvironment = self.environment

    def begin(self) -> None:
        self._simulation, self.said = choose_simulation(self._config, self.environment)
        self._carried = self._simulation.reset()

    def collect(self, policy: TensorDictModuleBase) -> TensorDictBase:
        frames = self._config.collection.rollout_frames
        batch, self._carried = collect(self._simulation, policy, frames, self._carried)
        return batch

    def capture(self) -> SimulationState:
        return capture(
            self.environment,
            simulated=self._way,
            carried=_by_name(self._carried),
            random_states=random_states(self.environment.device),
        )

    def restore(self, state: SimulationState) -> None:
        restore(state, self.environment)
        try:
            self.environment.rand_step(self._carried.clone())
        except Exception as error:  # a scenario is foreign code, here with numbers that it may never have made
            raise SimulationStateError(
                f"the restored simulation cannot play: {type(error).__name__}: {error}"
            ) from error
        others = restore(state, self.environment)  # again: that frame was only a trial
        if others.get("simulated") != self._way:
            raise SimulationStateError(
                f"the simulation was {others.get('simulated')!r} and is {self._way!r} here"
                + (f": {self.said}" if self.said else "")
            )
        try:
            _copy_over(self._carried, others["carried"])
        except (AttributeError, KeyError, TypeError) as error:
            raise SimulationStateError(f"{type(error).__name__}: {error}") from error
        _set_random_states(others, self.environment.device)

    def close(self) -> None:
        pass

    @property
    def _way(self) -> str:
        return "fast" if isinstance(self._simulation, FastEnvironment) else "plain"


class ProcessCollector:
    """Lets several processes simulate, each its share of the environments, with random numbers of its own.

    They simulate on the CPU, whatever device the networks are on. Batches have the environments of the first
    process first.
    """

    def __init__(self, config: ExperimentConfig, device: torch.device, after_frames: int = 0):
        """Processes start when it begins."""
        self._config, self._device, self._after_frames = config, device, after_frames
        self.environment = make_environment(config.environment, 1, config.seed, Stream.TRAINING, device)
        self.said = ""
        self._processes: list[_Process] = []

    def begin(self) -> None:
        self._processes = [_Process(index + 1) for index in range(self._config.collection.processes)]
        num_envs = self._config.collection.num_envs // len(self._processes)
        share = override(self._config, {"collection": {"num_envs": num_envs, "processes": 1}})
        self.said = self._ask_all("begin", share, self._after_frames)[0]

    def collect(self, policy: TensorDictModuleBase) -> TensorDictBase:
        weights = {name: tensor.detach().cpu() for name, tensor in policy.state_dict().items()}
        threads = max(1, torch.get_num_threads() // len(self._processes))
        return torch.cat(self._ask_all("collect", weights, threads)).to(self._device)

    def capture(self) -> SimulationState:
        own, states = capture_values(random_states=random_states(self._device)), self._ask_all("capture")
        for index, state in enumerate(states):
            own.tensors.update({f"{index}/{name}": tensor for name, tensor in state.tensors.items()})
        return SimulationState({**own.structure, "processes": [state.structure for state in states]}, own.tensors)

    def restore(self, state: SimulationState) -> None:
        structures = state.structure.get("processes", [])
        if not isinstance(structures, list) or len(structures) != len(self._processes):
            raise SimulationStateError(f"it is not the state of {len(self._processes)} processes")
        states = [
            SimulationState(each, _share(state.tensors, f"{index}/")) for index, each in enumerate(structures)
        ]
        self._ask_each("restore", [(each,) for each in states])
        _set_random_states(restore_values(state), self._device)

    def close(self) -> None:
        for process in self._processes:
            process.hang_up()
        for process in self._processes:
            process.end()

    def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        return self._ask_each(method, [arguments] * len(self._processes))

    def _ask_each(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """All work at once; the first error is raised when all are done."""
        for process, each in zip(self._processes, arguments, strict=True):
            process.ask(method, each)
        answers = [process.answer() for process in self._processes]
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers


class _Process:
    """Another process, which does what it is asked to with a collector of its own."""

    def __init__(self, number: int):
        spawning = multiprocessing.get_context("spawn")
        self._number = number
        self._connection, theirs = spawning.Pipe()
        self._process = spawning.Process(
            target=_serve, args=(theirs, number), name=f"mappo collection {number}", daemon=True
        )
        self._process.start()
        theirs.close()

    def ask(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Let it begin on a method of `_Served`."""
        try:
            self._connection.send_bytes(pickle.dumps((method, arguments)))
        except OSError as error:
            raise self._died() from error

    def answer(self) -> Any:
        """What the method returned or raised."""
        try:
            return pickle.loads(self._connection.recv_bytes())  # noqa: S301  from a process of ours
        except (EOFError, OSError) as error:
            raise self._died() from error

    def hang_up(self) -> None:
        """Ask no more, upon which it ends."""
        self._connection.close()

    def end(self) -> None:
        """Wait for its end, or kill it where it is too busy."""
        self._process.join(_EXIT_SECONDS)
        self._process.kill()
        self._process.join()

    def _died(self) -> ProcessDied:
        self._process.join(_EXIT_SECONDS)
        return ProcessDied(
            f"process {self._number} of collection.processes ended with {self._process.exitcode} (-9: killed, "
            "often because memory ran out); the same command with the same run goes on"
        )


def _serve(connection: Connection, number: int) -> None:
    """Do what is asked, until nobody is there to ask. Ctrl-C is for the process that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    served = _Served(number)
    with suppress(EOFError, BrokenPipeError):
        while True:
            method, arguments = pickle.loads(connection.recv_bytes())  # noqa: S301  from whom this serves
            connection.send_bytes(pickle.dumps(_answer(getattr(served, method), arguments)))


def _answer(method: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What a method returns or raises; errors that users know stay what they are."""
    try:
        return method(*arguments)
    except (ConfigError, NonFiniteObservation, SimulationStateError) as error:
        return error
    except Exception:
        return RuntimeError(f"a process of collection.processes failed:\n{traceback.format_exc()}")


class _Served:
    """A collector and its policy in a process of its own."""

    def __init__(self, number: int):
        self._number = number

    def begin(self, config: ExperimentConfig, after_frames: int) -> str:
        """Returns what is to be said of it."""
        self._streams = private_random_streams(config.seed, Stream.TRAINING, _CPU, after_frames, self._number)
        self._streams.__enter__()  # until the process ends
        self._collector = LocalCollector(config, _CPU, after_frames, self._number)
        self._policy = make_networks(config.networks, self._collector.environment).policy
        self._collector.begin()
        return self._collector.said

    def collect(self, weights: dict[str, Tensor], threads: int) -> TensorDictBase:
        """A batch of its share by the policy with these parameters and buffers."""
        torch.set_num_threads(threads)
        self._policy.load_state_dict(weights)
        return self._collector.collect(self._policy)

    def capture(self) -> SimulationState:
        """All that changes here."""
        return self._collector.capture()

    def restore(self, state: SimulationState) -> None:
        """Go on from there."""
        self._collector.restore(state)


def _share(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def _set_random_states(others: dict[str, Any], device: torch.device) -> None:
    try:
        set_random_states(others["random_states"], device)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SimulationStateError(f"{type(error).__name__}: {error}") from error


def _by_name(carried: TensorDictBase) -> dict[str, Tensor]:
    """What is carried between batches, by names such as `agents/observation`."""
    return {
        key if isinstance(key, str) else "/".join(key): value
        for key, value in sorted(carried.items(True, True), key=str)
    }


def _copy_over(carried: TensorDictBase, tensors: dict[str, Any]) -> None:
    """Copy what was carried from batch to batch over what a reset gives."""
    target = _by_name(carried)
    if tensors.keys() != target.keys():
        raise SimulationStateError(f"carried between batches are {sorted(tensors)}, not {sorted(target)}")
    for name, value in target.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (value.shape, value.dtype):
            raise SimulationStateError(
                f"{name}, carried between batches, is {list(found.shape)} {found.dtype}, not "
                f"{list(value.shape)} {value.dtype}"
            )
        if not name.startswith("simulation/") and not found.isfinite().all():
            raise SimulationStateError(f"{name}, carried between batches, is not finite")
        value.copy_(found)


def collect(
    environment: EnvBase | FastEnvironment,
    policy: TensorDictModuleBase,
    rollout_frames: int,
    carried: TensorDictBase,
) -> tuple[TensorDictBase, TensorDictBase]:
    """Play one batch [envs, rollout_frames] on from where `carried` [envs] stands, and return what the next needs.

    What is carried from batch to batch, and starts as `environment.reset()`, are the observations that wait to be
    acted on, step counts and sums of rewards: a batch continues the episodes of the one before. Frames are
    contiguous in time, so that advantages can be computed on a batch as it comes.

    Raises:
        NonFiniteObservation: naming the environment and the agent.
    """
    if isinstance(environment, FastEnvironment):
        return environment.collect(policy, rollout_frames, carried)
    frames = Frames(rollout_frames)
    names = list(carried.keys(True, True))
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        for _ in range(rollout_frames):
            require_finite_observations(carried[OBSERVATION])
            frame, carried = environment.step_and_maybe_reset(policy(carried))
            frames.append(frame)
    return frames.batch(), carried.select(*names)
