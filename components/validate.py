"""The validation stage as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def validate(
    config: str, report: dsl.Output[dsl.Artifact], run: str = "", scheduled_at: str = "", compiled_by: str = ""
):
    """Check that the environment is fit for training, before GPU time is spent.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        report: The ValidationReport as JSON, with an entry for each check.
        run: The name of the run in metrics; empty for the ID of the pipeline's run.
        scheduled_at: The time that replaces [[ScheduledTime]] in run: the schedule's, or the run's creation.
        compiled_by: The version of mappo that compiled the pipeline; the stage warns if the image has another.
    """
    from pathlib import Path

    from components.placeholders import fill
    from mappo.stages.validate import validate

    outcome = validate(config, Path(report.path), name=fill(run, scheduled_at), compiled_by=compiled_by)
    report.metadata.update(outcome.metadata)
