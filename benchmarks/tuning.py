"""Measure tuning: trials per hour, the overhead of a study, and the speed-up by a second worker.

    python -m benchmarks.tuning rate --minutes 10      a study and a plain loop, with equal time
    python -m benchmarks.tuning overhead --trials 8    trials in a study and the same trials in a plain loop
    python -m benchmarks.tuning workers --trials 8     one worker and two workers, on the same trials

`mappo` is a study with pruning, checkpoints and heartbeats. `torchrl` is a loop of Optuna's ask and tell around
TorchRL's canonical loop with the same hyperparameters (benchmarks/torchrl_loop.py), without pruning; `plain`
is such a loop around the trainer of mappo. All sample by TPE, start with the default values, and are evaluated
on the same tuning episodes. `rate` compares `mappo` and `torchrl`, each in as many processes as there are CPUs,
the loop also in one process, from an empty cache of compiled code; starts and compilation count. The ways
follow each other. The other measurements compile nothing, so that their trials take equally long.
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
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from benchmarks import torchrl_loop
from benchmarks.contenders import PLAIN
from mappo.cli.arguments import add_config_arguments, config_from_arguments, dashed
from mappo.compute.resources import cpu_limit
from mappo.config import EvaluationConfig, ExperimentConfig, override, to_json
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
_STUDY = "study"
_ENDLESS = 10_000  # more trials than there is time for


@dataclass
class Arm:
    """A way to tune.

    turn: runs the trial of this number.
    seconds: the duration of each trial so far.
    """

    name: str
    turn: Callable[[int], None]
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Run one measurement and print its results."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("measurement", choices=("rate", "overhead", "workers", "loop"))
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
        if arguments.measurement == "loop":  # one process of `rate`
            _loop(config)
        elif arguments.measurement == "rate":
            _rate(config, Path(directory), 60 * arguments.minutes)
        elif arguments.measurement == "overhead":
            _overhead(override(config, PLAIN), Path(directory), arguments.trials)
        else:
            _workers(override(config, PLAIN), Path(directory), arguments.trials)


def _rate(config: ExperimentConfig, directory: Path, seconds: float) -> None:
    cores, settings = cpu_limit(), directory / "config.json"
    settings.write_text(to_json(config))
    work = ["-m", "mappo", "study", "work", _STUDY]
    loop = ["-m", "benchmarks.tuning", "loop", "--config", str(settings)]
    print(f"{'way':<8} {'processes':>9} {'minutes':>7} {'trials':>6} {'pruned':>6} {'trials/h':>8} {'best':>6}")
    for name, command, number in (("mappo", work, cores), ("torchrl", loop, 1), ("torchrl", loop, cores)):
        store = directory / f"{name}-{number}"
        store.mkdir()
        url = f"sqlite:///{store}/studies.db"
        if name == "mappo":
            database = Database(url)
            Study.prepare(database, _STUDY, _plan(config, "median"), _ENDLESS, store=str(store))
            database.close()
        else:
            study = optuna.create_study(storage=url, study_name=_STUDY, direction="maximize")
            study.enqueue_trial(default_values(config))
        variables = {URL_VARIABLE: url, "TORCHINDUCTOR_CACHE_DIR": str(store / "cache")}
        minutes = _run_for(seconds, command, number, variables) / 60
        trials = [
            trial for trial in optuna.load_study(study_name=None, storage=url).trials if trial.state.is_finished()
        ]
        values = [
            trial.value for trial in trials if trial.state == TrialState.COMPLETE and trial.value is not None
        ]
        pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
        print(
            f"{name:<8} {number:>9} {minutes:>7.1f} {len(trials):>6} {pruned:>6} "
            f"{60 * len(trials) / minutes:>8.1f} {max(values, default=math.nan):>6.3f}",
            flush=True,
        )


def _run_for(seconds: float, command: list[str], number: int, variables: dict[str, str]) -> float:
    """Run a command in processes that end after some seconds; return the seconds."""
    start = time.monotonic()
    processes = [
        subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, env={**os.environ, **variables})
        for _ in range(number)
    ]
    time.sleep(seconds)
    for process in processes:
        process.terminate()
    elapsed = time.monotonic() - start
    for process in processes:
        process.wait()
    return elapsed


def _loop(config: ExperimentConfig) -> None:
    """Train trials with TorchRL's loop until this process is ended."""
    study = optuna.load_study(
        study_name=_STUDY, storage=os.environ[URL_VARIABLE], sampler=optuna.samplers.TPESampler(seed=os.getpid())
    )
    while True:
        trial = study.ask(distributions(config))
        policy = torchrl_loop.train(replace(applied(config, trial.params), seed=TUNING.training_seeds[0]))
        study.tell(trial, tuning_return(config, partial(_always, policy)))


