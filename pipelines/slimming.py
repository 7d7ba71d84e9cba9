"""Make a compiled pipeline smaller, since a run's workflow holds many copies of every component.

Argo stores the pod of each step six times in one object of Kubernetes, which holds 1 MiB. Kubeflow's compiler
adds the source and the descriptions of the component to that pod, and an input for each resource, which nothing
reads.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.plan import tasks_of
from pipelines.site import Site, StagePod

_PASSED_ON = re.compile(r"\{\{\$\.inputs\.parameters\['pipelinechannel--[^']+'\]\}\}")


def slim(specification: dict[str, Any], site: Site) -> None:
    """Remove what no step reads from a specification, and start the stages by `python -m components`.

    The inputs that repeat a resource can go, since KFP's driver reads image and resources from the container's
    placeholders (`resolvePodSpecInputRuntimeParameter`).
    """
    for component in specification["components"].values():
        _remove_descriptions(component)
    tasks = [task for _, task in tasks_of(specification)]
    for task in tasks:
        declared = specification["components"][task["componentRef"]["name"]].get("inputDefinitions", {})
        _remove_unread_inputs(task, declared.get("parameters", {}))
    for name, component in specification["components"].items():
        _remove_defaults(component, [task for task in tasks if task["componentRef"]["name"] == name])
    for executor in specification["deploymentSpec"]["executors"].values():
        container = executor["container"]
        stage = container["args"][-1]
        container["command"] = _command(stage, getattr(site.stages, stage))
        container["args"] = ["--executor_input", "{{$}}"]


def _command(stage: str, pod: StagePod) -> list[str]:
    command = ["python3", "-m", "components", stage]
    if not pod.retries:
        return command
    backoff = [f"--backoff-seconds={pod.backoff_seconds}", f"--backoff-factor={pod.backoff_factor}"]
    return [*command, f"--retries={pod.retries}", *backoff]


def _remove_descriptions(component: Mapping[str, Any]) -> None:
    for kind in ("inputDefinitions", "outputDefinitions"):
        for group in component.get(kind, {}).values():
            for definition in group.values():
                definition.pop("description", None)


def _remove_defaults(component: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> None:
    """Remove the defaults of inputs that every task of the component sets."""
    for name, definition in component.get("inputDefinitions", {}).get("parameters", {}).items():
        if all(name in task.get("inputs", {}).get("parameters", {}) for task in tasks):
            definition.pop("defaultValue", None)
            definition.pop("isOptional", None)


def _remove_unread_inputs(task: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
    """Remove inputs that the component does not declare and that only repeat another input's placeholder."""
    inputs = task.get("inputs", {}).get("parameters", {})
    for name in [name for name in inputs if name not in declared]:
        constant = inputs[name].get("runtimeValue", {}).get("constant")
        if isinstance(constant, str) and _PASSED_ON.fullmatch(constant):
            del inputs[name]
