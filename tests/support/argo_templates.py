"""The templates into which Kubeflow's API server compiles a pipeline, and which Argo runs.

The templates of drivers and containers are those of a recorded workflow. The parts that depend on the pipeline
follow kubeflow/pipelines backend/src/v2/compiler/argocompiler. Conditions are not supported, since no pipeline of
this project has them.
"""

import copy
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.recordings import manifest_of, raw

DAG_DRIVER, CONTAINER_DRIVER = "system-dag-driver", "system-container-driver"
EXECUTOR, CONTAINER = "system-container-executor", "system-container-impl"  # template names end with these
_METADATA = {"annotations": {"pipelines.kubeflow.org/v2_component": "true", "sidecar.istio.io/inject": "false"}}
_RETRY = ("retry-max-count", "retry-backoff-duration", "retry-backoff-factor", "retry-backoff-max-duration")


@dataclass(frozen=True)
class Names:
    """The names that a workflow's templates repeat."""

    run_id: str
    pipeline: str
    display: str


def encode(value: Any, sort_keys: bool = True) -> str:
    """Write JSON as Go does: with sorted keys, without spaces, and with the characters &, < and > escaped."""
    text = json.dumps(value, sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


class Templates:
    """The templates of a pipeline by name, and the parameters of its workflow.

    executors: the settings of pods in the pipeline's document for Kubernetes, by executor. values: the run's
    parameters.
    """

    def __init__(self, names: Names, pipeline: Mapping[str, Any], executors: Mapping[str, Any], values: Any):
        self._names, self._pipeline, self._executors = names, pipeline, executors
        self.by_name: dict[str, dict[str, Any]] = {}
        self.parameters: dict[str, str] = {}
        self._add_dag("root", "root", pipeline["root"])
        self.parameters["components-root"] = encode(pipeline["root"])
        root_driver = {
            "component": "{{workflow.parameters.components-root}}",
            "runtime-config": encode({"parameterValues": values}),
            "driver-type": "ROOT_DAG",
        }
        self._use(DAG_DRIVER)
        root = {"parent-dag-id": "{{tasks.root-driver.outputs.parameters.execution-id}}", "condition": ""}
        tasks = [_task("root-driver", DAG_DRIVER, root_driver), _task("root", "root", root, ["root-driver"])]
        self._dag("entrypoint", [], tasks)

    def _add_dag(self, template: str, key: str, component: Mapping[str, Any]) -> None:
        tasks = []
        exits = {
            name: task
            for name, task in sorted(component["dag"]["tasks"].items())
            if task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED"
        }
        hooks = {
            name: hook
            for exit_name, task in exits.items()
            for name, hook in self._hooks(template, exit_name, task)
        }
        for name, task in sorted(component["dag"]["tasks"].items()):
            if name in exits:
                continue
            reference = task["componentRef"]["name"]
            task_component = self._pipeline["components"][reference]
            if "parameterIterator" in task:
                tasks.append(self._loop(name, task, reference, task_component))
            elif "dag" in task_component:
                tasks += self._nested(name, task, reference, task_component)
            else:
                tasks += self._container(name, task, reference, task_component)
        for task in tasks:
            if task["name"] in hooks:
                task["hooks"] = {"exit": hooks[task["name"]]}
        self._dag(template, ["parent-dag-id"], tasks)

    def _hooks(self, dag: str, name: str, task: Any) -> Iterator[tuple[str, dict[str, Any]]]:
        """Add the template of an exit task; yield the hook of each task that it waits for."""
        reference = task["componentRef"]["name"]
        component = self._pipeline["components"][reference]
        driver, stage = self._container(name, task, reference, component)
        del driver["depends"]
        template = f"exit-hook-{dag}-{name}"
        self._dag(template, ["parent-dag-id"], [driver, stage])
        arguments = {"parameters": [{"name": "parent-dag-id", "value": "{{inputs.parameters.parent-dag-id}}"}]}
        for other in task["dependentTasks"]:
            yield other, {"template": template, "arguments": arguments}

    def _nested(self, name: str, task: Any, reference: str, component: Any) -> list[dict[str, Any]]:
        self._component(reference, component)
        driver = self._dag_driver(reference, task, name, "{{inputs.parameters.parent-dag-id}}")
        return [
            _task(f"{name}-driver", DAG_DRIVER, driver, task.get("dependentTasks", [])),
            _task(name, reference, _from_driver(f"{name}-driver"), [f"{name}-driver"]),
        ]

    def _loop(self, name: str, task: Any, reference: str, component: Any) -> dict[str, Any]:
        """Add the templates of a loop: its iterator, an iteration, and the DAG that an iteration runs."""
        self._component(reference, component)
        parent = {"parent-dag-id": "{{inputs.parameters.parent-dag-id}}"}
        item = self._dag_driver(reference, task, name, parent["parent-dag-id"])
        index = {"iteration-index": "{{inputs.parameters.iteration-index}}"}
        iteration = [
            _task("iteration-item-driver", DAG_DRIVER, {"component": item["component"], **index, **item}),
            _task("iteration-item", reference, _from_driver("iteration-item-driver"), ["iteration-item-driver"]),
        ]
        self._dag(f"{reference}-iteration", ["parent-dag-id", "iteration-index"], iteration)
        execution = "{{tasks.iteration-driver.outputs.parameters.execution-id}}"
        count = "{{tasks.iteration-driver.outputs.parameters.iteration-count}}"
        arguments = {"parent-dag-id": execution, "iteration-index": "{{item}}"}
        items = _task("iteration-iterations", f"{reference}-iteration", arguments, ["iteration-driver"])
        iterator = self._dag(
            f"{reference}-{name}-iterator",
            ["parent-dag-id"],
            [_task("iteration-driver", DAG_DRIVER, item), items | {"withSequence": {"count": count}}],
        )
        if limit := task.get("iteratorPolicy", {}).get("parallelismLimit"):
            iterator["parallelism"] = limit
        return _task(name, iterator["name"], parent, task.get("dependentTasks", []))

    def _component(self, reference: str, component: Mapping[str, Any]) -> None:
        self._use(DAG_DRIVER)
        if reference not in self.by_name:
            self._add_dag(reference, reference, component)
        self.parameters[f"components-{reference}"] = encode(component)

    def _dag_driver(self, reference: str, task: Any, name: str, parent: str) -> dict[str, str]:
        component = f"{{{{workflow.parameters.components-{reference}}}}}"
        return {"component": component, "parent-dag-id": parent, "task": encode(task), "task-name": name}

    def _container(self, name: str, task: Any, reference: str, component: Any) -> list[dict[str, Any]]:
        label = component["executorLabel"]
        implementation = self._pipeline["deploymentSpec"]["executors"][label]["container"]
        pod = self._executors.get(label, {})
        key = hashlib.sha256(encode([{**component, "executorLabel": ""}, implementation]).encode()).hexdigest()
        self.parameters.setdefault(f"components-{key}", encode(component))
        self.parameters.setdefault(f"implementations-{key}", encode(implementation))
        driver = {
            "component": f"{{{{workflow.parameters.components-{key}}}}}",
            "task": encode(task),
            "container": f"{{{{workflow.parameters.implementations-{key}}}}}",
            "task-name": name,
            "parent-dag-id": "{{inputs.parameters.parent-dag-id}}",
        }
        if pod:
            self.parameters[f"kubernetes-{reference}"] = encode(pod)
            driver["kubernetes-config"] = f"{{{{workflow.parameters.kubernetes-{reference}}}}}"
        self._use(CONTAINER_DRIVER)
        metadata = _metadata(pod.get("podMetadata", {}))
        retry = _retry(task)
        template = self._executor(len(metadata), pod.get("podMetadata", {}), metadata, bool(retry))
        patch = {
            "pod-spec-patch": f"{{{{tasks.{name}-driver.outputs.parameters.pod-spec-patch}}}}",
            "cached-decision": f"{{{{tasks.{name}-driver.outputs.parameters.cached-decision}}}}",
        }
        return [
            _task(f"{name}-driver", CONTAINER_DRIVER, driver, task.get("dependentTasks", [])),
            _task(name, template, patch | metadata | retry, [f"{name}-driver"]),
        ]

    def _executor(self, count: int, pod_metadata: Any, metadata: Mapping[str, str], retried: bool) -> str:
        """Add the template of a container and of the DAG around it; return the name of the DAG's template.

        The names hold the numbers of annotations and labels. count: number of the arguments in `metadata`.
        """
        num_annotations, num_labels = (len(pod_metadata.get(kind, {})) for kind in ("annotations", "labels"))
        counts = f"metadata-{num_annotations}-{num_labels}-" if count else ""
        prefix = counts + ("retry-" if retried else "")
        if prefix + EXECUTOR in self.by_name:
            return prefix + EXECUTOR
        names = ["pod-spec-patch", *metadata, *(_RETRY if retried else ())]
        arguments = {name: _input(name) for name in names}
        when = {"when": "{{inputs.parameters.cached-decision}} != true"}
        executor = self._dag(
            prefix + EXECUTOR,
            ["pod-spec-patch", "cached-decision", *names[1:]],
            [_task("executor", prefix + CONTAINER, arguments) | when],
        )
        defaults = {"cached-decision": "false"} | dict.fromkeys(_RETRY, "0")
        for parameter in executor["inputs"]["parameters"]:
            if parameter["name"] in defaults:
                parameter["default"] = defaults[parameter["name"]]
        self._add_container(prefix + CONTAINER, names, retried)
        return prefix + EXECUTOR

    def _add_container(self, name: str, inputs: list[str], retried: bool) -> None:
        template = self._recorded(f"metadata-0-1-retry-{CONTAINER}")
        template |= {"name": name, "inputs": {"parameters": [{"name": parameter} for parameter in inputs]}}
        for kind in ("annotation", "label"):
            fixed = {key: value for key, value in template["metadata"][f"{kind}s"].items() if "{{" not in key}
            keys = [parameter for parameter in inputs if parameter.startswith(f"pod-metadata-{kind}-key")]
            values = [key.replace("-key", "-val") for key in keys]
            pairs = {_input(key): _input(value) for key, value in zip(keys, values, strict=True)}
            template["metadata"][f"{kind}s"] = fixed | pairs
        if not retried:
            del template["retryStrategy"]
        self.by_name[name] = template

    def _dag(self, name: str, inputs: list[str], tasks: list[dict[str, Any]]) -> dict[str, Any]:
        parameters = {"parameters": [{"name": parameter} for parameter in inputs]} if inputs else {}
        template = {"name": name, "inputs": parameters, "outputs": {}, "metadata": _METADATA}
        self.by_name[name] = template | {"dag": {"tasks": tasks}}
        return self.by_name[name]

    def _use(self, name: str) -> None:
        if name not in self.by_name:
            self.by_name[name] = self._recorded(name)

    def _recorded(self, name: str) -> dict[str, Any]:
        recorded = _recorded_names()
        text = json.dumps(_recorded_templates()[name])
        for old, new in ((recorded.run_id, self._names.run_id), (recorded.display, self._names.display)):
            text = text.replace(json.dumps(old), json.dumps(new))
        return json.loads(text.replace(json.dumps(recorded.pipeline), json.dumps(self._names.pipeline)))


def _task(name: str, template: str, arguments: Mapping[str, str], after: Any = ()) -> dict[str, Any]:
    parameters = [{"name": key, "value": value} for key, value in arguments.items()]
    for parameter in parameters:
        if parameter["name"] == "cached-decision":
            parameter["default"] = "false"
    depends = " && ".join(f"{other}.Succeeded" for other in sorted(after))
    task = {"name": name, "template": template, "arguments": {"parameters": parameters}}
    return task | ({"depends": depends} if depends else {})


def _input(name: str) -> str:
    return f"{{{{inputs.parameters.{name}}}}}"


def _from_driver(driver: str) -> dict[str, str]:
    return {
        "parent-dag-id": f"{{{{tasks.{driver}.outputs.parameters.execution-id}}}}",
        "condition": f"{{{{tasks.{driver}.outputs.parameters.condition}}}}",
    }


def _metadata(pod_metadata: Mapping[str, Any]) -> dict[str, str]:
    """Return the arguments for annotations and labels. Recordings have at most one of each; more get a number."""
    arguments = {}
    for kind in ("annotation", "label"):
        for index, (key, value) in enumerate(sorted(pod_metadata.get(f"{kind}s", {}).items())):
            number = f"-{index}" if index else ""
            arguments[f"pod-metadata-{kind}-key{number}"] = key
            arguments[f"pod-metadata-{kind}-val{number}"] = value
    return arguments


def _retry(task: Mapping[str, Any]) -> dict[str, str]:
    policy = task.get("retryPolicy")
    if policy is None:
        return {}
    seconds = [policy.get(key, "0s").removesuffix("s") for key in ("backoffDuration", "backoffMaxDuration")]
    factor = f"{policy.get('backoffFactor', 0):g}"
    return dict(zip(_RETRY, (f"{policy.get('maxRetryCount', 0):g}", seconds[0], factor, seconds[1]), strict=True))


@functools.cache
def _recorded_templates() -> dict[str, dict[str, Any]]:
    spec = manifest_of(raw("raw-training"))["spec"]
    return {template["name"]: copy.deepcopy(template) for template in spec["templates"]}


@functools.cache
def _recorded_names() -> Names:
    run = raw("raw-training")["run"]
    return Names(run["id"], "mappo-training", run["name"])
