"""The pipeline of several seeds: validate -> (train -> evaluate) for each seed -> compare."""

from collections.abc import Callable
from typing import Any, List, NamedTuple  # noqa: UP035  (Kubeflow's compiler knows this spelling)

from kfp import dsl

import mappo
from components.compare import compare
from components.evaluate import evaluate
from components.train import train
from components.validate import validate
from pipelines.placement import Placement, with_placement
from pipelines.site import Site


class Artifacts(NamedTuple):
    """The artifacts of a finished run."""

    validation_report: dsl.Artifact
    comparison_report: dsl.Artifact
    comparison_metrics: dsl.Metrics


def make_each_seed(site: Site | None, parallelism: int, name: str = "mappo-each-seed") -> Callable[..., Any]:
    """Make an inner pipeline that trains and evaluates several seeds, `parallelism` at once (0: all).

    `parallelism` is fixed when the pipeline is compiled. The loop is a pipeline of its own, because Kubeflow's
    local runner confuses loop items with outputs of tasks around the loop.
    """

    @dsl.pipeline(name=name)
    @with_placement(site, "train", "evaluate")
    def each_seed(placement: Placement, config: str, seeds: List[str], store: str, run: str) -> List[dsl.Artifact]:  # noqa: UP006
        """Train and evaluate every seed."""
        version = mappo.__version__
        with dsl.ParallelFor(seeds, parallelism=parallelism) as seed:
            common = {"seed": seed, "run": run, "scheduled_at": placement.scheduled_at, "compiled_by": version}
            trained = train(config=config, store=store, **common, **placement.gpus("train"))
            best = trained.outputs["best"]
            evaluated = evaluate(config=config, checkpoint=best, **common, **placement.gpus("evaluate"))
            placement.apply(trained, "train")
            placement.apply(evaluated, "evaluate")
        return dsl.Collected(evaluated.outputs["report"])

    return each_seed


def make_seeds_pipeline(site: Site | None, parallelism: int) -> Callable[..., Any]:
    """Make the pipeline for a site, or for this machine (None); it trains `parallelism` seeds at once (0: all)."""
    each_seed = make_each_seed(site, parallelism)

    @dsl.pipeline(
        name="mappo-seeds",
        description="Validate the environment, train and evaluate several seeds, compare them.",
    )
    @with_placement(site, "validate", "train", "evaluate", "compare", ends_as="seeds")
    def seeds_pipeline(
        placement: Placement,
        config: str,
        seeds: List[str],  # noqa: UP006
        store: str = "",
        run: str = "",
    ) -> Artifacts:
        """Train and evaluate one configuration from several seeds.

        Args:
            placement: The placement of the pipeline's stages.
            config: The experiment's configuration as JSON, as `mappo show-config` prints it.
            seeds: The seeds of training, each as a string, such as ["0", "1", "2"].
            store: The store of runs, s3://bucket/prefix; empty to keep the runs with the pipeline's artifacts.
            run: The name of the runs in the store; the seed is appended, as in first-0. Existing runs are resumed.
        """
        validated = validate(
            config=config, run=run, scheduled_at=placement.scheduled_at, compiled_by=mappo.__version__
        )
        inner_parameters = placement.parameters("train", "evaluate")
        evaluated = each_seed(config=config, seeds=seeds, store=store, run=run, **inner_parameters).after(
            validated
        )
        evaluated.set_caching_options(False)
        compared = compare(evaluations=evaluated.output)
        placement.apply(validated, "validate")
        placement.apply(compared, "compare")
        return Artifacts(
            validation_report=validated.outputs["report"],
            comparison_report=compared.outputs["report"],
            comparison_metrics=compared.outputs["metrics"],
        )

    return seeds_pipeline
