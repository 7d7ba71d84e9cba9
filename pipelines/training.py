"""The training pipeline: validate -> train -> evaluate. One definition for a cluster and for a laptop."""

from collections.abc import Callable
from typing import Any, NamedTuple

from kfp import dsl

import mappo
from components.evaluate import evaluate
from components.train import train
from components.validate import validate
from pipelines.placement import Placement, with_placement
from pipelines.site import Site


class Artifacts(NamedTuple):
    """The artifacts of a finished run."""

    validation_report: dsl.Artifact
    best_checkpoint: dsl.Model
    checkpoints: dsl.Artifact
    training_history: dsl.Dataset
    training_metrics: dsl.Metrics
    evaluation_report: dsl.Artifact
    evaluation_metrics: dsl.Metrics
    run_page: dsl.HTML


def make_training_pipeline(site: Site | None) -> Callable[..., Any]:
    """Make the pipeline for a site, or for this machine (None)."""

    @dsl.pipeline(
        name="mappo-training",
        description="Validate the environment, train policies, evaluate the best on held-out seeds.",
    )
    @with_placement(site, "validate", "train", "evaluate", ends_as="training")
    def training(placement: Placement, config: str, store: str = "", run: str = "") -> Artifacts:
        """Train and evaluate one set of policies.

        Args:
            placement: The placement of the pipeline's stages.
            config: The experiment's configuration as JSON, as `mappo show-config` prints it.
            store: The store of runs, s3://bucket/prefix; empty to keep the run with the pipeline's artifacts.
            run: The run's name in the store; an existing run is resumed. Empty: the ID of the pipeline's run.
        """
        version = mappo.__version__
        common = {
            "run": run,
            "scheduled_at": placement.scheduled_at,
            "compiled_by": version,
        }
        validated = validate(config=config, **common)
        trained = train(config=config, store=store, **common, **placement.gpus("train")).after(validated)
        best = trained.outputs["best"]
        evaluated = evaluate(config=config, checkpoint=best, **common, **placement.gpus("evaluate"))
        for task, stage in ((validated, "validate"), (trained, "train"), (evaluated, "evaluate")):
            placement.apply(task, stage)
        return Artifacts(
            validation_report=validated.outputs["report"],
            best_checkpoint=trained.outputs["best"],
            checkpoints=trained.outputs["checkpoints"],
            training_history=trained.outputs["history"],
            training_metrics=trained.outputs["metrics"],
            evaluation_report=evaluated.outputs["report"],
            evaluation_metrics=evaluated.outputs["metrics"],
            run_page=evaluated.outputs["page"],
        )

    return training
