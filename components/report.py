"""The stage that reports a study, as a Kubeflow component."""

from typing import List  # noqa: UP035  (Kubeflow's compiler knows this spelling)

from kfp import dsl

from components import component


@component
def report(
    study: str,
    trial: int,
    default_evaluations: dsl.Input[List[dsl.Artifact]],  # noqa: UP006
    best_evaluations: dsl.Input[List[dsl.Artifact]],  # noqa: UP006
    decision: dsl.Input[dsl.Artifact],
    comparison: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    page: dsl.Output[dsl.HTML],
):
    """Compare the best configuration with the default, and write one page of the study.

    Args:
        study: The name of a study.
        trial: The number of the trial that was chosen and trained again.
        default_evaluations: The EvaluationReports of the default configuration, one for each fresh seed.
        best_evaluations: The EvaluationReports of the best configuration, one for each fresh seed.
        decision: The result of the promotion as JSON.
        comparison: The ComparisonReport as JSON.
        metrics: The mean returns of the default and of the best over seeds, and the gain with its interval.
        page: The page of the study: trials, importances, curves, workers, the final comparison.
    """
    from pathlib import Path

    from mappo.stages.report import report_study

    evaluations = [Path(report.path) for report in [*default_evaluations, *best_evaluations]]
    outputs = (Path(comparison.path), Path(page.path))
    outcome = report_study(study, trial, evaluations, Path(decision.path), *outputs)
    for artifact in (comparison, page):
        artifact.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
