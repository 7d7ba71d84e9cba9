"""The training stage as a Kubeflow component."""

from kfp import dsl

from components import component


@component
def train(
    config: str,
    best: dsl.Output[dsl.Model],
    checkpoints: dsl.Output[dsl.Artifact],
    history: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    seed: str = "",
    store: str = "",
    run: str = "",
    scheduled_at: str = "",
    gpu_count: str = "0",
    compiled_by: str = "",
):
    """Train decentralised policies by MAPPO, or by IPPO if each agent has its own critic.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        best: The checkpoint with the best evaluation during training; without evaluations, the last checkpoint.
        checkpoints: The checkpoints, saved after every iteration; a retry of the step resumes from the last.
        history: The history as CSV, a row for each iteration: frames, returns, losses, seconds by phase.
        metrics: The numbers of the last iteration.
        seed: The seed of training; empty for the configuration's.
        store: The store of runs, as s3://bucket/prefix; empty to keep this run at the URI of checkpoints.
        run: The run's name in the store; an existing run is resumed.
        scheduled_at: The time that replaces [[ScheduledTime]] in run and store.
        gpu_count: The number of GPUs of the pod, as text; if not 0, the stage uses one or fails at once.
        compiled_by: The version of mappo that compiled the pipeline; the stage warns if the image has another.
    """
    from pathlib import Path

    from components.placeholders import fill
    from mappo.runs.locations import run_location
    from mappo.stages.train import train

    run, store = fill(run, scheduled_at), fill(store, scheduled_at)
    location = run_location(store, run, checkpoints.uri, seed)
    paths = (Path(history.path), Path(best.path))
    outcome = train(config, location, *paths, name=run, seed=seed, compiled_by=compiled_by, gpu_count=gpu_count)
    for artifact in (best, checkpoints, history):
        artifact.metadata.update(outcome.metadata)
    checkpoints.metadata.update(config=config, location=location)
    best.metadata.update(location=location)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
