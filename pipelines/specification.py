"""Read the parameters, containers and texts of a compiled pipeline."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from components.placeholders import SCHEDULED_TIME, require_known
from mappo.errors import ConfigError
from mappo.strict_json import parse_json

PLACEHOLDER = re.compile(r"\{\{|pipelinechannel")
PARAMETER_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
KINDS: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int,),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}
TIMED_PARAMETERS = ("run", "edition", "store")  # the stages replace [[ScheduledTime]] in these
KIND_WORDS = {
    "STRING": "text",
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a JSON list",
    "STRUCT": "a JSON object",
}


def parameters_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    """Return the declared parameters of a compiled pipeline, by name."""
    parameters = specification["root"].get("inputDefinitions", {}).get("parameters", {})
    assert isinstance(parameters, dict)
    return parameters


def defaults_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    declared = parameters_of(specification)
    return {
        name: definition["defaultValue"] for name, definition in declared.items() if "defaultValue" in definition
    }


def placeholder_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        for text in texts_within(name, value):
            try:
                require_known(text)
            except ConfigError as error:
                yield f"parameter {name}: {error}"
            else:
                if SCHEDULED_TIME in text and name not in TIMED_PARAMETERS:
                    allowed = ", ".join(TIMED_PARAMETERS)
                    yield f"parameter {name} = {text!r}: {SCHEDULED_TIME} is replaced in {allowed} only"


def texts_within(name: str, value: Any) -> Iterator[str]:
    """Yield the texts of a parameter's value, also those inside a value that holds JSON."""
    if name in ("config", "study_config", "matrix") and isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:  # the check of the value itself reports this
            return
    yield from (text for _, text in texts_of(value, name))


def containers_of(specification: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, executor in specification["deploymentSpec"]["executors"].items():
        if "container" in executor:
            yield name, executor["container"]


def texts_of(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of every text within a value; paths begin with `path`, such as root.dag.0."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from texts_of(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from texts_of(item, f"{path}.{index}")
