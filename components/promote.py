"""The stage that promotes what a study found, as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def promote(
    study: str,
    trial: int,
    config: str,
    decision: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    study_config: str = "{}",
    champions: str = "",
    gpu_count: str = "0",
    compiled_by: str = "",
):
    """Promote the best configuration's policy, trained from the first fresh seed, if it beats the champion.

    Args:
        study: The name of a study whose best was trained again.
        trial: The number of the trial that was chosen and trained again.
        config: The configuration that the user submitted, which names the only scenario that may run here.
        decision: The gate's Decision as JSON; without a location for champions, a note that none was asked for.
        metrics: Whether the policy was promoted, mean returns, the difference and its lower bound.
        study_config: The study's settings as JSON, of which this stage reads the retraining and the gate.
        champions: The location of champions, as s3://bucket/prefix; empty to promote nothing.
        gpu_count: The number of GPUs of the pod, as text; if not 0, the stage uses one or fails at once.
        compiled_by: The version of mappo that compiled the pipeline; the stage warns if the image has another.
    """
    from pathlib import Path

    from mappo.config import from_json
    from mappo.stages.promote import promote_best

    outcome = promote_best(
        *(study, trial, study_config, champions, Path(decision.path)),
        scenario=from_json(config).environment.scenario,
        compiled_by=compiled_by,
        gpu_count=gpu_count,
    )
    decision.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
