"""Measure tuning: trials per hour, the overhead of a study, and the speed-up by a second worker.

    python -m benchmarks.tuning rate --minutes 10      a study and two plain loops, with equal time
    python -m benchmarks.tuning overhead --trials 8    trials in a study and the same trials in a plain loop
    python -m benchmarks.tuning workers --trials 8     one worker and two workers, on the same trials

`mappo` is a study with pruning, checkpoints and heartbeats. `plain` is a loop of Optuna's ask and tell around
the same trainer, without pruning. `torchrl` is such a loop around TorchRL's canonical loop with the same
hyperparameters (benchmarks/torchrl_loop.py). All three sample by TPE, start with the default values, and are
evaluated on the same tuning episodes; `held out` is the return of the best policy on evaluation seeds. The
three take turns, trial by trial, so that other load on the machine affects them equally, until each has used
its time.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution

from benchmarks import torchrl_loop
from mappo.cli.arguments import add_config_arguments, config_from_arguments, dashed
from mappo.config import EvaluationConfig, ExperimentConfig
from mappo.environment.random_streams import Stream
from mappo.evaluation.episodes import PolicyOf, play_episodes, trained_policy
from mappo.runs.run import Run
from mappo.training.history import HistoryFile
from mappo.training.training import train
from mappo.tuning import worker
from mappo.tuning.database import Database
from mappo.tuning.database_url import URL_VARIABLE
from mappo.tuning.plan import Plan
from mappo.tuning.search_space import applied, default_space, value_of
from mappo.tuning.study import Study
from mappo.tuning.study_config import TuningConfig

TUNING = TuningConfig()


@dataclass
class Arm:
    """A way to tune.

    turn: runs the trial of this number.
    best: returns the best value and its policy.
    seconds: the duration of each trial so far.
    """

    name: str
    turn: Callable[[int], None]
    best: Callable[[], tuple[float, PolicyOf | None]]
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Run one measurement and print its results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("measurement", choices=("rate", "overhead", "workers"))
    add_config_arguments(parser)
    parser.usage = "%(prog)s MEASUREMENT [RECIPE] [--minutes X] [--trials N] [--SECTION.FIELD VALUE ...]"
    parser.add_argument(
        "--minutes",
        type=float,
        default=10.0,
        metavar="X",
        help="rate: time of each way, in minutes (default: 10)",
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=8,
        metavar="N",
        help="overhead, workers: trials of each way (default: 8)",
    )
    arguments = parser.parse_args(dashed(sys.argv[1:]))
    config = config_from_arguments(arguments)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with TemporaryDirectory() as directory:
        if arguments.measurement == "rate":
            _rate(config, Path(directory), 60 * arguments.minutes)
        elif arguments.measurement == "overhead":
            _overhead(config, Path(directory), arguments.trials)
        else:
            _workers(config, Path(directory), arguments.trials)


def _rate(config: ExperimentConfig, directory: Path, seconds: float) -> None:
    arms = [
        _mappo(config, directory / "mappo", "median"),
        _plain("plain", config, directory / "plain", _trainer),
        _plain("torchrl", config, directory / "torchrl", lambda config, _: _policy_of(torchrl_loop.train(config))),
    ]
    while unfinished := [arm for arm in arms if sum(arm.seconds) < seconds]:
        _take_turn(min(unfinished, key=lambda arm: sum(arm.seconds)))
    print(f"{'way':<8}  {'trials':>6}  {'minutes':>7}  {'trials/h':>8}  {'best value':>10}  {'held out':>8}")
    for arm in arms:
        value, policy = arm.best()
        held_out = _return(config, config.evaluation, Stream.EVALUATION, policy) if policy else math.nan
        hours = sum(arm.seconds) / 3600
        print(
            f"{arm.name:<8}  {len(arm.seconds):>6}  {60 * hours:>7.1f}  {len(arm.seconds) / hours:>8.1f}  "
            f"{value:>10.3f}  {held_out:>8.3f}"
        )


def _overhead(config: ExperimentConfig, directory: Path, trials: int) -> None:
    """Run the same configuration in every trial, so that trials take equally long; the pruner prunes none."""
    arms = [
        _mappo(config, directory / "mappo", "median", is_fixed=True),
        _plain("plain", config, directory / "plain", _trainer, is_fixed=True),
    ]
    for _ in range(trials):
        for arm in arms:
            _take_turn(arm)
    ratios = sorted(one / other for one, other in zip(*(arm.seconds for arm in arms), strict=True))
    for arm in arms:
        print(f"{arm.name:<6} {sorted(arm.seconds)[len(arm.seconds) // 2]:.2f} s a trial, median of {trials}")
    middle = ratios[len(ratios) // 2]
    print(f"ratio {middle:.3f} ({ratios[0]:.3f} .. {ratios[-1]:.3f})")


def _workers(config: ExperimentConfig, directory: Path, trials: int) -> None:
    """Run the same trials with one worker and with two workers.

    Both studies have the same values, because the values of the first trials depend on their numbers only.
    """
    seconds_by_workers = {}
    for number in (1, 2):
        store = directory / f"{number}"
        url = f"sqlite:///{store}/studies.db"
        database = Database(url)
        Study.prepare(database, "study", _plan(config, "none"), trials, store=str(store))
        database.close()
        command = [sys.executable, "-m", "mappo", "study", "work", "study"]
        environment = {**os.environ, URL_VARIABLE: url}
        start = time.monotonic()
        processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) for _ in range(number)]
        assert all(process.wait() == 0 for process in processes)
        seconds = seconds_by_workers[number] = time.monotonic() - start
        print(f"{number} worker{'s' * (number > 1)}: {trials} trials in {seconds:.0f} s, start included")
    print(f"speed-up of the second: {seconds_by_workers[1] / seconds_by_workers[2]:.2f}")


def _take_turn(arm: Arm) -> None:
    start = time.monotonic()
    arm.turn(len(arm.seconds))
    arm.seconds.append(time.monotonic() - start)
    print(f"{arm.name}: trial {len(arm.seconds) - 1}, {arm.seconds[-1]:.1f} s", file=sys.stderr, flush=True)


def _mappo(config: ExperimentConfig, directory: Path, pruner: str, is_fixed: bool = False) -> Arm:
    database = Database(f"sqlite:///{directory}/studies.db")
    plan = _plan(config, pruner)

    def listeners(_: Any, __: ExperimentConfig, run: Run) -> Any:
        history = HistoryFile(Path(f"{run.store.location}.csv"))
        return nullcontext(worker.RunListeners(history, lambda _: None, lambda _: None, lambda _: None))

    def turn(number: int) -> None:
        name = f"study-{number}" if is_fixed else "study"
        study = Study.prepare(database, name, plan, 1 if is_fixed else number + 1, store=str(directory))
        worker.work(study, "worker", worker.TrialListeners(listeners, lambda *_: None))

    def best() -> tuple[float, PolicyOf | None]:
        study = Study.load(database, "study")
        trial = study.best()
        if trial is None or trial.value is None:
            return math.nan, None
        run = Run.at(f"{study.store}/{worker.trial_run(trial.number, trial.values, TUNING.training_seeds[0])}")
        return trial.value, trained_policy(config, run.load(run.choose("best")))

    return Arm("mappo", turn, best)


def _plain(
    name: str,
    config: ExperimentConfig,
    directory: Path,
    trainer: Callable[[ExperimentConfig, Path], PolicyOf],
    is_fixed: bool = False,
) -> Arm:
    directory.mkdir()
    study = optuna.create_study(
        storage=f"sqlite:///{directory}/plain.db",
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.NopPruner(),
    )
    space = _distributions(config)
    default = {path: value_of(config, path) for path in space}
    best: list[tuple[float, PolicyOf]] = []

    def turn(number: int) -> None:
        if is_fixed or number == 0:
            study.enqueue_trial(default)
        trial = study.ask(space)
        trial_config = replace(applied(config, trial.params), seed=TUNING.training_seeds[0])
        policy = trainer(trial_config, directory / f"trial-{trial.number}")
        episodes = EvaluationConfig(TUNING.evaluation_seeds, TUNING.episodes_per_seed)
        value = _return(config, episodes, Stream.TUNING, policy)
        study.tell(trial, value)
        if not best or value > best[0][0]:
            best[:] = [(value, policy)]

    return Arm(name, turn, lambda: best[0])


def _trainer(config: ExperimentConfig, directory: Path) -> PolicyOf:
    """Train with mappo and return the policy of the best checkpoint."""
    run = Run.at(directory)
    train(config, run, HistoryFile(directory / "history.csv"), lambda _: None)
    return trained_policy(config, run.load(run.choose("best")))


def _policy_of(policy: Any) -> PolicyOf:
    return lambda _: policy


def _return(config: ExperimentConfig, episodes: EvaluationConfig, stream: Stream, policy: PolicyOf) -> float:
    returns, _ = play_episodes(policy, config, episodes, stream)
    return math.fsum(returns) / len(returns)


def _plan(config: ExperimentConfig, pruner: Any) -> Plan:
    return Plan(config, default_space(config), replace(TUNING, pruner=pruner))


def _distributions(config: ExperimentConfig) -> dict[str, BaseDistribution]:
    distributions: dict[str, BaseDistribution] = {}
    for path, parameter in default_space(config).items():
        kind = (
            optuna.distributions.IntDistribution
            if parameter.type == "int"
            else optuna.distributions.FloatDistribution
        )
        assert parameter.type != "categorical"
        distributions[path] = kind(parameter.low, parameter.high, log=parameter.log)  # type: ignore[arg-type]
    return distributions


if __name__ == "__main__":
    main()
