"""The stage that evaluates a run's checkpoint."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mappo.config import ExperimentConfig, from_dict
from mappo.errors import MappoError
from mappo.evaluation import evaluation, rollouts
from mappo.evaluation.evaluation import EvaluationReport, changed_settings
from mappo.monitoring.tracking import tracked_run
from mappo.reporting import run_record
from mappo.reporting.tables import counted, measurement_lines, returns_line
from mappo.reporting.terminal import say
from mappo.runs.checkpoint import Checkpoint, Manifest
from mappo.runs.run import POLICY_PARTS, Run
from mappo.stages.report import page_address, page_of_run, write_page
from mappo.stages.runtime import (
    StageResult,
    estimate_metrics,
    finite,
    metadata_of,
    run_label,
    watched_stage,
    write_json,
)


@dataclass(frozen=True)
class PageInputs:
    """The HTML page to write.

    history: the file of its curves. attempts, mlflow_run: the attempts and the MLflow run of training, if known.
    """

    path: Path
    history: Path
    attempts: str = ""
    mlflow_run: str = ""


def evaluate(
    config: str,
    run: str | Path,
    report: Path | None = None,
    *,
    checkpoint: str = "best",
    page: PageInputs | None = None,
    keep_at: str = "",
    name: str = "",
    seed: str = "",
    compiled_by: str = "",
    gpu_count: str = "0",
) -> StageResult:
    """Evaluate a run's checkpoint and baselines on held-out seeds; write the `EvaluationReport` as JSON.

    `checkpoint` is `best`, `last` or the number of an iteration. `config` names the task: code that only a
    checkpoint names is never imported. `page` asks for an HTML page of the run. `keep_at` is the location of the
    run, of which `run` may be a copy of one checkpoint: the evaluation is saved there, with a page if it is a
    directory.

    Raises:
        StageFailed: the checkpoint cannot be read or does not fit the task.
    """
    label = run_label(name, seed, str(run))
    with (
        watched_stage("evaluate", config, compiled_by, seed, label, gpu_count=gpu_count) as (experiment, monitor),
        tracked_run(experiment, label, "" if page else run, run=page.mlflow_run if page else "") as tracked,
    ):
        target, whole = Run.at(run), Run.at(keep_at) if keep_at else None
        ref = target.choose(checkpoint)
        trained = target.load(ref, POLICY_PARTS)
        is_whole = whole and whole.attempts.numbers()  # a copy of one checkpoint knows nothing of later ones
        last = whole.manifest(whole.choose("last")) if whole and is_whole else None
        run_config = from_dict(last.config) if last else trained.config
        is_own = ref == (whole or target).choose("best") and not changed_settings(experiment, run_config)
        _say_what_is_judged(experiment, trained, last)
        result = evaluation.evaluate(experiment, trained, checkpoint, last.frames if last else None)
        monitor.evaluated(result)
        tracked.evaluated(result)
        write_json(report, result)
        _say_results(result)
        episodes = rollouts.record(experiment, trained, result) if page or (whole and is_own) else None
        if keep_at:
            _keep_with_run(keep_at, trained.iteration, result, episodes if is_own else None)
        if page:
            assert episodes
            history = page.history.read_text()
            record = run_record.of_checkpoint(label, trained, history, result, asdict(episodes))
            facts = run_record.origin(whole) if whole else {}
            if page.attempts:
                facts = {**facts, "attempts of the stage": page.attempts}
            record = replace(record, facts={**facts, **record.facts})
            write_page(page.path, [record])
            tracked.attach(page.path)
        return StageResult(metadata_of(experiment), finite("evaluate", evaluation_metrics(result)))


def _say_what_is_judged(config: ExperimentConfig, trained: Checkpoint, last: Manifest | None) -> None:
    """Print the judged checkpoint and the episodes. `last`: the newest checkpoint of the run, if it is known."""
    seeds, per_seed = config.evaluation.seeds, config.evaluation.episodes_per_seed
    of_run = f" of {last.frames:,}" if last else ""
    say(
        "evaluate",
        f"the checkpoint after {trained.frames:,}{of_run} frames (iteration {trained.iteration}); "
        f"{len(seeds) * per_seed} episodes ({counted(len(seeds), 'seed')} x {per_seed}) for each policy",
    )
    collection = trained.config.collection
    if last and last.iteration < collection.num_iterations:
        say(
            "evaluate",
            f"warning: this run has not finished: it has {last.frames:,} of {collection.final_frames:,} frames",
        )


def _say_results(result: EvaluationReport) -> None:
    for policy, returns in result.policies().items():
        say("evaluate", returns_line(policy, returns))
    for line in measurement_lines({policy: returns.measurements for policy, returns in result.policies().items()}):
        say("evaluate", line)
    if result.no_heuristic:
        say("evaluate", f"no heuristic policy: {result.no_heuristic}")
    say("evaluate", f"95 % intervals; resampled: {result.resampled}")


def _keep_with_run(
    run: str, iteration: int, result: EvaluationReport, own_episodes: rollouts.Rollouts | None
) -> None:
    """Save the evaluation with the run, and write the run's page. If that fails, print a warning and continue.

    `own_episodes` are those of the run's own evaluation, which judges its best checkpoint under its own settings;
    another evaluation is saved beside that one, under a name of its own.
    """
    try:
        if own_episodes:
            run_record.keep(run, result, own_episodes)
            say("evaluate", "saved with the run as its evaluation")
        else:
            key = run_record.keep_other(run, iteration, result)
            say("evaluate", f"saved with the run as {key}, beside the evaluation of its best checkpoint")
        if page := page_of_run(run):
            write_page(page, run_record.of_runs([run]))
            say("evaluate", f"page: {page_address(page)}")
        else:
            say("evaluate", f"to view it: mappo report {run}")
    except (MappoError, OSError) as error:
        say("evaluate", f"warning: the evaluation could not be saved with the run: {error}")


def evaluation_metrics(report: EvaluationReport) -> dict[str, float]:
    """Return the numbers of an evaluation that a pipeline shows."""
    metrics: dict[str, float] = {"training_frames": report.training_frames}
    for policy, returns in report.policies().items():
        for name, value in (("mean", returns.mean), ("interquartile_mean", returns.interquartile_mean)):
            metrics |= estimate_metrics(f"{policy}_return_{name}", value)
    measured = report.trained.measurements.items()
    return metrics | {f"trained_measured_{name}": each.mean.value for name, each in measured if each.mean}
