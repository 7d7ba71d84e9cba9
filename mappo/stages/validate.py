"""The stage that validates a task."""

from collections import Counter
from pathlib import Path

from mappo.environment import validation
from mappo.environment.validation import ValidationReport
from mappo.errors import EnvironmentUnfit
from mappo.reporting.tables import say_check
from mappo.reporting.terminal import say
from mappo.stages.runtime import StageResult, metadata_of, run_label, watched_stage, write_json


def validate(config: str, report: Path | None = None, *, name: str = "", compiled_by: str = "") -> StageResult:
    """Check that the task is fit to train on; write the `ValidationReport` as JSON.

    In every stage, `compiled_by` is the version of this package that compiled the pipeline; another one than this
    is said. `seed` replaces that of the configuration. `name` is what metrics call the run; without it they say
    the pipeline run's ID, from MAPPO_PIPELINE_RUN in the environment, or the last part of the run's place.
    `gpu_count` is how many GPUs the pod asked for, as text: if any, the stage computes on one or fails at once.

    Raises:
        Preempted: in every stage, the process was asked to end; training has saved what it could in a hurry.
        StageFailed: a check failed.
    """
    with watched_stage("validate", config, compiled_by, label=run_label(name)) as (experiment, monitor):
        result = validation.validate(experiment, on_check=say_check)
        monitor.validated(result)
        write_json(report, result)
        if result.failures:
            raise EnvironmentUnfit(_listed(result))
        counts = Counter(check.outcome for check in result.checks)
        say("validate", f"{counts['passed']} checks passed, {counts['warning']} with a warning, none failed")
        return StageResult(metadata_of(experiment))


def _listed(report: ValidationReport) -> str:
    return "\n".join(f"{check.name}: {check.detail}" for check in report.failures)
