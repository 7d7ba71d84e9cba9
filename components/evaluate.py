"""The evaluation stage as a Kubeflow component."""

from kfp import dsl


@dsl.component(base_image="python", install_kfp_package=False)
def evaluate(
    config: str,
    checkpoint: dsl.Input[dsl.Model],
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Judge a trained policy on held-out seeds, beside a random policy.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        checkpoint: What the training stage saved.
        report: The EvaluationReport as JSON: every episode's return, means with intervals.
        metrics: Means and intervals of the trained and the random policy.
    """
    from pathlib import Path

    from mappo import stages

    outcome = stages.evaluate(config, Path(checkpoint.path), Path(report.path))
    report.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
