"""The stage that evaluates a run's checkpoint."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mappo.errors import StoreError
from mappo.evaluation import evaluation, rollouts
from mappo.evaluation.evaluation import EvaluationReport
from mappo.monitoring.tracking import tracked_run
from mappo.reporting import run_record
from mappo.reporting.tables import counted, group_lines, measurement_lines, returns_line
from mappo.reporting.terminal import say
from mappo.runs.run import POLICY_PARTS, load_checkpoint
from mappo.stages.report import write_page
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
    keep: bool = False,
    name: str = "",
    seed: str = "",
    compiled_by: str = "",
    gpu_count: str = "0",
) -> StageResult:
    """Evaluate a run's checkpoint and baselines on held-out seeds; write the `EvaluationReport` as JSON.

    `checkpoint` is `best`, `last` or the number of an iteration. `config` names the task: code that only a
    checkpoint names is never imported. `page` asks for an HTML page of the run. `keep` saves the report and
    recorded episodes with the run, where `report` finds them.

    Raises:
        StageFailed: the checkpoint cannot be read or does not fit the task.
    """
    label = run_label(name, seed, str(run))
    with (
        watched_stage("evaluate", config, compiled_by, seed, label, gpu_count=gpu_count) as (experiment, monitor),
        tracked_run(experiment, label, "" if page else run, run=page.mlflow_run if page else "") as tracked,
    ):
        trained = load_checkpoint(run, checkpoint, POLICY_PARTS)
        seeds, per_seed = experiment.evaluation.seeds, experiment.evaluation.episodes_per_seed
        say(
            "evaluate",
            f"{len(seeds) * per_seed} episodes ({counted(len(seeds), 'seed')} x {per_seed}) for each policy",
        )
        result = evaluation.evaluate(experiment, trained)
        monitor.evaluated(result)
        tracked.evaluated(result)
        write_json(report, result)
        if page or keep:
            episodes = rollouts.record(experiment, trained, result)
            if keep:
                _keep_with_run(run, result, episodes)
            if page:
                history = page.history.read_text()
                record = run_record.of_checkpoint(label, trained, history, result, asdict(episodes))
                if page.attempts:
                    record = replace(record, facts={"attempts of training": page.attempts, **record.facts})
                write_page(page.path, [record])
                tracked.attach(page.path)
        for policy, returns in result.policies().items():
            say("evaluate", returns_line(policy, returns))
        policies = result.policies().items()
        for line in [
            *group_lines({policy: returns.groups for policy, returns in policies}),
            *measurement_lines({policy: returns.measurements for policy, returns in policies}),
        ]:
            say("evaluate", line)
        if result.no_heuristic:
            say("evaluate", f"no heuristic policy: {result.no_heuristic}")
        say("evaluate", f"95 % intervals; resampled: {result.resampled}")
        return StageResult(metadata_of(experiment), finite("evaluate", evaluation_metrics(result)))


def _keep_with_run(run: str | Path, result: EvaluationReport, episodes: rollouts.Rollouts) -> None:
    """Save the evaluation with the run. If the store refuses, print a warning and continue."""
    try:
        run_record.keep(run, result, episodes)
    except (StoreError, OSError) as error:
        say("evaluate", f"warning: the evaluation could not be saved with the run: {error}")
    else:
        say("evaluate", f"the evaluation is saved with the run; to view it: mappo report {run}")


def evaluation_metrics(report: EvaluationReport) -> dict[str, float]:
    """Return the numbers of an evaluation that a pipeline shows."""
    metrics: dict[str, float] = {"training_frames": report.training_frames}
    for policy, returns in report.policies().items():
        for name, value in (("mean", returns.mean), ("interquartile_mean", returns.interquartile_mean)):
            metrics |= estimate_metrics(f"{policy}_return_{name}", value)
        for group, of_group in returns.groups.items():
            metrics |= estimate_metrics(f"{policy}_return_mean_{group}", of_group.mean)
    measured = report.trained.measurements.items()
    return metrics | {f"trained_measured_{name}": each.mean.value for name, each in measured if each.mean}
