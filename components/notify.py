"""The stage that sends a message when a pipeline's run ends, as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def notify(
    pipeline: str, message: dsl.Output[dsl.Artifact], run: str = "", edition: str = "", scheduled_at: str = ""
):
    """Send a message to a webhook, with the outcome of the pipeline's run, its reason and its headline numbers.

    Args:
        pipeline: The pipeline of the run: training, seeds or tuning.
        message: The message as JSON.
        run: The name of the run or the study; empty for the ID of the pipeline's run.
        edition: The edition of the study.
        scheduled_at: The time that replaces [[ScheduledTime]] in run and edition.
    """
    import os
    from pathlib import Path

    from components.placeholders import fill
    from mappo.stages.notify import notify
    from mappo.tuning.study_config import study_name

    name = fill(run, scheduled_at)
    if pipeline == "tuning":
        name = study_name(name, fill(edition, scheduled_at))
    subject = f"{'study' if pipeline == 'tuning' else 'run'} {name or os.environ.get('MAPPO_PIPELINE_RUN', '')}"
    folder = message.uri.partition("?")[0].rstrip("/").rsplit("/", 3)[0]  # ROOT/PIPELINE/RUN/STAGE/EXECUTION/NAME
    outcome = notify(pipeline, subject, folder, Path(message.path))
    message.metadata.update(outcome.metadata)
