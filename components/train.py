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
    """Train decentralised policies with a centralised critic by MAPPO.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        best: The checkpoint with the best evaluation during training; the last, where there was none.
        checkpoints: Where training saves after every iteration and goes on from when the step is tried again.
        history: One CSV row an iteration: frames, returns, losses, seconds by phase.
        metrics: The last iteration's numbers.
        seed: The seed of training, in place of the configuration's; empty to keep that.
        store: Where runs are kept, as s3://bucket/prefix; empty to keep this one at the URI of checkpoints.
        run: The run's name in the store; training under a name that was begun before goes on with it.
        scheduled_at: The time for [[ScheduledTime]] in run and store: the schedule's, or the run's creation.
        gpu_count: How many GPUs the pod asked for, as text; if any, the stage computes on one or fails at once.
        compiled_by: The version of mappo that compiled the pipeline; the stage says if it is not the image's.
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
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
