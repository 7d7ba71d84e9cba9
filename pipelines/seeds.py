"""The pipeline of several seeds: validate -> (train -> evaluate) for each -> compare."""

from collections.abc import Callable
from typing import Any, List, NamedTuple  # noqa: UP035  (Kubeflow's compiler knows this spelling)

from kfp import dsl

import mappo
from components.compare import compare
from components.evaluate import evaluate
from components.train import train
from components.validate import validate
from pipelines.placement import place, place_training


class Artifacts(NamedTuple):
    """What a finished run leaves."""

    validation_report: dsl.Artifact
    comparison_report: dsl.Artifact
    comparison_metrics: dsl.Metrics


def make_seeds_pipeline(parallelism: int, num_retries: int) -> Callable[..., Any]:
    """The pipeline, training at most `parallelism` seeds at once (0: all), trying each again `num_retries` times.

    Kubeflow fixes this number when it compiles. The loop is a pipeline of its own, because Kubeflow's local runner
    confuses loop items with outputs of tasks around the loop.
    """

    @dsl.pipeline(name="mappo-each-seed")
    def each_seed(config: str, seeds: List[str], image: str, store: str, run: str) -> List[dsl.Artifact]:  # noqa: UP006
        """Train and evaluate every seed."""
        version = mappo.__version__
        with dsl.ParallelFor(seeds, parallelism=parallelism) as seed:
            trained = train(config=config, seed=seed, store=store, run=run, compiled_by=version)
            best = trained.outputs["best"]
            evaluated = evaluate(config=config, checkpoint=best, seed=seed, run=run, compiled_by=version)
            place(image, trained, evaluated)
            place_training(trained, num_retries)
        return dsl.Collected(evaluated.outputs["report"])

    @dsl.pipeline(
        name="mappo-seeds",
        description="Validate the environment, train and evaluate several seeds, compare them.",
    )
    def seeds_pipeline(config: str, seeds: List[str], image: str, store: str = "", run: str = "") -> Artifacts:  # noqa: UP006
        """Train and judge one configuration from several seeds.

        Args:
            config: The experiment's configuration as JSON, as `mappo show-config` prints it.
            seeds: The seeds of training, each as a string, such as ["0", "1", "2"].
            image: The container image of every stage, with a tag.
            store: Where runs are kept, as s3://bucket/prefix; empty to keep them with the pipeline's artifacts.
            run: The name of the runs in the store; each seed's has the seed added, as in first-0.
        """
        validated = validate(config=config, run=run, compiled_by=mappo.__version__)
        evaluated = each_seed(config=config, seeds=seeds, image=image, store=store, run=run).after(validated)
        compared = compare(evaluations=evaluated.output)
        place(image, validated, compared)
        return Artifacts(
            validation_report=validated.outputs["report"],
            comparison_report=compared.outputs["report"],
            comparison_metrics=compared.outputs["metrics"],
        )

    return seeds_pipeline
