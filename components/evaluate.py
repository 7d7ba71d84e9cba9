"""The evaluation stage as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def evaluate(
    config: str,
    checkpoint: dsl.Input[dsl.Model],
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
    seed: str = "",
    run: str = "",
    scheduled_at: str = "",
    gpu_count: str = "0",
    compiled_by: str = "",
):
    """Evaluate a trained policy on held-out seeds, and a random and (if there is one) a heuristic policy.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        checkpoint: The best checkpoint of the training stage, with its history. Its metadata name the run's
            location, where the evaluation is kept.
        report: The EvaluationReport as JSON: every episode's return, means with intervals.
        metrics: The mean return of each policy with its interval.
        page: The page of the run: curves, evaluation, and recorded episodes.
        seed: The seed of training; empty for the configuration's.
        run: The name of the run in metrics; empty for the ID of the pipeline's run.
        scheduled_at: The time that replaces [[ScheduledTime]] in run: the schedule's, or the run's creation.
        gpu_count: The number of GPUs of the pod, as text; if not 0, the stage uses one or fails at once.
        compiled_by: The version of mappo that compiled the pipeline; the stage warns if the image has another.
    """
    from pathlib import Path

    from components.placeholders import fill
    from mappo.stages.evaluate import PageInputs, evaluate
    from mappo.stages.train import HISTORY, MLFLOW_LABEL

    values = (config, Path(checkpoint.path), Path(report.path))
    labels = [str(checkpoint.metadata.get(label, "")) for label in ("attempts", MLFLOW_LABEL)]
    inputs = PageInputs(Path(page.path), Path(checkpoint.path, HISTORY), *labels)
    location, name = str(checkpoint.metadata.get("location", "")), fill(run, scheduled_at)
    outcome = evaluate(
        *values, page=inputs, keep_at=location, name=name, seed=seed, compiled_by=compiled_by, gpu_count=gpu_count
    )
    for artifact in (report, page):
        artifact.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
