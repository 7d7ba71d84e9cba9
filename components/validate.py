"""The validation stage as a Kubeflow component."""

from kfp import dsl


@dsl.component(base_image="python", install_kfp_package=False)
def validate(config: str, report: dsl.Output[dsl.Artifact], run: str = "", compiled_by: str = ""):
    """Check that the environment is fit to train on, before a GPU is spent.

    Args:
        config: The experiment's configuration as JSON, as `mappo show-config` prints it.
        report: The ValidationReport as JSON, one entry a check.
        run: What metrics call the run; empty for the ID of the pipeline's run.
        compiled_by: The version of mappo that compiled the pipeline; the stage says if it is not the image's.
    """
    from pathlib import Path

    from mappo import stages

    outcome = stages.validate(config, Path(report.path), name=run, compiled_by=compiled_by)
    report.metadata.update(outcome.metadata)
