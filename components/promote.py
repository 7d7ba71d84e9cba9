"""The promotion stage as a Kubeflow component."""

from kfp import dsl


@dsl.component(base_image="python", install_kfp_package=False)
def promote(
    config: str,
    checkpoint: dsl.Input[dsl.Model],
    champions: str,
    decision: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    margin: float = 0.0,
    confidence: float = 0.95,
    num_seeds: int = 10,
    episodes_per_seed: int = 20,
    seed: str = "",
    run: str = "",
    compiled_by: str = "",
):
    """Put a trained policy in the place of its task's champion, if it is better.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        checkpoint: The candidate, which must be fixed before: of several seeds, not the one that looks best.
        champions: Where champions are kept, as s3://bucket/prefix.
        decision: The gate's Decision as JSON: seeds, every return, the bound, what became of it.
        metrics: Whether it was promoted, mean returns, the difference and its lower bound.
        margin: How much more return an episode the candidate must earn.
        confidence: How sure that must be, between 0.5 and 1.
        num_seeds: How many gate seeds are drawn afresh.
        episodes_per_seed: Episodes of each policy for each of them.
        seed: The seed of training, in place of the configuration's; empty to keep that.
        run: What metrics call the run; empty for the ID of the pipeline's run.
        compiled_by: The version of mappo that compiled the pipeline; the stage says if it is not the image's.
    """
    from pathlib import Path

    from mappo import stages

    gate = {"margin": margin, "confidence": confidence}
    gate |= {"num_seeds": num_seeds, "episodes_per_seed": episodes_per_seed}
    paths = (Path(checkpoint.path), champions, Path(decision.path))
    outcome = stages.promote(config, *paths, gate=gate, name=run, seed=seed, compiled_by=compiled_by)
    decision.metadata.update(outcome.metadata)
    for name, value in outcome.metrics.items():
        metrics.log_metric(name, value)
