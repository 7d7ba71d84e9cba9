"""A collector that lets several processes simulate a share of the environments each."""

import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from mappo.config import ExperimentConfig, override
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream, private_random_streams, random_states
from mappo.environment.simulation_state import SimulationState, capture_values, restore_values
from mappo.errors import ConfigError, NonFiniteObservation, ProcessDied, SimulationStateError
from mappo.learning.networks import make_networks
from mappo.training.local_collector import CPU, LocalCollector, restore_random_states

_EXIT_SECONDS = 2.0


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
        restore_random_states(restore_values(state), self._device)

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
        self._streams = private_random_streams(config.seed, Stream.TRAINING, CPU, after_frames, self._number)
        self._streams.__enter__()  # until the process ends
        self._collector = LocalCollector(config, CPU, after_frames, self._number)
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
