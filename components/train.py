"""The training stage as a Kubeflow component."""

from kfp import dsl


@dsl.component(base_image="python", install_kfp_package=False)
def train(
    config: str,
    checkpoint: dsl.Output[dsl.Model],
    history: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
):
    """Train a shared policy with a centralised critic by MAPPO.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        checkpoint: The trained networks: a directory with safetensors and a JSON manifest.
        history: One CSV row an iteration: frames, returns, losses, seconds by phase.
        metrics: The last iteration's numbers.
    """
    from pathlib import Path

    from mappo import stages

    outcome = stages.train(config, Path(checkpoint.path), Path(history.path))
    for artifact in (checkpoint, history):
        artifact.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
