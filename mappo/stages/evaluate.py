"""The stage that evaluates a run's checkpoint."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mappo.config import to_json
from mappo.errors import StoreError
from mappo.evaluation import evaluation, rollouts
from mappo.evaluation.evaluation import EvaluationReport
from mappo.reporting import run_record
from mappo.reporting.tables import returns_line
from mappo.reporting.terminal import say
from mappo.runs.run import load_checkpoint
from mappo.stages.report import write_page
from mappo.stages.runtime import (
    StageResult,
    finite,
    metadata_of,
    readable_errors,
    run_label,
    watched_stage,
    write_json,
)


@dataclass(frozen=True)
class PageInputs:
    """An HTML page to be written, with the curves of this history. attempts: of training, if they were counted."""

    page: Path
    history: Path
    attempts: str = ""


def evaluate(
    config: str,
    run: str | Path,
    report: Path | None = None,
    *,
    checkpoint: str = "best",
    looks: PageInputs | None = None,
    keep: bool = False,
    name: str = "",
    seed: str = "",
    compiled_by: str = "",
    gpu_count: str = "0",
) -> StageResult:
    """Judge a run's checkpoint on held-out seeds, beside the baselines; write the `EvaluationReport` as JSON.

    `checkpoint` is `best`, `last` or the number of an iteration. An empty `config` is that of the checkpoint. With
    `looks`, an HTML page of the run is written.
    With `keep`, the report and episodes to watch are kept with the run, where `report` finds them.

    Raises:
        StageFailed: the checkpoint cannot be read or does not fit the task.
    """
    label = run_label(name, seed, str(run))
    loaded = None
    if not config:
        with readable_errors("evaluate"):
            loaded = load_checkpoint(run, checkpoint)
        config = to_json(loaded.config)
    with watched_stage("evaluate", config, compiled_by, seed, label, gpu_count=gpu_count) as (experiment, monitor):
        trained = loaded or load_checkpoint(run, checkpoint)
        seeds, episodes = experiment.evaluation.seeds, experiment.evaluation.episodes_per_seed
        say("evaluate", f"{len(seeds) * episodes} episodes ({len(seeds)} seeds x {episodes}) for each policy")
        result = evaluation.evaluate(experiment, trained)
        monitor.evaluated(result)
        write_json(report, result)
        if looks or keep:
            seen = rollouts.record(experiment, trained, result)
            if keep:
                _keep_with_run(run, result, seen)
            if looks:
                text = looks.history.read_text()
                shown = run_record.of_checkpoint(label, trained, text, result, asdict(seen))
                if looks.attempts:
                    shown = replace(shown, facts={"attempts of training": looks.attempts, **shown.facts})
                write_page(looks.page, [shown])
        for policy, returns in result.policies().items():
            say("evaluate", returns_line(policy, returns))
        if result.no_heuristic:
            say("evaluate", f"no heuristic policy: {result.no_heuristic}")
        say("evaluate", f"95 % bootstrap intervals; resampled: {result.resampled}")
        return StageResult(metadata_of(experiment), finite("evaluate", _evaluation_metrics(result)))


def _keep_with_run(run: str | Path, result: EvaluationReport, seen: rollouts.Rollouts) -> None:
    """In its place; that a store cannot be written there is said, and fails nothing."""
    try:
        run_record.keep(run, result, seen)
    except (StoreError, OSError) as error:
        say("evaluate", f"warning: not kept with the run: {error}")
    else:
        say("evaluate", f"kept with the run; to look at it: mappo report {run}")


def _evaluation_metrics(report: EvaluationReport) -> dict[str, float]:
    metrics: dict[str, float] = {"training_frames": report.training_frames}
    for policy, returns in report.policies().items():
        for name, value in (("mean", returns.mean), ("interquartile_mean", returns.interquartile_mean)):
            metrics[f"{policy}_return_{name}"] = value.value
            if value.low is not None and value.high is not None:
                metrics[f"{policy}_return_{name}_low"] = value.low
                metrics[f"{policy}_return_{name}_high"] = value.high
    return metrics
