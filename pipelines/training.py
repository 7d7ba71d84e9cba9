"""The training pipeline: validate -> train -> evaluate. One definition for a cluster and for a laptop."""

from typing import NamedTuple

from kfp import dsl

from components.evaluate import evaluate
from components.train import train
from components.validate import validate


class Artifacts(NamedTuple):
    """What a finished run leaves."""

    validation_report: dsl.Artifact
    checkpoint: dsl.Model
    training_history: dsl.Dataset
    training_metrics: dsl.Metrics
    evaluation_report: dsl.Artifact
    evaluation_metrics: dsl.Metrics


@dsl.pipeline(
    name="mappo-training",
    description="Validate the environment, train a policy by MAPPO, evaluate it on held-out seeds.",
)
def training(config: str, image: str) -> Artifacts:
    """Train and judge one policy.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        image: The container image of every stage, with a tag.
    """
    validated = validate(config=config)
    trained = train(config=config).after(validated)
    evaluated = evaluate(config=config, checkpoint=trained.outputs["checkpoint"])
    for stage in (validated, trained, evaluated):
        stage.set_container_image(image)
        stage.set_caching_options(False)  # results depend on the image's content and the device, not inputs alone
    return Artifacts(
        validation_report=validated.outputs["report"],
        checkpoint=trained.outputs["checkpoint"],
        training_history=trained.outputs["history"],
        training_metrics=trained.outputs["metrics"],
        evaluation_report=evaluated.outputs["report"],
        evaluation_metrics=evaluated.outputs["metrics"],
    )
