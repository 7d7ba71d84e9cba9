"""Place the stages of a pipeline on a cluster, and label them so that they are found there.

What a run can change is a parameter of the pipeline, with the site's choice as its default; Kubeflow fixes the
rest (labels, annotations, time-outs, retries, /dev/shm, the user) when it compiles.
"""

import inspect
from collections.abc import Callable
from typing import Any, Dict, List  # noqa: UP035  (Kubeflow's compiler knows this spelling)

from kfp import dsl, kubernetes

from mappo.monitoring.metrics import PORT
from mappo.runs.s3_access import KUBEFLOW_SECRET
from mappo.strict_json import to_dict
from mappo.tuning.database_url import URL_VARIABLE
from pipelines.site import Site, StagePod

POD_LABEL = ("app.kubernetes.io/part-of", "mappo")  # of every stage's pod; k8s/ selects by it
PORT_ANNOTATION = "prometheus.io/port"  # of training pods, for Prometheus
MONITORING_CONFIG_MAP = "mappo-monitoring"  # of the namespace; its keys are pushgateway (a URL) and linger_seconds
S3_KEYS = (  # of the secret, each as the environment variable of that name, if it is there
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_ENDPOINT_URL",
    "AWS_DEFAULT_REGION",
)
LAUNCHER_CONFIG_MAP = "kfp-launcher"  # says where Kubeflow keeps artifacts; its providers have endpoints
_KUBEFLOW_KEYS = {"accesskey": "MAPPO_KUBEFLOW_ACCESS_KEY", "secretkey": "MAPPO_KUBEFLOW_SECRET_KEY"}
_LAUNCHER_KEYS = {"providers": "MAPPO_KUBEFLOW_PROVIDERS"}
STAGES = ("validate", "train", "evaluate", "compare", "prepare", "tune", "choose", "promote", "report")
GPU_STAGES = ("train", "evaluate", "tune", "promote")
TRAINING_STAGES = ("train", "tune")
DATABASE_STAGES = ("prepare", "tune", "choose", "promote", "report")
SHM_PATH = "/dev/shm"  # noqa: S108  (a memory disk of each pod)
DATABASE_KEY = "url"  # of the database's secret

_FOR_EVER = "31536000s"  # Argo tries nothing again, and ends what it tries, so long after the first attempt began

GENERAL_PARAMETERS: dict[str, tuple[type, str]] = {
    "image": (str, "The container image of every stage, with a tag or digest."),
    "image_pull_secret": (str, "The secret for the image's registry; it need not exist."),
    "s3_secret": (str, f"The secret with {', '.join(S3_KEYS)}, as far as it has them; it need not exist."),
    "database_secret": (str, f"The secret with the URL of the database of studies under the key {DATABASE_KEY}."),
}
_STAGE: dict[str, tuple[Any, str]] = {
    "cpu": (str, "CPU cores of {stage}'s pod, as 4 or 500m."),
    "memory": (str, "Memory of {stage}'s pod, as 8Gi."),
    "gpu_type": (str, "Resource name of {stage}'s GPU, as nvidia.com/gpu."),
    "gpu_count": (str, "GPUs of {stage}'s pod, as text; 0 to run on the CPU."),
    "node_selector": (Dict[str, str], "Labels that {stage}'s node must have, as a JSON object."),  # noqa: UP006
    "tolerations": (List[Dict[str, Any]], "Taints that {stage}'s pod tolerates, as a JSON list of tolerations."),  # noqa: UP006
    "node_affinity": (dict, "Node affinity of {stage}'s pod, as Kubernetes' JSON object; {{}} for none."),
}


