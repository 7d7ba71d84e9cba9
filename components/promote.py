"""The stage that promotes what a study found, as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def promote(
    study: str,
    trial: int,
    decision: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    num_seeds: int = 3,
    champions: str = "",
    gate: str = "{}",
    gpu_count: str = "0",
    compiled_by: str = "",
):
    """Put the best configuration's policy of the first fresh seed in its task's champion's place, if it is better.

    Args:
        study: The name of a study whose best was trained again.
        trial: The trial that was chosen and trained again.
        decision: The gate's Decision as JSON; without a place for champions, that nothing was asked.
        metrics: Whether it was promoted, mean returns, the difference and its lower bound.
        num_seeds: From how many fresh seeds it was trained again.
        champions: Where champions are kept, as s3://bucket/prefix; empty to promote nothing.
        gate: What the candidate must show, as JSON.
        gpu_count: How many GPUs the pod asked for, as text; if any, the stage computes on one or fails at once.
        compiled_by: The version of mappo that compiled the pipeline; the stage says if it is not the image's.
    """
    from pathlib import Path

    from mappo.stages.promote import promote_best, read_gate
    from mappo.strict_json import parse_json_object
    from mappo.tuning.study_config import Retraining

    finish = Retraining(num_seeds, champions, read_gate(parse_json_object(gate)))
    outcome = promote_best(study, trial, finish, Path(decision.path), compiled_by=compiled_by, gpu_count=gpu_count)
    decision.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
