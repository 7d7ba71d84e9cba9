"""The stage that writes the tables and the page of a matrix, as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def summarise(
    matrix: str,
    store: str,
    cells: dsl.Output[dsl.Dataset],
    table: dsl.Output[dsl.Dataset],
    markdown: dsl.Output[dsl.Markdown],
    page: dsl.Output[dsl.HTML],
    metrics: dsl.Output[dsl.Metrics],
    scheduled_at: str = "",
):
    """Write the tables and the page of a matrix from the runs in its store, also if some cells failed.

    Args:
        matrix: The matrix as JSON: its tasks, algorithms and seeds.
        store: The store of runs, as s3://bucket/prefix, in which the cells keep their runs.
        cells: The results of all cells as CSV, with the state of each cell and the reason of a failure.
        table: The table as CSV with exact numbers: statistics over seeds, for each task and algorithm.
        markdown: The same table for people.
        page: The page of the matrix: table, learning curves, and what is missing.
        metrics: The number of cells in each state, and each algorithm's probability of improvement.
        scheduled_at: The time that replaces [[ScheduledTime]] in store.
    """
    from pathlib import Path

    from components.placeholders import fill
    from mappo.stages.summarise import MatrixFiles, summarise

    files = MatrixFiles(*(Path(output.path) for output in (cells, table, markdown, page)))
    outcome = summarise(matrix, fill(store, scheduled_at), files)
    for artifact in (cells, table, markdown, page):
        artifact.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
