"""The stage that checks a task before training."""

from collections import Counter
from functools import partial
from pathlib import Path

from mappo.environment import validation
from mappo.environment.validation import Check, ValidationReport
from mappo.errors import EnvironmentUnfit
from mappo.reporting.tables import say_check
from mappo.reporting.terminal import say
from mappo.stages.runtime import StageResult, metadata_of, run_label, watched_stage, write_json
from mappo.training.first_iteration import rehearse_first_iteration


def validate(config: str, report: Path | None = None, *, name: str = "", compiled_by: str = "") -> StageResult:
    """Check that the task can be used for training; write the `ValidationReport` as JSON.

    These parameters mean the same in every stage. `compiled_by` is the version of this package that compiled the
    pipeline; the stage warns if the image has another version. `seed` replaces the seed of the configuration.
    `name` is the name of the run in metrics; if it is empty, metrics use the ID of the pipeline's run
    (MAPPO_PIPELINE_RUN in the environment), or else the last part of the run's location. `gpu_count` is the number
    of GPUs that the pod requests, as text; if it is not 0, the stage computes on a GPU or fails at once.

    Raises:
        Preempted: the process received SIGTERM (in every stage); training saves what it can before it exits.
        StageFailed: a check failed.
    """
    with watched_stage("validate", config, compiled_by, label=run_label(name)) as (experiment, monitor):
        result = validation.validate(
            experiment, _say_unless_failed, rehearse_first_iteration, on_slow=partial(say, "validate")
        )
        monitor.validated(result)
        write_json(report, result)
        if result.failures:
            raise EnvironmentUnfit(_failure_lines(result))
        counts = Counter(check.outcome for check in result.checks)
        say("validate", f"{counts['passed']} checks passed, {counts['warning']} with a warning, none failed")
        return StageResult(metadata_of(experiment))


def _say_unless_failed(check: Check) -> None:
    """Print the result of a check; a failed one is printed once, as a reason for which the stage fails."""
    if check.outcome != "failed":
        say_check(check)


def _failure_lines(report: ValidationReport) -> str:
    return "\n".join(f"{check.name}: {check.detail.removeprefix(f'{check.name}: ')}" for check in report.failures)
