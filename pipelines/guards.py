"""Refuse compiled pipelines with known defects, and wrong parameters, before they reach Kubeflow.

Some of these give wrong values in silence there, others an error after minutes, in words about protocol buffers.
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

MAX_SPECIFICATION_BYTES = 1_000_000  # a workflow with it must fit into one object of Kubernetes
_SECRET_NAME = re.compile(r"(?i)secret|password|passwd|token|credential|access_?key|api_?key")
_SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s@]+@|eyJ[\w-]{20,}\.eyJ"
)


def check_specification(text: str, documents: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a compiled pipeline, given as the YAML's text and its documents, with any known defect.

    Raises:
        ConfigError: one line for each defect.
    """
    specification = documents[0]
    problems = [
        *_size_problems(text, specification),
        *placeholder_problems(defaults_of(specification)),
        *_image_problems(specification),
        *_environment_problems(specification),
        *_secret_problems(specification),
        *_task_problems(specification),
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
    """Kubeflow passes values of the environment on as they are: a placeholder in one stays one."""
    for name, container in containers_of(specification):
        for each in container.get("env", []):
            if PLACEHOLDER.search(str(each.get("value", ""))):
                value = each["value"]
                yield f"{name}: environment {each['name']} = {value!r}: a placeholder is not replaced there"


def _secret_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    for name, container in containers_of(specification):
        for each in container.get("env", []):
            if _SECRET_NAME.search(each["name"]) and each.get("value"):
                yield f"{name}: environment {each['name']} is given in the specification: use a secret"
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
                        "loop's item: put the loop into a pipeline of its own, with this as its parameter"
                    )


def _reference_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    """A parameter that a task takes from the pipeline around it, which has none of that name, or not as text."""
    for owner, component in {"root": specification["root"], **specification["components"]}.items():
        declared = component.get("inputDefinitions", {}).get("parameters", {})
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            for parameter, source in task.get("inputs", {}).get("parameters", {}).items():
                wanted = source.get("componentInputParameter")
                if wanted is not None and wanted not in declared:
                    yield f"task {name}: takes {parameter} from {wanted}, which {owner} does not have"
                elif wanted in declared and parameter in _in_resources(specification, task):
                    kind = declared[wanted]["parameterType"]
                    if kind != "STRING":
                        yield f"task {name}: resource from {wanted}, which is {KIND_WORDS[kind]}, not text"


def _in_resources(specification: Mapping[str, Any], task: Mapping[str, Any]) -> list[str]:
    """Parameters that a task's resources are taken from."""
    component = specification["components"].get(task["componentRef"]["name"], {})
    executor = specification["deploymentSpec"]["executors"].get(component.get("executorLabel"), {})
    return PARAMETER_PLACEHOLDER.findall(json.dumps(executor.get("container", {}).get("resources")))
