"""Measure the speed of simulation steps: plain VMAS, VMAS through TorchRL as training uses it, and the fast path.

    python -m benchmarks.simulator                                       ten scenarios, 10 to 4096 environments
    python -m benchmarks.simulator navigation wheel --envs 60,4096       only these
    python -m benchmarks.simulator --threads 1                           on one CPU thread

The three ways take turns in blocks of frames, with the same random actions, so that other load on the machine
affects them equally. Times are medians over the blocks, in ms per frame of all environments. Plain VMAS and
the fast path do not reset finished environments here; TorchRL does, and the fast path does in the column
`resetting`. Before the measurement, the fast path is checked against plain VMAS; a refused scenario is listed
with the reason. `check s` is the time of tracing and checking without compilation; `compile s` is the
additional time of compilation. The compiler caches its results on disk: run the benchmark twice to measure a
warm cache, or set `TORCHINDUCTOR_CACHE_DIR` to an empty directory to measure a cold one.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchrl.envs import EnvBase

from mappo.compute.resources import cpu_limit
from mappo.config import EnvironmentConfig
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, DONE
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NotFaithful
from mappo.fast_simulation.making import make_fast_simulation
from mappo.fast_simulation.simulation import FastSimulation

_CPU = torch.device("cpu")
_SCENARIOS = (
    *("navigation", "balance", "transport", "wheel"),
    *("flocking", "reverse_transport", "dropout", "dispersion", "give_way", "swarm"),
)
_BLOCK_SECONDS = 0.1  # duration of a block of the slowest way


def main() -> None:
    """Print one line for each scenario and number of environments, then the medians."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="*", default=_SCENARIOS, metavar="SCENARIO", help="default: all ten")
    parser.add_argument(
        "--envs",
        default="10,60,600,4096",
        metavar="N,N,...",
        help="numbers of environments (default: 10,60,600,4096)",
    )
    parser.add_argument("--turns", type=int, default=15, metavar="N", help="blocks of each way (default: 15)")
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads of torch; 0: all cores (default: 0)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or cpu_limit())
    print(f"CPU threads: {torch.get_num_threads()}")
    print(
        f"{'scenario':<18} {'envs':>5} {'VMAS':>8} {'TorchRL':>8} {'fast':>8} {'resetting':>9} {'x VMAS':>7} "
        f"{'x TorchRL':>9} {'check s':>8} {'compile s':>9}",
        flush=True,
    )
    for num_envs in map(int, arguments.envs.split(",")):
        ratios = [ratio for name in arguments.scenarios if (ratio := _measure(name, num_envs, arguments.turns))]
        if ratios:
            print(f"{'median':<18} {num_envs:>5} {statistics.median(ratios):>44.1f}", flush=True)


def _measure(scenario: str, num_envs: int, turns: int) -> float | None:
    """Print a line, and return how many times faster than plain VMAS the fast path is; None if it is refused."""
    config = EnvironmentConfig(scenario=scenario)
    with private_random_streams(0, Stream.TRAINING, _CPU):
        environment = make_environment(config, num_envs, 0, Stream.TRAINING, _CPU)
        wrapped = make_environment(config, num_envs, 0, Stream.TRAINING, _CPU)
        start = time.perf_counter()
        try:
            make_fast_simulation(config, environment, is_compiled=False)
            check_end = time.perf_counter()
            simulation = make_fast_simulation(config, environment)
        except NotFaithful as reason:
            print(f"{scenario:<18} {num_envs:>5} refused: {reason}", flush=True)
            return None
        compile_end = time.perf_counter()
        actions = [environment.rand_action()[ACTION] for _ in range(20)]
        medians = _interleaved([*_ways(environment, wrapped, simulation, actions)], turns)
    vmas, torchrl, fast, resetting = (1000 * seconds for seconds in medians)
    check = check_end - start
    compile_ = compile_end - check_end - check  # the second call checks again
    print(
        f"{scenario:<18} {num_envs:>5} {vmas:>8.3f} {torchrl:>8.3f} {fast:>8.3f} {resetting:>9.3f} "
        f"{vmas / fast:>7.1f} {torchrl / resetting:>9.1f} {check:>8.1f} {compile_:>9.1f}",
        flush=True,
    )
    return vmas / fast


def _ways(
    environment: EnvBase, wrapped: EnvBase, simulation: FastSimulation, actions: list[Tensor]
) -> list[Callable[[], object]]:
    """Return functions of one frame: plain VMAS, TorchRL, and the fast path without and with resets."""
    state, observation, pool = simulation.begin()
    carried = wrapped.reset()
    state_without_resets, age = state, torch.zeros_like(carried[DONE], dtype=torch.int64)
    turn = iter(range(10**9))
    vmas = _plain(environment)

    def plain() -> None:
        vmas(actions[next(turn) % len(actions)])

    def torchrl() -> None:
        nonlocal carried
        carried = wrapped.step_and_maybe_reset(carried.set(ACTION, actions[next(turn) % len(actions)]))[1]

    def fast() -> None:
        nonlocal state_without_resets
        state_without_resets = simulation.step(state_without_resets, actions[next(turn) % len(actions)])[0]

    def resetting() -> None:
        nonlocal state, observation, pool, age
        pool = simulation.refilled(pool)
        state, observation, _, terminated = simulation.step(state, actions[next(turn) % len(actions)])
        age = age + 1
        done = terminated | (age >= 100)
        age = torch.where(done, 0, age)
        state, observation, fresh = simulation.reset_finished(done, state, observation, pool.fresh)
        pool = pool.after_frame(fresh)

    return [plain, torchrl, fast, resetting]


def _plain(environment: EnvBase) -> Callable[[Tensor], object]:
    """Return the step of VMAS without TorchRL, with the configuration that TorchRL gave it."""
    simulator = environment.base_env._env

    def step(action: Tensor) -> object:
        return simulator.step(list(action.unbind(1)))

    return step


def _interleaved(ways: list[Callable[[], object]], turns: int) -> list[float]:
    """Return the median seconds per call of each way, with blocks of calls in turn."""
    with torch.no_grad():
        for way in ways:
            way()
        frames = max(3, int(_BLOCK_SECONDS / max(_seconds(way, 2) for way in ways)))
        blocks = [[_seconds(way, frames) for way in ways] for _ in range(turns)]
    return [statistics.median(block[index] for block in blocks) for index in range(len(ways))]


def _seconds(way: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        way()
    return (time.perf_counter() - start) / calls


if __name__ == "__main__":
    main()
