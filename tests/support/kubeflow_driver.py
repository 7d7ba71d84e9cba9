"""A driver as Kubeflow's: it resolves the inputs of a task and writes the patch of the stage's pod for Argo.

The code follows kubeflow/pipelines backend/src/v2/driver and the recorded workflows. The real driver stores an
execution in ML Metadata: the inputs of a task and the locations of its outputs.
"""

import json
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from tests.support.argo_templates import encode

DEFAULT_ROOT = "minio://mlpipeline/v2/artifacts"
Outputs = dict[str, dict[str, Any]]  # "parameters" and "metadata" (of artifacts), both by the names of outputs
Produce = Callable[[str, dict[str, Any]], Outputs]  # makes the outputs of a task from its name and executor input
_IN_TEXT = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
_SESSION = encode(
    {
        "Provider": "minio",
        "Params": {
            "accessKeyKey": "accesskey",
            "disableSSL": "true",
            "endpoint": "seaweedfs.kubeflow:9000",
            "fromEnv": "false",
            "maxRetries": "5",
            "region": "minio",
            "secretKeyKey": "secretkey",
            "secretName": "mlpipeline-minio-artifact",
        },
    },
    sort_keys=False,
)
_LOGS = {"schemaTitle": "system.Artifact"}
_FIELDS = ("inputDefinitions", "outputDefinitions", "executorLabel")
_FIELDS += ("artifactType", "isArtifactList", "parameterType", "defaultValue", "isOptional", "description")
_LAUNCHER = (
    ("--pod_name", "$(KFP_POD_NAME)"),
    ("--pod_uid", "$(KFP_POD_UID)"),
    ("--ml_pipeline_server_address", "ml-pipeline.kubeflow.svc.cluster.local"),
    ("--ml_pipeline_server_port", "8887"),
    ("--mlmd_server_address", "metadata-grpc-service.kubeflow.svc.cluster.local"),
    ("--mlmd_server_port", "8080"),
    ("--publish_logs", "true"),
    ("--publish_logs", "true"),
)


def nothing_produced(task: str, executor_input: dict[str, Any]) -> Outputs:
    """Produce no outputs, so that the driver makes up plausible ones."""
    return {}


@dataclass
class Execution:
    """A task that a driver has prepared. tasks: the tasks of a DAG by name, or the items of a loop by number."""

    id: str
    task: str
    component: Mapping[str, Any]
    values: dict[str, Any]
    artifacts: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, "Execution"] = field(default_factory=dict)
    executor_input: dict[str, Any] = field(default_factory=dict)
    is_loop: bool = False


