"""A whole study on this machine: its trials, the retraining of its best, promotion and report."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mappo.config import to_json
from mappo.errors import StageFailed, Superseded
from mappo.reporting.study_result import COMPARISON, PAGE, study_directory
from mappo.reporting.terminal import say
from mappo.runs.locations import joined
from mappo.stages.choose import ChosenConfiguration, choose
from mappo.stages.evaluate import evaluate
from mappo.stages.promote import promote_best
from mappo.stages.readable_errors import readable_errors
from mappo.stages.report import page_address, report_study
from mappo.stages.runtime import StageResult
from mappo.stages.train import train
from mappo.stages.tune import work_on_study
from mappo.stages.worker_processes import worker_processes
from mappo.tuning.database import open_database
from mappo.tuning.study import Study


def run_study(name: str, num_workers: int, study_config: str, champions: str, scenario: str = "") -> StageResult:
    """Work on a study with several processes, retrain its best, promote it and write the study's page.

    Files go beside the study's runs, or below runs/ if these are in a bucket. A second call continues where the
    first stopped. Of two calls at the same time, both work on trials; then one waits until the other has ended.
    `scenario`: as in `work_on_study`.

    Raises:
        StageFailed: a stage failed.
    """
    with readable_errors("tune"), open_database() as database:
        store = Study.load(database, name).store
    directory = study_directory(store)
    command = ["study", "work", name, *([f"--environment.scenario={scenario}"] if scenario else [])]
    directory.mkdir(parents=True, exist_ok=True)
    with worker_processes("tune", command, num_workers - 1, directory, good=(0,), ending="failed"):
        work_on_study(name, scenario)
    while True:
        with _turn_to_finish(name):
            try:
                return _finish_study(name, study_config, champions, scenario, directory)
            except StageFailed as error:
                if not isinstance(error.__cause__, Superseded):
                    raise
                say("tune", "another process has begun to train this run; waiting for it")


@contextmanager
def _turn_to_finish(name: str) -> Iterator[None]:
    """Wait until no other process finishes this study."""
    with ExitStack() as stack:
        with readable_errors("tune"):
            database = stack.enter_context(open_database())
            message = "another process finishes this study; waiting for it"
            stack.enter_context(database.long_lock(name, lambda: say("tune", message)))
        yield


def _finish_study(name: str, study_config: str, champions: str, scenario: str, directory: Path) -> StageResult:
    chosen = choose(name, study_config, scenario, output=directory / "best.json")
    evaluations = _retrain(chosen, directory)
    trial, decision = chosen.trial.number, directory / "decision.json"
    promote_best(name, trial, study_config, champions, decision, scenario=scenario)
    page = directory / PAGE
    result = report_study(name, trial, evaluations, decision, directory / COMPARISON, page)
    say("report", f"{directory}/: best.json, {COMPARISON}, decision.json")
    say("report", f"page: {page_address(page)}")
    return result


def _retrain(chosen: ChosenConfiguration, directory: Path) -> list[Path]:
    """Train and evaluate the default, then the best, from fresh seeds; return the files of the evaluations."""
    reports = []
    for label, config in (("default", chosen.default), (chosen.best_runs, chosen.best)):
        for seed in chosen.seeds:
            files = directory / f"{label}-{seed}"
            run = joined(chosen.store, f"{label}-{seed}")
            train(to_json(config), run, files / "history.csv", seed=str(seed), is_shared=True)
            evaluate(to_json(config), run, files / "evaluation.json", seed=str(seed), keep_at=run)
            reports.append(files / "evaluation.json")
    return reports
