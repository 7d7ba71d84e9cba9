"""A worker of a study as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def tune(
    study: str,
    worker: str,
    config: str,
    metrics: dsl.Output[dsl.Metrics],
    gpu_count: str = "0",
    compiled_by: str = "",
):
    """Work on the trials of a study until none is left, beside the other workers.

    Args:
        study: The name of a prepared study.
        worker: The name of this worker.
        config: The configuration that the user submitted, which names the only scenario that may run here.
        metrics: The study when this worker ended: trials by outcome, the best value.
        gpu_count: The number of GPUs of the pod, as text; if not 0, the stage uses one or fails at once.
        compiled_by: The version of mappo that compiled the pipeline; the stage warns if the image has another.
    """
    from mappo.config import from_json
    from mappo.stages.tune import work_on_study

    scenario = from_json(config).environment.scenario
    outcome = work_on_study(study, scenario, compiled_by=compiled_by, gpu_count=gpu_count)
    metrics.metadata.update(outcome.metadata, worker=worker)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
