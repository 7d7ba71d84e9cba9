"""The validation stage as a Kubeflow component."""

from kfp import dsl


@dsl.component(base_image="python", install_kfp_package=False)
def validate(config: str, report: dsl.Output[dsl.Artifact]):
    """Check that the environment is fit to train on, before a GPU is spent.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        report: The ValidationReport as JSON, one entry a check.
    """
    from pathlib import Path

    from mappo import stages

    report.metadata.update(stages.validate(config, Path(report.path)).metadata)
