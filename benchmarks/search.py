"""Compare the search of a study with random search, at equal frames: the best value after the same trials.

    python -m benchmarks.search                                         three tasks, four studies each
    python -m benchmarks.search --tasks balance --studies 8 --trials 40

`study` samples as a study does: Optuna's TPE, with a new sampler for each trial. `random` samples uniformly.
Both try the default values first, train every trial to its end, and are judged on the same tuning episodes. The
difference of the best values has a Student t interval over the studies. Studies are kept in `--directory`; the
same command continues after an interruption.
"""

import argparse
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree

import optuna
import torch
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from benchmarks.tuning import TUNING, default_values, distributions, tuning_return
from mappo.cli.arguments import add_config_arguments, changes_from_arguments, dashed
from mappo.compute.resources import cpu_limit
from mappo.config import ExperimentConfig, override
from mappo.evaluation.episodes import trained_policy
from mappo.evaluation.statistics import difference_over_seeds, mean_over_seeds
from mappo.fast_simulation.making import kept_simulations
from mappo.recipes import recipe
from mappo.runs.run import Run
from mappo.training.history import HistoryFile
from mappo.training.training import train
from mappo.tuning.plan import sampler_seed_of
from mappo.tuning.search_space import applied

_WAYS = "study", "random"


def main() -> None:
    """Run all studies and print a line for each task."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser, with_recipe=False)
    parser.usage = "%(prog)s [--tasks NAME,NAME,...] [--studies N] [--trials N] [--SECTION.FIELD VALUE ...]"
    parser.add_argument("--tasks", default="navigation-quick,balance,swarm", help="recipes (default: %(default)s)")
    parser.add_argument("--studies", type=int, default=4, metavar="N", help="studies a task and way (default: 4)")
    parser.add_argument("--trials", type=int, default=24, metavar="N", help="trials of a study (default: 24)")
    parser.add_argument("--directory", type=Path, default=Path("runs/search"), help="default: %(default)s")
    arguments = parser.parse_args(dashed(sys.argv[1:]))
    arguments.directory.mkdir(parents=True, exist_ok=True)
    changes, tasks = changes_from_arguments(arguments), arguments.tasks.split(",")
    configs = {task: override(recipe(task), *changes) for task in tasks}
    jobs = [
        (configs[task], arguments.directory / f"{task}-{way}-{number}", way, number, arguments.trials)
        for task, number, way in product(tasks, range(arguments.studies), _WAYS)
    ]
    with ProcessPoolExecutor(cpu_limit(), get_context("spawn")) as pool:
        bests = iter([*pool.map(_best, *zip(*jobs, strict=True))])
    print(f"{'task':<18} {'studies':>7} {'trials':>6} {'study':<22} {'random':<22} difference")
    for task in tasks:
        study, random = zip(*_pairs(bests, arguments.studies), strict=True)
        estimates = f"{mean_over_seeds(study)!s:<22} {mean_over_seeds(random)!s:<22}"
        difference = difference_over_seeds(study, random)
        print(f"{task:<18} {arguments.studies:>7} {arguments.trials:>6} {estimates} {difference}")


def _pairs(bests: Iterator[float], studies: int) -> Iterator[tuple[float, float]]:
    return ((next(bests), next(bests)) for _ in range(studies))


def _best(config: ExperimentConfig, directory: Path, way: str, number: int, trials: int) -> float:
    """Run the trials that a study lacks, and return its best value."""
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{directory}.db", study_name="study", direction="maximize", load_if_exists=True
    )
    with kept_simulations():
        while (done := len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))) < trials:
            study.sampler = _sampler(way, sampler_seed_of(number, done))
            if done == 0:
                study.enqueue_trial(default_values(config))
            trial = study.ask(distributions(config))
            study.tell(
                trial, _value(replace(applied(config, trial.params), seed=TUNING.training_seeds[0]), directory)
            )
            print(f"{directory.name}: trial {done}, {study.best_value:.4f}", file=sys.stderr, flush=True)
    return float(study.best_value)


def _sampler(way: str, seed: int) -> BaseSampler:
    return TPESampler(seed=seed) if way == "study" else RandomSampler(seed=seed)


def _value(config: ExperimentConfig, directory: Path) -> float:
    rmtree(directory, ignore_errors=True)  # of a trial that was interrupted
    run = Run.at(directory)
    train(config, run, HistoryFile(directory / "history.csv"), lambda _: None, is_shared=True)
    value = tuning_return(config, trained_policy(config, run.load(run.choose("best"))))
    rmtree(directory)
    return value


if __name__ == "__main__":
    main()
