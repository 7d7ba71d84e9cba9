"""Where and how the stages of a pipeline run on a cluster, and how they are found there."""

from kfp import dsl, kubernetes

from mappo.metrics import PORT

POD_LABEL = ("app.kubernetes.io/part-of", "mappo")  # of every stage's pod; k8s/ selects by it
PORT_ANNOTATION = "prometheus.io/port"  # of training pods, for Prometheus
MONITORING_CONFIG_MAP = "mappo-monitoring"  # of the namespace; its key pushgateway is a URL


def place(image: str, *tasks: dsl.PipelineTask) -> None:
    """Run stages in an image, and always anew: results depend on its content and the device, not inputs alone.

    Metrics name a run by the ID of the pipeline run, unless it has a name.
    """
    for task in tasks:
        task.set_container_image(image)
        task.set_caching_options(False)
        kubernetes.add_pod_label(task, *POD_LABEL)
        kubernetes.use_field_path_as_env(task, "MAPPO_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
        kubernetes.use_config_map_as_env(
            task, MONITORING_CONFIG_MAP, {"pushgateway": "MAPPO_PUSHGATEWAY"}, optional=True
        )


def place_training(training: dsl.PipelineTask, num_retries: int) -> None:
    """Let Prometheus watch a training stage, and try it again: pods are evicted, nodes die.

    It then goes on from its last checkpoint. Without retries, which is on this machine, it is left as it is.
    """
    if num_retries:
        training.set_retry(num_retries, backoff_duration="30s", backoff_factor=2.0, backoff_max_duration="600s")
        training.set_env_variable("MAPPO_METRICS_PORT", str(PORT))
        kubernetes.add_pod_annotation(training, PORT_ANNOTATION, str(PORT))
