"""The pods of a compiled pipeline's stages, made without Kubeflow's driver."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

WRITABLE = ("/tmp", "/s3", "/minio", "/gcs")


def stage_pod(
    compiled: Path, stage: str, image: str, arguments: Mapping[str, Any], *, root: str, secret: Mapping[str, str]
) -> dict[str, Any]:
    """Return a pod that runs one stage of a compiled pipeline.

    arguments: parameters of the stage, instead of their defaults. root: folder of the artifacts. secret: values of
    the secrets' keys.

    The pod keeps the restricted Pod Security Standard, and its root file system is read-only. It has no volume for
    /dev/shm and uses podman's own, since a volume there would belong to root.
    """
    spec, platform = yaml.safe_load_all(compiled.read_text())
    container = spec["deploymentSpec"]["executors"][f"exec-{stage}"]["container"]
    executor = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][f"exec-{stage}"]
    defaults = _parameters(spec)
    component = spec["components"][f"comp-{stage}"]
    inputs = _inputs(component, arguments)
    executor_input = json.dumps({"inputs": inputs, "outputs": _outputs(component, root)})
    resources = _resources(container["resources"], defaults)
    secrets = [
        {"name": pair["envVar"], "value": secret[pair["secretKey"]]}
        for source in executor["secretAsEnv"]
        for pair in source["keyToEnv"]
        if pair["secretKey"] in secret
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"mappo-{stage}", **executor["podMetadata"]},
        "spec": {
            "restartPolicy": "Never",
            "hostNetwork": True,  # reaches servers on this machine; pods on a cluster do without
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "imagePullPolicy": "Never",
                    "command": [word.lstrip("\n") for word in container["command"]],  # podman cannot read the rest
                    "args": [word.replace("{{$}}", executor_input) for word in container["args"]],
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
    """Return the defaults of the pipeline's parameters by name."""
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    return {name: parameter.get("defaultValue") for name, parameter in parameters.items()}


def _resources(declared: Mapping[str, str], parameters: Mapping[str, Any]) -> dict[str, str]:
    def value(text: str) -> str:
        name = text.removeprefix("{{$.inputs.parameters['pipelinechannel--").removesuffix("']}}")
        return str(parameters[name])

    return {"cpu": value(declared["resourceCpuLimit"]), "memory": value(declared["resourceMemoryLimit"])}


def _inputs(component: Mapping[str, Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = component["inputDefinitions"]["parameters"]
    values = {name: arguments.get(name, parameter.get("defaultValue")) for name, parameter in parameters.items()}
    return {
        "parameterValues": {name: value for name, value in values.items() if value is not None},
        "artifacts": {},
    }


def _outputs(component: Mapping[str, Any], root: str) -> dict[str, Any]:
    definitions = component["outputDefinitions"]
    artifacts = {
        name: {
            "artifacts": [
                {"name": name, "type": artifact["artifactType"], "uri": f"{root}/{name}", "metadata": {}}
            ]
        }
        for name, artifact in definitions.get("artifacts", {}).items()
    }
    parameters = {name: {"outputFile": f"/tmp/kfp/outputs/{name}"} for name in definitions.get("parameters", {})}
    return {"artifacts": artifacts, "parameters": parameters, "outputFile": "/tmp/kfp/outputs/executor.json"}


def kubeflow_pod(executor: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a stage's pod that Pod Security checks, as Kubeflow 2.17 and Argo make them.

    executor: the stage's settings for Kubernetes in the compiled pipeline.

    Sources: kubeflow/pipelines backend/src/v2/compiler/argocompiler/security_context.go, and the executor's
    securityContext in the workflow-controller-configmap of its manifests. Argo's and Kubeflow's own containers are
    restricted. The user's container is restricted too, except for runAsNonRoot, which the pipeline must set.
    """
    strict = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    argo = {"securityContext": {**strict, "runAsNonRoot": True, "runAsUser": 65532}}
    declared = executor.get("securityContext", {})
    user = {name: int(value) if name in ("runAsUser", "runAsGroup") else value for name, value in declared.items()}
    volumes = [
        "var-run-argo",
        "tmp-dir-argo",
        "kfp-launcher",
        "s3-scratch",
        "dot-local",
        "dot-cache",
        "dot-config",
    ]
    mounts = [mount["volumeName"] for mount in executor.get("emptyDirMounts", [])]
    return {
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "initContainers": [
            {"name": "init", **argo},
            {"name": "kfp-launcher", "securityContext": {**strict, "runAsNonRoot": True}},
        ],
        "containers": [{"name": "wait", **argo}, {"name": "main", "securityContext": strict | user}],
        "volumes": [
            *({"name": name, "emptyDir": {}} for name in [*volumes, *mounts]),
            {"name": "mlpipeline-minio-artifact", "secret": {"secretName": "mlpipeline-minio-artifact"}},
        ],
    }
