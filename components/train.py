"""The training stage as a Kubeflow component."""

from kfp import dsl


@dsl.component(base_image="python", install_kfp_package=False)
def train(
    config: str,
    last: dsl.Output[dsl.Model],
    best: dsl.Output[dsl.Model],
    history: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    seed: str = "",
    compiled_by: str = "",
):
    """Train decentralised policies with a centralised critic by MAPPO.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        last: The checkpoint at the end: a directory with safetensors and a JSON manifest.
        best: The checkpoint with the best evaluation during training; the last, where there was none.
        history: One CSV row an iteration: frames, returns, losses, seconds by phase.
        metrics: The last iteration's numbers.
        seed: The seed of training, in place of the configuration's; empty to keep that.
        compiled_by: The version of mappo that compiled the pipeline; the stage says if it is not the image's.
    """
    from pathlib import Path

    from mappo import stages

    paths = (Path(last.path), Path(best.path), Path(history.path))
    outcome = stages.train(config, *paths, seed=seed, compiled_by=compiled_by)
    for artifact in (last, best, history):
        artifact.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
