"""What the stages of tuning do: prepare a study, work on it, choose, report; and all of it on this machine."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath

from mappo.config import to_json
from mappo.errors import StageFailed
from mappo.reporting.terminal import say
from mappo.runs.locations import joined
from mappo.stages.choose import ChosenConfiguration, choose
from mappo.stages.evaluate import evaluate
from mappo.stages.promote import promote_best
from mappo.stages.report import report_study
from mappo.stages.runtime import readable_errors
from mappo.stages.train import train
from mappo.stages.tune import work_on_study
from mappo.tuning.database import open_database
from mappo.tuning.database_url import RUNS
from mappo.tuning.study import Study
from mappo.tuning.study_config import Retraining


def run_study(name: str, num_workers: int, finish: Retraining) -> None:
    """Work on a study with some processes, then train its best again, judge it, and write what was found.

    Files go to the study's place, or, if that is in a bucket, to one of that name below runs/. Doing it again
    goes on where it stopped.

    Raises:
        StageFailed: a stage failed.
    """
    with readable_errors("tune"), open_database() as database:
        place = Study.load(database, name).place
    directory = RUNS / PurePosixPath(place).name if "://" in place else Path(place)
    with _workers(name, num_workers - 1, directory):
        work_on_study(name)
    chosen = choose(name, finish.num_seeds, output=directory / "best.json")
    evaluations = _retrained(chosen, directory)
    trial = chosen.trial.number
    promote_best(name, trial, finish, directory / "decision.json")
    report_study(
        name,
        trial,
        evaluations,
        directory / "decision.json",
        directory / "comparison.json",
        directory / "study.html",
    )
    say("report", f"{directory}/: study.html, best.json, comparison.json, decision.json")


def _retrained(chosen: ChosenConfiguration, directory: Path) -> list[Path]:
    """Evaluations of the default and of the best, trained from fresh seeds; the default first."""
    reports = []
    for label, config in (("default", chosen.default), (chosen.best_runs, chosen.best)):
        for seed in chosen.seeds:
            own = directory / f"{label}-{seed}"
            run = joined(chosen.place, f"{label}-{seed}")
            train(to_json(config), run, own / "history.csv", seed=str(seed))
            evaluate(to_json(config), run, own / "evaluation.json", seed=str(seed), keep=True)
            reports.append(own / "evaluation.json")
    return reports


@contextmanager
def _workers(name: str, number: int, directory: Path) -> Iterator[None]:
    """More workers, each a process with a log of its own; when the block ends, so do they.

    Raises:
        StageFailed: one of them failed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    logs = [directory / f"worker-{index + 2}.log" for index in range(number)]
    command = [sys.executable, "-m", "mappo", "study", "work", name]
    with ExitStack() as files:
        processes = [
            subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
            for file in (files.enter_context(log.open("a")) for log in logs)
        ]
        for log in logs:
            say("tune", f"another worker writes to {log}")
        try:
            yield
        except BaseException:
            for process in processes:
                process.terminate()
            raise
        finally:
            statuses = [process.wait() for process in processes]
    failed = [str(log) for log, status in zip(logs, statuses, strict=True) if status]
    if failed:
        say("tune", f"failed: a worker failed, see {', '.join(failed)}")
        raise StageFailed(f"tune: see {', '.join(failed)}")
