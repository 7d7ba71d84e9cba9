"""The stage that sends a message when a pipeline's run ends, as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def notify(
    pipeline: str, message: dsl.Output[dsl.Artifact], run: str = "", edition: str = "", scheduled_at: str = ""
):
    """Send a message to a webhook, with the outcome of the pipeline's run, its reason and its headline numbers.

    Args:
        pipeline: The pipeline of the run: training, seeds, tuning or matrix.
        message: The message as JSON.
        run: The name of the run or the study, or the matrix as JSON; empty for the ID of the pipeline's run.
        edition: The edition of the study.
        scheduled_at: The time that replaces [[ScheduledTime]] in run and edition.
    """
    from pathlib import Path

    from components.placeholders import fill
    from mappo.stages.notify import notify, subject_of

    name = run if pipeline == "matrix" else fill(run, scheduled_at)
    subject = subject_of(pipeline, name, fill(edition, scheduled_at))
    folder = message.uri.partition("?")[0].rstrip("/").rsplit("/", 3)[0]  # ROOT/PIPELINE/RUN/STAGE/EXECUTION/NAME
    outcome = notify(pipeline, subject, folder, Path(message.path))
    message.metadata.update(outcome.metadata)
