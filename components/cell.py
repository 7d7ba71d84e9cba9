"""The stage of one cell of a matrix as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def cell(
    matrix: str,
    cell: str,
    store: str,
    report: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    scheduled_at: str = "",
    gpu_count: str = "0",
    compiled_by: str = "",
):
    """Train and evaluate one cell of a matrix, unless its run in the store is done.

    Args:
        matrix: The matrix as JSON: its tasks, algorithms and seeds.
        cell: The name of the cell, TASK-ALGORITHM-SEED.
        store: The store of runs, as s3://bucket/prefix; the run is at STORE/MATRIX/CELL and is resumed.
        report: The EvaluationReport as JSON, a copy of the one beside the run.
        metrics: The mean return, those of the baselines, the task's measurements, frames and seconds of training.
        scheduled_at: The time that replaces [[ScheduledTime]] in store.
        gpu_count: The number of GPUs of the pod, as text; if not 0, the stage uses one or fails at once.
        compiled_by: The version of mappo that compiled the pipeline; the stage warns if the image has another.
    """
    from pathlib import Path

    from components.placeholders import fill
    from mappo.stages.cell import fill_cell

    store, path = fill(store, scheduled_at), Path(report.path)
    outcome = fill_cell(matrix, cell, store, path, compiled_by=compiled_by, gpu_count=gpu_count)
    report.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
