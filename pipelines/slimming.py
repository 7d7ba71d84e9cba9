"""Make a compiled pipeline small: every step of a run carries its component many times over.

Argo keeps the whole of a step's pod six times in one object of Kubernetes, which holds 1 MiB. Kubeflow's compiler
puts the source and the descriptions of a component there, and each resource as an input that nobody reads.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.plan import tasks_of
from pipelines.site import Site, StagePod

_PASSED_ON = re.compile(r"\{\{\$\.inputs\.parameters\['pipelinechannel--[^']+'\]\}\}")


def slim(specification: dict[str, Any], site: Site) -> None:
    """Take out of a specification what no step reads, and start stages by `python -m components`.

    Source: KFP's driver takes image and resources from the container's placeholders (`resolvePodSpecInput...`).
    """
    for component in specification["components"].values():
        _forget_descriptions(component)
    tasks = [task for _, task in tasks_of(specification)]
    for task in tasks:
        declared = specification["components"][task["componentRef"]["name"]].get("inputDefinitions", {})
        _forget_unread(task, declared.get("parameters", {}))
    for name, component in specification["components"].items():
        _forget_defaults(component, [task for task in tasks if task["componentRef"]["name"] == name])
    for executor in specification["deploymentSpec"]["executors"].values():
        container = executor["container"]
        stage = container["args"][-1]
        container["command"] = _command(stage, getattr(site.stages, stage))
        container["args"] = ["--executor_input", "{{$}}"]


def _command(stage: str, placed: StagePod) -> list[str]:
    command = ["python3", "-m", "components", stage]
    if not placed.retries:
        return command
    backoff = [f"--backoff-seconds={placed.backoff_seconds}", f"--backoff-factor={placed.backoff_factor}"]
    return [*command, f"--retries={placed.retries}", *backoff]


def _forget_descriptions(component: Mapping[str, Any]) -> None:
    for kind in ("inputDefinitions", "outputDefinitions"):
        for group in component.get(kind, {}).values():
            for definition in group.values():
                definition.pop("description", None)


def _forget_defaults(component: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> None:
    """Take out the defaults of inputs that every task of the component gives."""
    for name, definition in component.get("inputDefinitions", {}).get("parameters", {}).items():
        if all(name in task.get("inputs", {}).get("parameters", {}) for task in tasks):
            definition.pop("defaultValue", None)
            definition.pop("isOptional", None)


def _forget_unread(task: Mapping[str, Any], declared: Mapping[str, Any]) -> None:
    """Take out inputs that the component does not declare and that only repeat another input's placeholder."""
    inputs = task.get("inputs", {}).get("parameters", {})
    for name in [name for name in inputs if name not in declared]:
        constant = inputs[name].get("runtimeValue", {}).get("constant")
        if isinstance(constant, str) and _PASSED_ON.fullmatch(constant):
            del inputs[name]