class Placement:
    """Places the tasks of one pipeline by the parameters of a run and by what its site fixed."""

    def __init__(self, site: Site | None, parameters: dict[str, Any]):
        self._site, self._parameters = site, parameters

    def parameters(self, *stages: str) -> dict[str, Any]:
        """Return what an inner pipeline of these stages needs."""
        return {name: self._parameters[name] for name in _described(stages)}

    @property
    def scheduled_at(self) -> str:
        """The input by which a stage knows the time of its run, which Kubeflow's driver fills in; none here."""
        return dsl.PIPELINE_JOB_SCHEDULE_TIME_UTC_PLACEHOLDER if self._site else ""

    def gpus(self, stage: str) -> dict[str, Any]:
        """The input by which a stage knows that a GPU was asked for; on this machine, nobody asks."""
        return {"gpu_count": self._parameters[f"{stage}_gpu_count"]} if self._site else {}

    def place(self, task: dsl.PipelineTask, stage: str) -> None:
        """Run a stage's task as the site and the run say; on this machine, which is no site, just run it.

        It always runs anew: results depend on the image's content and the device, not on inputs alone.
        """
        task.set_caching_options(False)
        if self._site is not None:
            fixed: StagePod = getattr(self._site.stages, stage)
            _fix(task, self._site, fixed)
            _find(task, is_training=stage in TRAINING_STAGES)
            self._give(task, stage)

    def _give(self, task: dsl.PipelineTask, stage: str) -> None:
        """Give a task what a run can change."""
        of_stage = {name: self._parameters[f"{stage}_{name}"] for name in _stage_fields(stage)}
        task.set_container_image(self._parameters["image"])
        task.set_cpu_request(of_stage["cpu"]).set_cpu_limit(of_stage["cpu"])
        task.set_memory_request(of_stage["memory"]).set_memory_limit(of_stage["memory"])
        if stage in GPU_STAGES:
            task.set_accelerator_type(of_stage["gpu_type"]).set_accelerator_limit(of_stage["gpu_count"])
        task.register_pipeline_channels(list(of_stage.values()))  # resources alone do not reach into a loop
        kubernetes.add_node_selector_json(task, of_stage["node_selector"])
        kubernetes.add_toleration_json(task, of_stage["tolerations"])
        kubernetes.add_node_affinity_json(task, of_stage["node_affinity"])
        kubernetes.set_image_pull_secrets(task, [self._parameters["image_pull_secret"]])
        secret = self._parameters["s3_secret"]
        kubernetes.use_secret_as_env(task, secret, {key: key for key in S3_KEYS}, optional=True)
        kubernetes.use_secret_as_env(task, KUBEFLOW_SECRET, _KUBEFLOW_KEYS, optional=True)
        kubernetes.use_config_map_as_env(task, LAUNCHER_CONFIG_MAP, _LAUNCHER_KEYS, optional=True)
        if stage in DATABASE_STAGES:  # without it, the stage says what is missing; a pod would wait for ever
            secret = self._parameters["database_secret"]
            kubernetes.use_secret_as_env(task, secret, {DATABASE_KEY: URL_VARIABLE}, optional=True)


def with_placement(site: Site | None, *stages: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a pipeline's function the parameters that place these stages, after its own.

    The function takes a `Placement` made of them as its first argument. Without a site, which is on this machine,
    the parameters are there and unused.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = list(inspect.signature(function).parameters.values())[1:]
        described = _described(stages)
        defaults = _defaults(site or Site(), stages)

        def placed(*values: Any) -> Any:
            names = [parameter.name for parameter in own] + list(described)
            given = dict(zip(names, values, strict=True))
            placement = Placement(site, {name: given.pop(name) for name in described})
            return function(placement, **given)

        added = [
            inspect.Parameter(
                name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=defaults[name], annotation=annotation
            )
            for name, (annotation, _) in described.items()
        ]
        signature = inspect.signature(function)
        placed.__name__ = function.__name__
        placed.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        placed.__doc__ = _documentation(function, described)
        return placed

    return decorate


def _stage_fields(stage: str) -> list[str]:
    return [name for name in _STAGE if stage in GPU_STAGES or not name.startswith("gpu_")]


def _described(stages: tuple[str, ...]) -> dict[str, tuple[Any, str]]:
    """Return type and description of each parameter, by name."""
    of_stages = {
        f"{stage}_{name}": (_STAGE[name][0], _STAGE[name][1].format(stage=stage))
        for stage in stages
        for name in _stage_fields(stage)
    }
    general = dict(GENERAL_PARAMETERS)
    if not set(stages) & set(DATABASE_STAGES):
        del general["database_secret"]
    return {**general, **of_stages}


def _defaults(site: Site, stages: tuple[str, ...]) -> dict[str, Any]:
    values = to_dict(site)
    of_stages = {
        f"{stage}_{name}": str(value) if name == "gpu_count" else value
        for stage in stages
        for name, value in values["stages"][stage].items()
    }
    return {**values, "image": site.image or "", **of_stages}


def _documentation(function: Callable[..., Any], described: dict[str, tuple[Any, str]]) -> str:
    text = inspect.getdoc(function) or ""
    lines = [f"    {name}: {description}" for name, (_, description) in described.items()]
    return "\n".join([text, *([] if "Args:" in text else ["", "Args:"]), *lines])


def _fix(task: dsl.PipelineTask, site: Site, stage: StagePod) -> None:
    """Give a task what Kubeflow fixes when it compiles."""
    if stage.retries:
        task.set_retry(
            stage.retries,
            backoff_duration=f"{stage.backoff_seconds}s",
            backoff_factor=float(stage.backoff_factor),
            backoff_max_duration=_FOR_EVER,
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
    user = (site.run_as_user, site.run_as_group, site.run_as_non_root)
    if any(choice is not None for choice in user):
        kubernetes.set_security_context(task, *user)


def _find(task: dsl.PipelineTask, is_training: bool) -> None:
    """Label a task so that monitoring finds its pod; metrics name an unnamed run by its pipeline run's ID."""
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
