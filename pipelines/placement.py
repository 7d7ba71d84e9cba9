"""Give the stages of a pipeline their image, resources, nodes and secrets, and label their pods for monitoring.

A setting that a run can change is a parameter of the pipeline; the site's value is its default. The other settings
(labels, annotations, time-outs, retries, /dev/shm, the user) are fixed when the pipeline is compiled.
"""

import inspect
from collections.abc import Callable
from typing import Any, Dict, List  # noqa: UP035  (Kubeflow's compiler knows this spelling)

from kfp import dsl, kubernetes

from mappo.monitoring.metrics import PORT
from mappo.runs.s3_access import KUBEFLOW_SECRET
from mappo.strict_json import to_dict
from mappo.tuning.database_url import URL_VARIABLE
from pipelines import exit_message
from pipelines.site import Site, StagePod

POD_LABEL = ("app.kubernetes.io/part-of", "mappo")  # the label of every stage's pod; selectors in k8s/ use it
PORT_ANNOTATION = "prometheus.io/port"  # the annotation of training pods that tells Prometheus the port
MONITORING_CONFIG_MAP = "mappo-monitoring"  # one per namespace; keys: pushgateway (a URL), linger_seconds
S3_KEYS = (  # keys of the S3 secret, all optional; each becomes the environment variable of that name
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)
LAUNCHER_CONFIG_MAP = "kfp-launcher"  # configures Kubeflow's artifact stores; its key providers holds endpoints
_KUBEFLOW_KEYS = {"accesskey": "MAPPO_KUBEFLOW_ACCESS_KEY", "secretkey": "MAPPO_KUBEFLOW_SECRET_KEY"}
_LAUNCHER_KEYS = {"providers": "MAPPO_KUBEFLOW_PROVIDERS"}
STAGES = (
    *("validate", "train", "evaluate", "compare"),
    *("prepare", "tune", "choose", "promote", "report"),
    *("cell", "summarise", "notify"),
)
GPU_STAGES = ("train", "evaluate", "tune", "promote", "cell")
TRAINING_STAGES = ("train", "tune", "cell")
DATABASE_STAGES = ("prepare", "tune", "choose", "promote", "report")
SHM_PATH = "/dev/shm"  # noqa: S108  (a file system in the memory of each pod)
DATABASE_KEY = "url"  # the key of the database secret that holds the URL

# Argo starts no retry later than this after the first attempt began, and ends an attempt that still runs then. One
# year is longer than any run.
_NO_LIMIT = "31536000s"

GENERAL_PARAMETERS: dict[str, tuple[type, str]] = {
    "image": (str, "The container image of every stage, with a tag or digest."),
    "image_pull_secret": (str, "Name of the secret for the image's registry; the secret need not exist."),
    "s3_secret": (str, f"Name of the secret with any of {', '.join(S3_KEYS)}; the secret need not exist."),
    "database_secret": (
        str,
        f"Name of the secret with the URL of the studies' database, in the key {DATABASE_KEY}.",
    ),
}
_STAGE: dict[str, tuple[Any, str]] = {
    "cpu": (str, "CPU cores of {stage}'s pod, such as 4 or 500m."),
    "memory": (str, "Memory of {stage}'s pod, such as 8Gi."),
    "gpu_type": (str, "Resource name of {stage}'s GPU, such as nvidia.com/gpu."),
    "gpu_count": (str, "Number of GPUs of {stage}'s pod, as text; 0 to run on the CPU."),
    "node_selector": (Dict[str, str], "Labels that {stage}'s node must have, as a JSON object."),  # noqa: UP006
    "tolerations": (List[Dict[str, Any]], "Taints that {stage}'s pod tolerates, as a JSON list of tolerations."),  # noqa: UP006
    "node_affinity": (
        dict,
        "Node affinity of {stage}'s pod, as a JSON object in Kubernetes' format; {{}} for none.",
    ),
}