class Driver:
    """The drivers of one run. placeholders: the texts by which the real driver replaces `{{$.name}}`."""

    def __init__(self, run_id: str, pipeline: str, root: str, placeholders: Mapping[str, str], produce: Produce):
        self.run_id, self.pipeline, self.root = run_id, pipeline, root or DEFAULT_ROOT
        self.placeholders, self.produce = placeholders, produce
        self.executions: dict[str, Execution] = {}
        self._numbers = count(13)
        self._artifacts = count(24)
        self._produced: dict[str, Outputs] = {}

    def dag(self, inputs: Mapping[str, str]) -> dict[str, str]:
        """Act as the driver of a DAG; return its output parameters."""
        component = json.loads(inputs["component"])
        if inputs["driver-type"] == "ROOT_DAG":
            execution = self._new("root", component, json.loads(inputs["runtime-config"])["parameterValues"])
            return _dag_outputs(execution, 0)
        task, parent = json.loads(inputs["task"]), self.executions[inputs["parent-dag-id"]]
        index = int(inputs["iteration-index"])
        if index >= 0:
            name = task["parameterIterator"]["itemInput"]
            values = parent.values | {name: _items(task, parent.values)[index]}
            execution = self._new(inputs["task-name"], component, values, parent.artifacts)
            parent.tasks[str(index)] = execution
            return _dag_outputs(execution, 0)
        values, artifacts = self._inputs(task, component, parent)
        execution = self._new(inputs["task-name"], component, values, artifacts)
        execution.is_loop = "parameterIterator" in task
        parent.tasks[inputs["task-name"]] = execution
        return _dag_outputs(execution, len(_items(task, values)) if execution.is_loop else 0)

    def container(self, inputs: Mapping[str, str]) -> dict[str, str]:
        """Act as the driver of a container; return its output parameters."""
        component, task = json.loads(inputs["component"]), json.loads(inputs["task"])
        parent = self.executions[inputs["parent-dag-id"]]
        values, artifacts = self._inputs(task, component, parent)
        execution = self._new(inputs["task-name"], component, values, artifacts)
        execution.executor_input = self._executor_input(execution)
        parent.tasks[inputs["task-name"]] = execution
        kubernetes = json.loads(inputs["kubernetes-config"] or "{}")
        patch = self._pod(execution, json.loads(inputs["container"]), kubernetes, parent.values)
        return {"pod-spec-patch": encode(patch, sort_keys=False), "cached-decision": "false", "condition": "nil"}

    def _new(self, task: str, component: Any, values: dict[str, Any], artifacts: Any = None) -> Execution:
        number = str(next(self._numbers))
        self.executions[number] = Execution(number, task, component, values, artifacts or {})
        return self.executions[number]

    # --- inputs ---

    def _inputs(self, task: Any, component: Any, parent: Execution) -> tuple[dict[str, Any], dict[str, Any]]:
        inputs = task.get("inputs", {})
        defined = parent.component.get("inputDefinitions", {}).get("parameters", {})
        values = {}
        for name, source in inputs.get("parameters", {}).items():
            value = self._value(source, parent, defined)
            if value is not None:
                values[name] = value
        sources = inputs.get("artifacts", {})
        return values, {name: self._artifact(source, parent) for name, source in sources.items()}

    def _value(self, source: Any, parent: Execution, defined: Any) -> Any:
        if name := source.get("componentInputParameter"):
            return parent.values.get(name, defined.get(name, {}).get("defaultValue"))
        if output := source.get("taskOutputParameter"):
            return self._parameter(parent.tasks[output["producerTask"]], output["outputParameterKey"])
        constant = source["runtimeValue"]["constant"]
        return self.placeholders.get(constant, constant) if isinstance(constant, str) else constant

    def _artifact(self, source: Any, parent: Execution) -> list[dict[str, Any]]:
        if name := source.get("componentInputArtifact"):
            return parent.artifacts.get(name, [])
        output = source["taskOutputArtifact"]
        return self._output_artifacts(parent.tasks[output["producerTask"]], output["outputArtifactKey"])

    def _parameter(self, producer: Execution, key: str) -> Any:
        if producer.is_loop:
            return [self._parameter(item, key) for _, item in sorted(producer.tasks.items())]
        outputs = producer.component.get("dag", {}).get("outputs", {}).get("parameters", {})
        if source := outputs.get(key, {}).get("valueFromParameter"):
            return self._parameter(producer.tasks[source["producerSubtask"]], source["outputParameterKey"])
        produced = self._outputs(producer).get("parameters", {})
        return produced[key] if key in produced else _plausible_value(producer, key)

    def _output_artifacts(self, producer: Execution, key: str) -> list[dict[str, Any]]:
        if producer.is_loop:
            items = sorted(producer.tasks.items(), key=lambda item: int(item[0]))
            return [artifact for _, item in items for artifact in self._output_artifacts(item, key)]
        selectors = producer.component.get("dag", {}).get("outputs", {}).get("artifacts", {})
        if key in selectors:
            (selector,) = selectors[key]["artifactSelectors"]
            subtask = producer.tasks[selector["producerSubtask"]]
            return self._output_artifacts(subtask, selector["outputArtifactKey"])
        (output,) = producer.executor_input["outputs"]["artifacts"][key]["artifacts"]
        metadata = {"display_name": key, "store_session_info": _SESSION}
        metadata |= self._outputs(producer).get("metadata", {}).get(key, {})
        artifact = {"name": str(next(self._artifacts)), "type": {"instanceSchema": ""}}
        return [artifact | {"uri": output["uri"], "metadata": dict(sorted(metadata.items()))}]

    def _outputs(self, producer: Execution) -> Outputs:
        """Return the outputs of a stage; call `produce` once for each execution."""
        if producer.id not in self._produced:
            self._produced[producer.id] = self.produce(producer.task, producer.executor_input)
        return self._produced[producer.id]

    # --- the pod ---

    def _executor_input(self, execution: Execution) -> dict[str, Any]:
        path = f"{self.pipeline}/{self.run_id}/{execution.task}/{uuid.uuid4()}"
        root, _, query = self.root.partition("?")
        folder = f"{root.rstrip('/')}/{path}"
        defined = execution.component.get("outputDefinitions", {})
        types = {name: artifact["artifactType"] for name, artifact in defined.get("artifacts", {}).items()}
        types["executor-logs"] = _LOGS
        artifacts = {
            name: {"artifacts": [{"name": name, "type": kind, "uri": _uri(f"{folder}/{name}", query)}]}
            for name, kind in sorted(types.items())
        }
        parameters = sorted(defined.get("parameters", {}))
        outputs = {
            "parameters": {name: {"outputFile": f"/tmp/kfp/outputs/{name}"} for name in parameters},
            "artifacts": artifacts,
            "outputFile": "/" + folder.replace("://", "/", 1) + "/output_metadata.json",
        }
        inputs = {
            "artifacts": {name: {"artifacts": inputs} for name, inputs in sorted(execution.artifacts.items())},
            "parameterValues": dict(sorted(execution.values.items())),
        }
        sides = {"inputs": inputs, "outputs": outputs}
        return {side: {name: part for name, part in parts.items() if part} for side, parts in sides.items()}

    def _pod(
        self, execution: Execution, container: Any, kubernetes: Any, dag: Mapping[str, Any]
    ) -> dict[str, Any]:
        command = [("--pipeline_name", self.pipeline), ("--run_id", self.run_id), ("--execution_id", execution.id)]
        command += [("--executor_input", encode(execution.executor_input, sort_keys=False))]
        component = encode(_in_order(_with_logs(execution.component)), sort_keys=False)
        command += [("--component_spec", component), *_LAUNCHER]
        main = {
            "name": "main",
            "image": _filled(container["image"], execution.values),
            "command": ["/kfp-launcher/launch", *(word for pair in command for word in pair), "--"],
            "args": [*container.get("command", []), *container.get("args", [])],
            "env": [*container.get("env", []), *_environment(kubernetes, dag)],
            "resources": _resources(container.get("resources", {}), execution.values),
        }
        mounts = kubernetes.get("emptyDirMounts", [])
        if mounts:
            main["volumeMounts"] = [
                {"name": mount["volumeName"], "mountPath": mount["mountPath"]} for mount in mounts
            ]
        main["securityContext"] = {"capabilities": {"drop": ["ALL"]}} | kubernetes.get("securityContext", {})
        placement = _placement(kubernetes, dag)
        volumes = {"volumes": placement.pop("volumes")} if mounts else {}
        return volumes | {"containers": [main]} | placement


