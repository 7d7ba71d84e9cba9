"""The comparison stage as a Kubeflow component."""

from typing import List  # noqa: UP035  (Kubeflow's compiler knows this spelling)

from kfp import dsl

from components import component


@component
def compare(
    evaluations: dsl.Input[List[dsl.Artifact]],  # noqa: UP006
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
):
    """Compare the evaluations of several training seeds.

    Args:
        evaluations: The EvaluationReports, one for each seed.
        report: The ComparisonReport as JSON: the return of every seed, means over seeds with intervals.
        metrics: The mean over seeds with its interval, and the random policy's mean.
    """
    from pathlib import Path

    from mappo.stages.compare import compare

    outcome = compare([Path(evaluation.path) for evaluation in evaluations], Path(report.path))
    report.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
