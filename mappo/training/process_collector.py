"""The collector whose environments several processes share."""

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

from mappo.compute.computation import Simulation
from mappo.compute.standard_streams import dropped_output
from mappo.config import ExperimentConfig, override
from mappo.environment.environment import make_environment
from mappo.environment.random_streams import Stream, private_random_streams, random_states
from mappo.environment.simulation_state import SimulationState, capture_values, restore_values
from mappo.errors import MappoError, ProcessDied, SimulationStateError
from mappo.learning.networks import make_networks
from mappo.training.local_collector import CPU, LocalCollector, restore_random_states

_EXIT_SECONDS = 2.0  # wait for a process to end before it is killed


class ProcessCollector:
    """A collector whose processes each simulate a share of the environments with their own random numbers.

    The processes simulate on the CPU, also if the networks are on a GPU. A batch holds the environments in
    the order of the processes.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        device: torch.device,
        simulation: Simulation = "plain",
        after_frames: int = 0,
    ):
        """Set the configuration; `begin` starts the processes."""
        self._config, self._device, self._after_frames = config, device, after_frames
        self._simulation = simulation
        self.environment = make_environment(config.environment, 1, config.seed, Stream.TRAINING, device)
        self.note = ""
        self._processes: list[_Process] = []

    def begin(self, policy: TensorDictModuleBase) -> None:  # noqa: ARG002  each process makes its own
        self._processes = [_Process(index + 1) for index in range(self._config.collection.processes)]
        share = share_of_process(self._config)
        self.note = self._call_all("begin", share, self._simulation, self._after_frames)[0]

    def collect(self, policy: TensorDictModuleBase) -> TensorDictBase:
        weights = {name: tensor.detach().cpu() for name, tensor in policy.state_dict().items()}
        threads = max(1, torch.get_num_threads() // len(self._processes))
        return torch.cat(self._call_all("collect", weights, threads)).to(self._device)

    def capture(self) -> SimulationState:
        whole = capture_values(random_states=random_states(self._device))  # of this process, then of all
        states = self._call_all("capture")
        for index, state in enumerate(states):
            whole.tensors.update({f"{index}/{name}": tensor for name, tensor in state.tensors.items()})
        structure = {**whole.structure, "processes": [state.structure for state in states]}
        return SimulationState(structure, whole.tensors)

    def restore(self, state: SimulationState) -> None:
        structure = state.structure if isinstance(state.structure, dict) else {}
        structures = structure.get("processes")
        if not isinstance(structures, list) or len(structures) != len(self._processes):
            raise SimulationStateError(f"the captured state is not that of {len(self._processes)} processes")
        states = [
            SimulationState(structure, _share(state.tensors, f"{index}/"))
            for index, structure in enumerate(structures)
        ]
        self._call_each("restore", [(share,) for share in states])
        restore_random_states(restore_values(state), self._device)

    def close(self) -> None:
        for process in self._processes:
            process.disconnect()
        for process in self._processes:
            process.end()

    def _call_all(self, method: str, *arguments: Any) -> list[Any]:
        return self._call_each(method, [arguments] * len(self._processes))

    def _call_each(self, method: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        """Call a method in all processes at once, with the arguments of each process, and return the results.

        If calls fail, the first error is raised after all processes have answered.
        """
        for process, arguments_of_process in zip(self._processes, arguments, strict=True):
            process.send_call(method, arguments_of_process)
        results = [process.receive_result() for process in self._processes]
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results


def share_of_process(config: ExperimentConfig) -> ExperimentConfig:
    """Return the configuration of the environments that one process simulates; it never learns."""
    num_envs = config.collection.num_envs // config.collection.processes
    collection = {"num_envs": num_envs, "processes": 1}
    return override(config, {"collection": collection, "learner": {"minibatch_frames": 1, "chunk_frames": 1}})


class _Process:
    """The handle of another process, which serves calls with its own collector."""

    def __init__(self, number: int):
        context = multiprocessing.get_context("spawn")
        self._number = number
        self._connection, remote_end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(remote_end, number), name=f"mappo collection {number}", daemon=True
        )
        self._process.start()
        remote_end.close()

    def send_call(self, method: str, arguments: tuple[Any, ...]) -> None:
        """Start a method of `_Server` in the process, without waiting for its result."""
        try:
            self._connection.send_bytes(pickle.dumps((method, arguments)))
        except OSError as error:
            raise self._died() from error

    def receive_result(self) -> Any:
        """Wait for the method and return its result, or the exception that the method raised."""
        try:
            return pickle.loads(self._connection.recv_bytes())  # noqa: S301  from a process of this program
        except (EOFError, OSError) as error:
            raise self._died() from error

    def disconnect(self) -> None:
        """Close the connection, which makes the process end."""
        self._connection.close()

    def end(self) -> None:
        """Wait for the process to end, and kill it if it takes too long."""
        self._process.join(_EXIT_SECONDS)
        self._process.kill()
        self._process.join()

    def _died(self) -> ProcessDied:
        self._process.join(_EXIT_SECONDS)
        return ProcessDied(
            f"process {self._number} of collection.processes ended with exit code {self._process.exitcode} (-9: "
            "killed, often because memory ran out); give the same command with the same run to resume"
        )


def _serve(connection: Connection, number: int) -> None:
    """Serve calls of `_Server` until the other end closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C
    server = _Server(number)
    with dropped_output(), suppress(EOFError, BrokenPipeError):
        while True:
            method, arguments = pickle.loads(connection.recv_bytes())  # noqa: S301  from the parent process
            connection.send_bytes(pickle.dumps(_result(getattr(server, method), arguments)))


def _result(method: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call a method and return its result or exception; an unexpected exception becomes a RuntimeError."""
    try:
        return method(*arguments)
    except MappoError as error:
        return error
    except Exception:
        return RuntimeError(f"a process of collection.processes failed:\n{traceback.format_exc()}")


class _Server:
    """The collector and its policy in a process of `ProcessCollector`."""

    def __init__(self, number: int):
        self._number = number

    def begin(self, config: ExperimentConfig, simulation: Simulation, after_frames: int) -> str:
        """Make and begin the collector; return its note for the log."""
        self._streams = private_random_streams(config.seed, Stream.TRAINING, CPU, after_frames, self._number)
        self._streams.__enter__()  # never left: the streams last until the process ends
        self._collector = LocalCollector(config, CPU, simulation, after_frames, self._number)
        self._policy = make_networks(config.networks, self._collector.environment).player
        self._collector.begin(self._policy)
        return self._collector.note

    def collect(self, weights: dict[str, Tensor], threads: int) -> TensorDictBase:
        """Collect a batch of this process's share, by the policy with these parameters and buffers."""
        torch.set_num_threads(threads)
        self._policy.load_state_dict(weights)
        return self._collector.collect(self._policy)

    def capture(self) -> SimulationState:
        return self._collector.capture()

    def restore(self, state: SimulationState) -> None:
        self._collector.restore(state)


def _share(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