def _with_logs(component: Mapping[str, Any]) -> dict[str, Any]:
    """Return a component with the artifact that Kubeflow adds to every component: its log."""
    outputs = component.get("outputDefinitions", {})
    artifacts = outputs.get("artifacts", {}) | {"executor-logs": {"artifactType": _LOGS}}
    return {**component, "outputDefinitions": {**outputs, "artifacts": artifacts}}


def _in_order(value: Any) -> Any:
    """Sort keys into the order in which Kubeflow writes them: fields by their numbers, names alphabetically."""
    if not isinstance(value, dict):
        return value
    keys = sorted(value, key=lambda key: (_FIELDS.index(key) if key in _FIELDS else -1, key))
    return {key: _in_order(value[key]) for key in keys}


def _uri(path: str, query: str) -> str:
    return f"{path}?{query}" if query else path


def _dag_outputs(execution: Execution, iterations: int) -> dict[str, str]:
    return {"execution-id": execution.id, "iteration-count": str(iterations), "condition": "nil"}


def _items(task: Any, values: Mapping[str, Any]) -> list[Any]:
    items = task["parameterIterator"]["items"]
    value = json.loads(items["raw"]) if "raw" in items else values[items["inputParameter"]]
    return json.loads(value) if isinstance(value, str) else value


