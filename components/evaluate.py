"""The evaluation stage as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def evaluate(
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
    """Judge a trained policy on held-out seeds, beside a random and, if there is one, a heuristic policy.

    Args:
        checkpoint: The best checkpoint of the training stage, with its configuration and history.
        report: The EvaluationReport as JSON: every episode's return, means with intervals.
        metrics: Means and intervals of each policy.
        page: The run on one page: curves, evaluation, and episodes to watch.
        seed: The seed of training, in place of the configuration's; empty to keep that.
        run: What metrics call the run; empty for the ID of the pipeline's run.
        scheduled_at: The time for [[ScheduledTime]] in run: the schedule's, or the run's creation.
        gpu_count: How many GPUs the pod asked for, as text; if any, the stage computes on one or fails at once.
        compiled_by: The version of mappo that compiled the pipeline; the stage says if it is not the image's.
    """
    from pathlib import Path

    from components.placeholders import fill
    from mappo.stages.evaluate import PageInputs, evaluate
    from mappo.stages.train import HISTORY

    paths = (Path(checkpoint.path), Path(report.path))
    looks = PageInputs(
        Path(page.path), Path(checkpoint.path, HISTORY), str(checkpoint.metadata.get("attempts", ""))
    )
    name = fill(run, scheduled_at)
    outcome = evaluate("", *paths, looks=looks, name=name, seed=seed, compiled_by=compiled_by, gpu_count=gpu_count)
    for artifact in (report, page):
        artifact.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
