"""What a study does in an hour, what it costs, and what a second worker brings.

    python -m benchmarks.tuning rate --minutes 10      at equal time, beside two plain loops
    python -m benchmarks.tuning overhead --trials 8    a trial in a study beside the same trial in a plain loop
    python -m benchmarks.tuning workers --trials 8     one worker and two, on the same trials

`mappo` is a study with pruning, checkpoints and heartbeats; `plain` a loop of Optuna's ask and tell around the
same trainer, without pruning; `torchrl` the same around TorchRL's canonical loop at the same hyperparameters
(benchmarks/torchrl_loop.py). All sample by TPE, begin with the default, and are judged by the same tuning
episodes; `held out` is the best policy on evaluation seeds. They take turns, trial by trial, so that they share
whatever else the machine does, each until its own time is used.
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
from mappo.tuning.search_space import TuningConfig, applied, default_space, value_of
from mappo.tuning.study import Study

TUNING = TuningConfig()


@dataclass
class Arm:
    """One way to tune: `turn` does one trial; how many seconds it has used, and what its policies were worth."""

    name: str
    turn: Callable[[int], None]
    best: Callable[[], tuple[float, PolicyOf | None]]
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Measure what is asked for, and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=("rate", "overhead", "workers"))
    add_config_arguments(parser)
    parser.usage = "%(prog)s WHAT [RECIPE] [--minutes X] [--trials N] [--SECTION.FIELD VALUE ...]"
    parser.add_argument("--minutes", type=float, default=10.0, metavar="X", help="of each way (default: 10)")
    parser.add_argument("--trials", type=int, default=8, metavar="N", help="of each way (default: 8)")
    arguments = parser.parse_args(dashed(sys.argv[1:]))
    config = config_from_arguments(arguments)
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with TemporaryDirectory() as directory:
        if arguments.what == "rate":
            _rate(config, Path(directory), 60 * arguments.minutes)
        elif arguments.what == "overhead":
            _overhead(config, Path(directory), arguments.trials)
        else:
            _workers(config, Path(directory), arguments.trials)


def _rate(config: ExperimentConfig, directory: Path, seconds: float) -> None:
    arms = [
        _mappo(config, directory / "mappo", "median"),
        _plain("plain", config, directory / "plain", _trainer),
        _plain("torchrl", config, directory / "torchrl", lambda config, _: _acting(torchrl_loop.train(config))),
    ]
    while waiting := [arm for arm in arms if sum(arm.seconds) < seconds]:
        _take_turn(min(waiting, key=lambda arm: sum(arm.seconds)))
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
    """The same configuration in every trial, so that they take as long; pruners are asked, and none prunes."""
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
    """The first trials are sampled at random, by their numbers, so both studies try the same."""
    took = {}
    for number in (1, 2):
        place = directory / f"{number}"
        url = f"sqlite:///{place}/studies.db"
        database = Database(url)
        Study.prepare(database, "study", _plan(config, "none"), trials, store=str(place))
        database.close()
        command = [sys.executable, "-m", "mappo", "study", "work", "study"]
        environment = {**os.environ, URL_VARIABLE: url}
        began = time.monotonic()
        processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) for _ in range(number)]
        assert all(process.wait() == 0 for process in processes)
        took[number] = time.monotonic() - began
        print(f"{number} worker{'s' * (number > 1)}: {trials} trials in {took[number]:.0f} s, start included")
    print(f"speed-up of the second: {took[1] / took[2]:.2f}")


def _take_turn(arm: Arm) -> None:
    began = time.monotonic()
    arm.turn(len(arm.seconds))
    arm.seconds.append(time.monotonic() - began)
    print(f"{arm.name}: trial {len(arm.seconds) - 1}, {arm.seconds[-1]:.1f} s", file=sys.stderr, flush=True)


def _mappo(config: ExperimentConfig, directory: Path, pruner: str, is_fixed: bool = False) -> Arm:
    database = Database(f"sqlite:///{directory}/studies.db")
    plan = _plan(config, pruner)

    def run(_: Any, __: ExperimentConfig, place: Run) -> Any:
        history = HistoryFile(Path(f"{place.store.location}.csv"))
        return nullcontext(worker.RunListeners(history, lambda _: None, lambda _: None, lambda _: None))

    def turn(number: int) -> None:
        name = f"study-{number}" if is_fixed else "study"
        study = Study.prepare(database, name, plan, 1 if is_fixed else number + 1, store=str(directory))
        worker.work(study, "worker", worker.TrialListeners(run, lambda *_: None))

    def best() -> tuple[float, PolicyOf | None]:
        study = Study.load(database, "study")
        found = study.best()
        if found is None or found.value is None:
            return math.nan, None
        place = Run.at(f"{study.place}/{worker.trial_run(found.number, found.values, TUNING.training_seeds[0])}")
        return found.value, trained_policy(config, place.load(place.choose("best")))

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
        chosen = replace(applied(config, trial.params), seed=TUNING.training_seeds[0])
        policy = trainer(chosen, directory / f"trial-{trial.number}")
        episodes = EvaluationConfig(TUNING.evaluation_seeds, TUNING.episodes_per_seed)
        value = _return(config, episodes, Stream.TUNING, policy)
        study.tell(trial, value)
        if not best or value > best[0][0]:
            best[:] = [(value, policy)]

    return Arm(name, turn, lambda: best[0])


def _trainer(config: ExperimentConfig, directory: Path) -> PolicyOf:
    """Our trainer, to the end; the best checkpoint's policy."""
    run = Run.at(directory)
    train(config, run, HistoryFile(directory / "history.csv"), lambda _: None)
    return trained_policy(config, run.load(run.choose("best")))


def _acting(policy: Any) -> PolicyOf:
    return lambda _: policy


def _return(config: ExperimentConfig, episodes: EvaluationConfig, stream: Stream, policy: PolicyOf) -> float:
    returns, _ = play_episodes(policy, config, episodes, stream)
    return math.fsum(returns) / len(returns)


def _plan(config: ExperimentConfig, pruner: Any) -> Plan:
    return Plan(config, default_space(config), replace(TUNING, pruner=pruner))


def _distributions(config: ExperimentConfig) -> dict[str, BaseDistribution]:
    made: dict[str, BaseDistribution] = {}
    for path, each in default_space(config).items():
        kind = (
            optuna.distributions.IntDistribution if each.type == "int" else optuna.distributions.FloatDistribution
        )
        assert each.type != "categorical"
        made[path] = kind(each.low, each.high, log=each.log)  # type: ignore[arg-type]
    return made


if __name__ == "__main__":
    main()