class Placement:
    """The placement of one pipeline's tasks: the parameters of a run, and the fixed settings of its site.

    `site` is None on this machine. `parameters` are the pipeline's placement parameters, by name.
    """

    def __init__(self, site: Site | None, parameters: dict[str, Any]):
        self._site, self._parameters = site, parameters

    def parameters(self, *stages: str) -> dict[str, Any]:
        """Return the placement parameters of these stages, to pass to an inner pipeline."""
        return {name: self._parameters[name] for name in _definitions(stages)}

    @property
    def scheduled_at(self) -> str:
        """The stage input for the time of the run, which Kubeflow's driver fills in; empty on this machine."""
        return dsl.PIPELINE_JOB_SCHEDULE_TIME_UTC_PLACEHOLDER if self._site else ""

    def gpus(self, stage: str) -> dict[str, Any]:
        """Return the stage input that tells how many GPUs the pod requests; empty on this machine."""
        return {"gpu_count": self._parameters[f"{stage}_gpu_count"]} if self._site else {}

    def apply(self, task: dsl.PipelineTask, stage: str) -> None:
        """Apply the settings of the site and the run to a stage's task; on this machine, there are none.

        Caching is off everywhere: results depend on the image's content and the device, not on inputs alone.
        """
        task.set_caching_options(False)
        if self._site is not None:
            fixed: StagePod = getattr(self._site.stages, stage)
            _apply_site(task, self._site, fixed)
            _add_monitoring(task, is_training=stage in TRAINING_STAGES)
            self._apply_parameters(task, stage)

    def _apply_parameters(self, task: dsl.PipelineTask, stage: str) -> None:
        """Apply the settings that a run can change."""
        values = {name: self._parameters[f"{stage}_{name}"] for name in _stage_fields(stage)}
        task.set_container_image(self._parameters["image"])
        task.set_cpu_request(values["cpu"]).set_cpu_limit(values["cpu"])
        task.set_memory_request(values["memory"]).set_memory_limit(values["memory"])
        if stage in GPU_STAGES:
            task.set_accelerator_type(values["gpu_type"]).set_accelerator_limit(values["gpu_count"])
        task.register_pipeline_channels(list(values.values()))  # kfp passes them into a loop only if registered
        kubernetes.add_node_selector_json(task, values["node_selector"])
        kubernetes.add_toleration_json(task, values["tolerations"])
        kubernetes.add_node_affinity_json(task, values["node_affinity"])
        kubernetes.set_image_pull_secrets(task, [self._parameters["image_pull_secret"]])
        secret = self._parameters["s3_secret"]
        kubernetes.use_secret_as_env(task, secret, {key: key for key in S3_KEYS}, optional=True)
        kubernetes.use_secret_as_env(task, KUBEFLOW_SECRET, _KUBEFLOW_KEYS, optional=True)
        kubernetes.use_config_map_as_env(task, LAUNCHER_CONFIG_MAP, _LAUNCHER_KEYS, optional=True)
        if stage in DATABASE_STAGES:
            # Optional: a missing secret then fails the stage with a clear error. Else the pod would wait for ever.
            secret = self._parameters["database_secret"]
            kubernetes.use_secret_as_env(task, secret, {DATABASE_KEY: URL_VARIABLE}, optional=True)


