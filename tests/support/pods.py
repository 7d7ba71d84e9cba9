"""The pods of a compiled pipeline's stages, as far as they can be made without Kubeflow's driver."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

WRITABLE = ("/tmp", "/s3", "/minio", "/gcs")


def stage_pod(
    compiled: Path, stage: str, image: str, arguments: Mapping[str, Any], *, root: str, secret: Mapping[str, str]
) -> dict[str, Any]:
    """A pod for one stage of a compiled pipeline, run with these arguments, its artifacts below a root.

    Under the restricted Pod Security Standard, with a root file system that cannot be written. Its /dev/shm is
    podman's own: a volume there would belong to root.
    """
    spec, platform = yaml.safe_load_all(compiled.read_text())
    container = spec["deploymentSpec"]["executors"][f"exec-{stage}"]["container"]
    placed = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{stage}"]
    defaults = _parameters(spec)
    component = spec["components"][f"comp-{stage}"]
    given = _inputs(component, arguments)
    executor_input = json.dumps({"inputs": given, "outputs": _outputs(component, root)})
    resources = _resources(container["resources"], defaults)
    secrets = [
        {"name": each["envVar"], "value": secret[each["secretKey"]]}
        for source in placed["secretAsEnv"]
        for each in source["keyToEnv"]
        if each["secretKey"] in secret
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"mappo-{stage}", **placed["podMetadata"]},
        "spec": {
            "restartPolicy": "Never",
            "hostNetwork": True,  # for servers on this machine; not on a cluster
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "Never",
                    "command": [each.lstrip("\n") for each in container["command"]],  # podman cannot read it else
                    "args": [each.replace("{{$}}", executor_input) for each in container["args"]],
                    "env": [*container.get("env", []), *secrets],
                    "resources": {"requests": resources, "limits": resources},
                    "securityContext": {
                        "readOnlyRootFilesystem": True,
                        "allowPrivilegeEscalation": False,
                        "capabilities": {"drop": ["ALL"]},
                    },
                    "volumeMounts": [{"name": path.strip("/"), "mountPath": path} for path in WRITABLE],
                }
            ],
            "volumes": [{"name": path.strip("/"), "emptyDir": {}} for path in WRITABLE],
        },
    }


def _parameters(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The pipeline's parameters by their defaults."""
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    return {name: each.get("defaultValue") for name, each in parameters.items()}


def _resources(declared: Mapping[str, str], parameters: Mapping[str, Any]) -> dict[str, str]:
    def value(text: str) -> str:
        name = text.removeprefix("{{$.inputs.parameters['pipelinechannel--").removesuffix("']}}")
        return str(parameters[name])

    return {"cpu": value(declared["resourceCpuLimit"]), "memory": value(declared["resourceMemoryLimit"])}


def _inputs(component: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = component["inputDefinitions"]["parameters"]
    values = {name: arguments.get(name, each.get("defaultValue")) for name, each in parameters.items()}
    return {
        "parameterValues": {name: value for name, value in values.items() if value is not None},
        "artifacts": {},
    }


def _outputs(component: Mapping[str, Any], root: str) -> dict[str, Any]:
    definitions = component["outputDefinitions"]
    artifacts = {
        name: {
            "artifacts": [{"name": name, "type": each["artifactType"], "uri": f"{root}/{name}", "metadata": {}}]
        }
        for name, each in definitions.get("artifacts", {}).items()
    }
    parameters = {name: {"outputFile": f"/tmp/kfp/outputs/{name}"} for name in definitions.get("parameters", {})}
    return {"artifacts": artifacts, "parameters": parameters, "outputFile": "/tmp/kfp/outputs/executor.json"}


def kubeflow_pod(placed: Mapping[str, Any]) -> dict[str, Any]:
    """The specification of a stage's pod as Kubeflow 2.17 and Argo make it, as far as Pod Security looks at it.

    `placed` is what the compiled pipeline says of the stage for Kubernetes. After kubeflow/pipelines
    backend/src/v2/compiler/argocompiler/security_context.go and the executor's securityContext in the
    workflow-controller-configmap of its manifests: all of Argo's and Kubeflow's own containers are restricted;
    that of the user is, but for runAsNonRoot, which is the pipeline's to say.
    """
    strict = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    argo = {"securityContext": {**strict, "runAsNonRoot": True, "runAsUser": 65532}}
    chosen = placed.get("securityContext", {})
    own = {name: int(value) if name in ("runAsUser", "runAsGroup") else value for name, value in chosen.items()}
    volumes = [
        "var-run-argo",
        "tmp-dir-argo",
        "kfp-launcher",
        "s3-scratch",
        "dot-local",
        "dot-cache",
        "dot-config",
    ]
    mounts = [each["volumeName"] for each in placed.get("emptyDirMounts", [])]
    return {
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "initContainers": [
            {"name": "init", **argo},
            {"name": "kfp-launcher", "securityContext": {**strict, "runAsNonRoot": True}},
        ],
        "containers": [{"name": "wait", **argo}, {"name": "main", "securityContext": strict | own}],
        "volumes": [
            *({"name": name, "emptyDir": {}} for name in [*volumes, *mounts]),
            {"name": "mlpipeline-minio-artifact", "secret": {"secretName": "mlpipeline-minio-artifact"}},
        ],
    }
