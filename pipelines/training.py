"""The training pipeline: validate -> train -> evaluate. One definition for a cluster and for a laptop."""

from typing import NamedTuple

from kfp import dsl

import mappo
from components.evaluate import evaluate
from components.train import train
from components.validate import validate
from pipelines.placement import place


class Artifacts(NamedTuple):
    """What a finished run leaves."""

    validation_report: dsl.Artifact
    best_checkpoint: dsl.Model
    last_checkpoint: dsl.Model
    training_history: dsl.Dataset
    training_metrics: dsl.Metrics
    evaluation_report: dsl.Artifact
    evaluation_metrics: dsl.Metrics


@dsl.pipeline(
    name="mappo-training",
    description="Validate the environment, train policies by MAPPO, evaluate the best on held-out seeds.",
)
def training(config: str, image: str) -> Artifacts:
    """Train and judge one set of policies.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        image: The container image of every stage, with a tag.
    """
    version = mappo.__version__
    validated = validate(config=config, compiled_by=version)
    trained = train(config=config, compiled_by=version).after(validated)
    evaluated = evaluate(config=config, checkpoint=trained.outputs["best"], compiled_by=version)
    place(image, validated, trained, evaluated)
    return Artifacts(
        validation_report=validated.outputs["report"],
        best_checkpoint=trained.outputs["best"],
        last_checkpoint=trained.outputs["last"],
        training_history=trained.outputs["history"],
        training_metrics=trained.outputs["metrics"],
        evaluation_report=evaluated.outputs["report"],
        evaluation_metrics=evaluated.outputs["metrics"],
    )