def with_placement(
    site: Site | None, *stages: str, ends_as: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator that adds the placement parameters of these stages to a pipeline's function.

    The function must take a `Placement` as its first parameter. The decorated function has the function's other
    parameters, then the placement parameters, from which it makes that `Placement`. Without a site (on this
    machine), the parameters exist and are not used. `ends_as` is the name of a pipeline whose runs send a message
    when they end, if the site has a webhook; it is empty for an inner pipeline.
    """
    notifying_site = site if site and site.notify_secret and ends_as else None
    stages = (*stages, exit_message.STAGE) if notifying_site else stages

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        function_parameters = list(inspect.signature(function).parameters.values())[1:]
        definitions = _definitions(stages)
        defaults = _defaults(site or Site(), stages)

        def decorated(*values: Any) -> Any:
            names = [parameter.name for parameter in function_parameters] + list(definitions)
            arguments = dict(zip(names, values, strict=True))
            placement = Placement(site, {name: arguments.pop(name) for name in definitions})
            if notifying_site is None:
                return function(placement, **arguments)
            task = exit_message.notify_task(notifying_site, ends_as, arguments, placement.scheduled_at)
            placement.apply(task, exit_message.STAGE)
            with exit_message.exit_handler(task):
                function(placement, **arguments)
            return None  # Kubeflow refuses outputs of tasks that have an exit handler

        placement_parameters = [
            inspect.Parameter(
                name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=defaults[name], annotation=annotation
            )
            for name, (annotation, _) in definitions.items()
        ]
        signature = inspect.signature(function)
        decorated.__name__ = function.__name__
        parameters = [*function_parameters, *placement_parameters]
        returned = inspect.Signature.empty if notifying_site else signature.return_annotation
        decorated.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters, return_annotation=returned
        )
        decorated.__doc__ = _documentation(function, definitions)
        return decorated

    return decorate


def _stage_fields(stage: str) -> list[str]:
    return [name for name in _STAGE if stage in GPU_STAGES or not name.startswith("gpu_")]


def _definitions(stages: tuple[str, ...]) -> dict[str, tuple[Any, str]]:
    """Return type and description of each placement parameter, by name."""
    stage_parameters = {
        f"{stage}_{name}": (_STAGE[name][0], _STAGE[name][1].format(stage=stage))
        for stage in stages
        for name in _stage_fields(stage)
    }
    general = dict(GENERAL_PARAMETERS)
    if not set(stages) & set(DATABASE_STAGES):
        del general["database_secret"]
    return {**general, **stage_parameters}


def _defaults(site: Site, stages: tuple[str, ...]) -> dict[str, Any]:
    values = to_dict(site)
    stage_values = {
        f"{stage}_{name}": str(value) if name == "gpu_count" else value
        for stage in stages
        for name, value in values["stages"][stage].items()
    }
    return {**values, "image": site.image or "", **stage_values}


def _documentation(function: Callable[..., Any], definitions: dict[str, tuple[Any, str]]) -> str:
    text = inspect.getdoc(function) or ""
    lines = [f"    {name}: {description}" for name, (_, description) in definitions.items()]
    return "\n".join([text, *([] if "Args:" in text else ["", "Args:"]), *lines])


def _apply_site(task: dsl.PipelineTask, site: Site, stage: StagePod) -> None:
    """Apply the settings that are fixed when the pipeline is compiled."""
    if stage.retries:
        task.set_retry(
            stage.retries,
            backoff_duration=f"{stage.backoff_seconds}s",
            backoff_factor=float(stage.backoff_factor),
            backoff_max_duration=_NO_LIMIT,
        )
    if stage.timeout_seconds:
        kubernetes.set_timeout(task, stage.timeout_seconds)
    if stage.shm:
        kubernetes.empty_dir_mount(task, "shm", SHM_PATH, medium="Memory", size_limit=stage.shm)
    for key, value in site.pod_labels.items():
        kubernetes.add_pod_label(task, key, value)
    for key, value in site.pod_annotations.items():
        kubernetes.add_pod_annotation(task, key, value)
    if site.minio_endpoint:
        task.set_env_variable("MAPPO_MINIO_ENDPOINT", site.minio_endpoint)
    if site.compiled_code:
        task.set_env_variable("MAPPO_COMPILED", site.compiled_code)
    user = (site.run_as_user, site.run_as_group, site.run_as_non_root)
    if any(setting is not None for setting in user):
        kubernetes.set_security_context(task, *user)


def _add_monitoring(task: dsl.PipelineTask, is_training: bool) -> None:
    """Label a task's pod for monitoring, and pass it the ID of the pipeline's run, which names unnamed runs."""
    kubernetes.add_pod_label(task, *POD_LABEL)
    kubernetes.use_field_path_as_env(task, "MAPPO_PIPELINE_RUN", "metadata.labels['pipeline/runid']")
    kubernetes.use_config_map_as_env(
        task,
        MONITORING_CONFIG_MAP,
        {"pushgateway": "MAPPO_PUSHGATEWAY", "linger_seconds": "MAPPO_LINGER_SECONDS"},
        optional=True,
    )
    if is_training:
        task.set_env_variable("MAPPO_METRICS_PORT", str(PORT))
        kubernetes.add_pod_annotation(task, PORT_ANNOTATION, str(PORT))