def _overhead(config: ExperimentConfig, directory: Path, trials: int) -> None:
    """Run the same configuration in every trial, so that trials take equally long; the pruner prunes none."""
    arms = [
        _mappo(config, directory / "mappo"),
        _plain(config, directory / "plain"),
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


def _mappo(config: ExperimentConfig, directory: Path) -> Arm:
    """Return a way whose every trial is the first trial of a study, which has the default values."""
    database = Database(f"sqlite:///{directory}/studies.db")
    plan = _plan(config, "median")

    def listeners(_: Any, __: ExperimentConfig, run: Run) -> Any:
        history = HistoryFile(Path(f"{run.store.location}.csv"))
        return nullcontext(worker.RunListeners(history, lambda _: None, lambda _: None, lambda _: None))

    def turn(number: int) -> None:
        study = Study.prepare(database, f"study-{number}", plan, 1, store=str(directory))
        worker.work(study, "worker", worker.TrialListeners(listeners, lambda *_: None))

    return Arm("mappo", turn)


def _plain(config: ExperimentConfig, directory: Path) -> Arm:
    """Return the same way without a study: Optuna's ask and tell around the trainer."""
    directory.mkdir()
    study = optuna.create_study(storage=f"sqlite:///{directory}/plain.db", direction="maximize")

    def turn(number: int) -> None:
        study.enqueue_trial(default_values(config))
        trial = study.ask(distributions(config))
        trial_config = replace(applied(config, trial.params), seed=TUNING.training_seeds[0])
        run = Run.at(directory / f"trial-{number}")
        history = HistoryFile(directory / f"trial-{number}" / "history.csv")
        train(trial_config, run, history, lambda _: None)
        study.tell(trial, tuning_return(config, trained_policy(config, run.load(run.choose("best")))))

    return Arm("plain", turn)


def default_values(config: ExperimentConfig) -> dict[str, Any]:
    """Return the values of the configuration in the default search space."""
    return {path: value_of(config, path) for path in distributions(config)}


def _always(policy: Any, _: Any) -> Any:
    return policy


def tuning_return(config: ExperimentConfig, policy: PolicyOf) -> float:
    """Return the mean return of a policy on the tuning episodes."""
    episodes = EvaluationConfig(TUNING.evaluation_seeds, TUNING.episodes_per_seed)
    returns, _ = play_episodes(policy, config, episodes, Stream.TUNING)
    return math.fsum(returns) / len(returns)


def _plan(config: ExperimentConfig, pruner: Any) -> Plan:
    return Plan(config, default_space(config), replace(TUNING, pruner=pruner))


def distributions(config: ExperimentConfig) -> dict[str, BaseDistribution]:
    """Return the default search space."""
    space: dict[str, BaseDistribution] = {}
    for path, parameter in default_space(config).items():
        kind = (
            optuna.distributions.IntDistribution
            if parameter.type == "int"
            else optuna.distributions.FloatDistribution
        )
        assert parameter.type != "categorical"
        space[path] = kind(parameter.low, parameter.high, log=parameter.log)  # type: ignore[arg-type]
    return space


if __name__ == "__main__":
    main()
