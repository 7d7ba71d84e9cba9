"""Where and how the stages of a pipeline run on a cluster."""

from kfp import dsl


def place(image: str, *tasks: dsl.PipelineTask) -> None:
    """Run stages in an image, and always anew: results depend on its content and the device, not inputs alone."""
    for task in tasks:
        task.set_container_image(image)
        task.set_caching_options(False)


def retry(training: dsl.PipelineTask, num_retries: int) -> None:
    """Try a training stage again, which goes on from its last checkpoint: pods are evicted, nodes die."""
    if num_retries:
        training.set_retry(num_retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