def _plausible_value(producer: Execution, key: str) -> Any:
    """Return a value of the output's type; a list has one item, so that a loop over it has one iteration."""
    kind = producer.component["outputDefinitions"]["parameters"][key]["parameterType"]
    values = {"LIST": ["1"], "STRUCT": {}, "NUMBER_INTEGER": 1, "NUMBER_DOUBLE": 1.0, "BOOLEAN": True}
    return values.get(kind, f"{key} of {producer.task}")


def _filled(text: str, values: Mapping[str, Any]) -> str:
    return _IN_TEXT.sub(lambda match: str(values[match[1]]), text)


def _resources(declared: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the limits and requests of a container; a GPU has a limit only."""
    sides: dict[str, dict[str, str]] = {"limits": {}, "requests": {}}
    for side in sides:
        for kind in ("cpu", "memory"):
            if text := declared.get(f"resource{kind.title()}{side[:-1].title()}"):
                sides[side][kind] = _filled(text, values)
    if gpu := declared.get("accelerator"):
        sides["limits"][_filled(gpu["resourceType"], values)] = _filled(gpu["resourceCount"], values)
    return {side: amounts for side, amounts in sides.items() if amounts}


def _environment(kubernetes: Mapping[str, Any], dag: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the variables from secrets, config maps and the pod's own fields, in the driver's order."""
    variables = []
    for kind, source, key in (
        ("secret", "secretKeyRef", "secretKey"),
        ("configMap", "configMapKeyRef", "configMapKey"),
    ):
        for item in kubernetes.get(f"{kind}AsEnv", []):
            name = _parameter_value(item[f"{kind}NameParameter"], dag)
            for pair in item["keyToEnv"]:
                reference = {"name": name, "key": pair[key]}
                reference |= {"optional": True} if item.get("optional") else {}
                variables.append({"name": pair["envVar"], "valueFrom": {source: reference}})
    for field_path in kubernetes.get("fieldPathAsEnv", []):
        value = {"fieldRef": {"fieldPath": field_path["fieldPath"]}}
        variables.append({"name": field_path["name"], "valueFrom": value})
    return variables


def _placement(kubernetes: Mapping[str, Any], dag: Mapping[str, Any]) -> dict[str, Any]:
    """Return the non-empty settings of the pod as a whole, such as volumes and tolerations."""
    volumes = [
        {
            "name": mount["volumeName"],
            "emptyDir": {name: mount[name] for name in ("medium", "sizeLimit") if name in mount},
        }
        for mount in kubernetes.get("emptyDirMounts", [])
    ]
    pull_secrets = [
        {"name": _parameter_value(item["secretNameParameter"], dag)}
        for item in kubernetes.get("imagePullSecret", [])
    ]
    selector = kubernetes.get("nodeSelector", {}).get("nodeSelectorJson")
    tolerations = [_parameter_value(item["tolerationJson"], dag) for item in kubernetes.get("tolerations", [])]
    affinities = [_parameter_value(item["nodeAffinityJson"], dag) for item in kubernetes.get("nodeAffinity", [])]
    pod = {
        "volumes": volumes,
        "activeDeadlineSeconds": int(kubernetes.get("activeDeadlineSeconds", 0)),
        "imagePullSecrets": pull_secrets,
        "nodeSelector": _parameter_value(selector, dag) if selector else None,
        "tolerations": [
            toleration for value in tolerations for toleration in (value if isinstance(value, list) else [value])
        ],
        "affinity": {"nodeAffinity": affinities[0]} if affinities and affinities[0] else None,
    }
    return {name: value for name, value in pod.items() if value}


def _parameter_value(source: Mapping[str, Any], dag: Mapping[str, Any]) -> Any:
    if name := source.get("componentInputParameter"):
        return dag[name]
    return source["runtimeValue"]["constant"]
