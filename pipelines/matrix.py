"""The pipeline of a matrix: train and evaluate each cell, then summarise, also if some cells failed."""

from collections.abc import Callable
from typing import Any, List, NamedTuple  # noqa: UP035  (Kubeflow's compiler knows this spelling)

from kfp import dsl

import mappo
from components.cell import cell
from components.summarise import summarise
from pipelines.placement import Placement, with_placement
from pipelines.site import Site


class Artifacts(NamedTuple):
    """The artifacts of a finished run."""

    cell_results: dsl.Dataset
    matrix_table: dsl.Dataset
    matrix_markdown: dsl.Markdown
    matrix_page: dsl.HTML
    matrix_metrics: dsl.Metrics


def make_matrix_pipeline(site: Site | None, parallelism: int) -> Callable[..., Any]:
    """Make the pipeline for a site, or for this machine (None); it trains `parallelism` cells at once (0: all)."""

    @dsl.pipeline(name="mappo-each-cell")
    @with_placement(site, "cell")
    def each_cell(placement: Placement, matrix: str, cells: List[str], store: str):  # noqa: UP006
        """Train and evaluate every cell, each in its own pod."""
        with dsl.ParallelFor(cells, parallelism=parallelism) as name:
            filled = cell(
                matrix=matrix,
                cell=name,
                store=store,
                scheduled_at=placement.scheduled_at,
                **placement.gpus("cell"),
                compiled_by=mappo.__version__,
            )
            placement.apply(filled, "cell")

    @dsl.pipeline(
        name="mappo-matrix",
        description="Train and evaluate the cells of a matrix of tasks, algorithms and seeds, and summarise them.",
    )
    @with_placement(site, "cell", "summarise", ends_as="matrix")
    def matrix_pipeline(
        placement: Placement,
        matrix: str,
        cells: List[str],  # noqa: UP006
        store: str,
    ) -> Artifacts:
        """Fill the cells of one matrix.

        Args:
            placement: The placement of the pipeline's stages.
            matrix: The matrix as JSON: its tasks, algorithms and seeds, as --matrix FILE makes it.
            cells: The names of the cells to fill, such as ["balance-mappo-0"]; the table has all cells.
            store: The store of runs, s3://bucket/prefix; cells that are done there are left as they are.
        """
        filled = each_cell(matrix=matrix, cells=cells, store=store, **placement.parameters("cell"))
        filled.set_caching_options(False)
        # Kubeflow runs this task when the inner pipeline has ended, and the run still fails if a cell failed. The
        # task must follow an inner pipeline: Kubeflow never runs a task that so follows a loop.
        summarised = summarise(matrix=matrix, store=store, scheduled_at=placement.scheduled_at)
        summarised.after(filled).ignore_upstream_failure()
        placement.apply(summarised, "summarise")
        return Artifacts(
            cell_results=summarised.outputs["cells"],
            matrix_table=summarised.outputs["table"],
            matrix_markdown=summarised.outputs["markdown"],
            matrix_page=summarised.outputs["page"],
            matrix_metrics=summarised.outputs["metrics"],
        )

    return matrix_pipeline
