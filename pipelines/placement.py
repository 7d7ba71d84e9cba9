"""Where and how the stages of a pipeline run on a cluster."""

from kfp import dsl


def place(image: str, *tasks: dsl.PipelineTask) -> None:
    """Run stages in an image, and always anew: results depend on its content and the device, not inputs alone."""
    for task in tasks:
        task.set_container_image(image)
        task.set_caching_options(False)
