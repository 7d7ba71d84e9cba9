"""Refuse compiled pipelines with known defects before they reach Kubeflow.

Some of these defects silently give wrong values on Kubeflow. Others cause an error after minutes, which speaks of
protocol buffers and not of the cause.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mappo.errors import ConfigError
from pipelines.kubernetes_types import require_image
from pipelines.parameter_guards import MAX_PARAMETERS_BYTES
from pipelines.plan import tasks_of
from pipelines.specification import (
    KIND_WORDS,
    PARAMETER_PLACEHOLDER,
    PLACEHOLDER,
    containers_of,
    defaults_of,
    parameters_of,
    placeholder_problems,
    texts_of,
)

MAX_SPECIFICATION_BYTES = 1_000_000  # the workflow that holds it must fit into one object of Kubernetes
_SECRET_NAME = re.compile(r"(?i)secret|password|passwd|token|credential|access_?key|api_?key")
_SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s@]+@|eyJ[\w-]{20,}\.eyJ"
)


def check_specification(text: str, documents: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a compiled pipeline with a known defect. `text` is its YAML, `documents` are the parsed documents.

    Raises:
        ConfigError: the pipeline has known defects; the message has one line for each.
    """
    specification = documents[0]
    problems = [
        *_size_problems(text, specification),
        *placeholder_problems(defaults_of(specification)),
        *_image_problems(specification),
        *_environment_problems(specification),
        *_secret_problems(specification),
        *_task_problems(specification),
        *_completion_problems(specification),
        *_reference_problems(specification),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _size_problems(text: str, specification: Mapping[str, Any]) -> Iterator[str]:
    size = len(text.encode())
    if size > MAX_SPECIFICATION_BYTES:
        yield f"specification: {size} bytes; at most {MAX_SPECIFICATION_BYTES} fit into Kubernetes"
    size = len(json.dumps(defaults_of(specification)).encode())
    if size > MAX_PARAMETERS_BYTES:
        yield f"defaults of parameters: {size} bytes of JSON; the server takes {MAX_PARAMETERS_BYTES} for a run"


def _image_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    for name, container in containers_of(specification):
        if not PLACEHOLDER.search(container["image"]):
            try:
                require_image(container["image"])
            except ConfigError as error:
                yield f"{name}: {error}"
    default = parameters_of(specification).get("image", {}).get("defaultValue")
    if default is not None:
        try:
            require_image(default)
        except ConfigError as error:
            yield f"parameter image: {error}"


def _environment_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    """Yield environment variables that hold a placeholder, which Kubeflow does not replace there."""
    for name, container in containers_of(specification):
        for variable in container.get("env", []):
            value = variable.get("value", "")
            if PLACEHOLDER.search(str(value)):
                yield f"{name}: environment {variable['name']} = {value!r}: a placeholder is not replaced there"


def _secret_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    for name, container in containers_of(specification):
        for variable in container.get("env", []):
            if _SECRET_NAME.search(variable["name"]) and variable.get("value"):
                yield f"{name}: environment {variable['name']} is given in the specification: use a secret"
    for path, value in texts_of(specification, "specification"):
        if _SECRET_VALUE.search(value):
            yield f"{path}: looks like a credential: use a secret"


def _task_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    for name, task in tasks_of(specification):
        if task.get("cachingOptions", {}).get("enableCache"):
            yield f"task {name}: is cached, but results depend on more than inputs: set_caching_options(False)"
        if "parameterIterator" in task or "artifactIterator" in task:
            items = task.get("parameterIterator", {}).get("items", {}).get("inputParameter")
            for parameter, source in task.get("inputs", {}).get("parameters", {}).items():
                if "taskOutputParameter" in source and parameter != items:
                    yield (
                        f"loop {name}: takes {parameter} from a task around it, which local runs replace by the "
                        f"loop's item: put the loop into a pipeline of its own and make {parameter} its parameter"
                    )


def _completion_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    """Yield tasks that shall follow a loop even if it fails: Kubeflow attaches such a task to no loop."""
    for component in (specification["root"], *specification["components"].values()):
        tasks = component.get("dag", {}).get("tasks", {})
        for name, task in tasks.items():
            if task.get("triggerPolicy", {}).get("strategy") == "ALL_UPSTREAM_TASKS_COMPLETED":
                loops = [other for other in task.get("dependentTasks", []) if "parameterIterator" in tasks[other]]
                yield from (
                    f"task {name}: shall follow {loop} even if that fails, but Kubeflow would never run it: put "
                    "the loop into a pipeline of its own"
                    for loop in loops
                )


def _reference_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    """Yield task inputs whose source is missing, and resources whose source is not text.

    The source of an input is a parameter of the pipeline or loop that contains the task.
    """
    for owner, component in {"root": specification["root"], **specification["components"]}.items():
        declared = component.get("inputDefinitions", {}).get("parameters", {})
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            for parameter, source in task.get("inputs", {}).get("parameters", {}).items():
                source_name = source.get("componentInputParameter")
                if source_name is not None and source_name not in declared:
                    yield f"task {name}: takes {parameter} from {source_name}, which {owner} does not have"
                elif source_name in declared and parameter in _in_resources(specification, task):
                    kind = declared[source_name]["parameterType"]
                    if kind != "STRING":
                        yield f"task {name}: resource from {source_name}, which is {KIND_WORDS[kind]}, not text"


def _in_resources(specification: Mapping[str, Any], task: Mapping[str, Any]) -> list[str]:
    """Return the parameters that set a task's resources (CPU, memory, GPUs)."""
    component = specification["components"].get(task["componentRef"]["name"], {})
    executor = specification["deploymentSpec"]["executors"].get(component.get("executorLabel"), {})
    return PARAMETER_PLACEHOLDER.findall(json.dumps(executor.get("container", {}).get("resources")))
