"""What a compiled pipeline declares: its parameters, containers and texts."""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from components.placeholders import SCHEDULED_TIME, require_known
from mappo.errors import ConfigError
from mappo.promotion.gate import Gate
from mappo.strict_json import checked, parse_json
from mappo.tuning.search_space import TuningConfig

JSON_PARAMETERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "space": lambda _: None,
    "tuning": lambda values: checked(TuningConfig, values),
    "gate": lambda values: checked(Gate, values),
}

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
TIMED_PARAMETERS = ("run", "edition", "store")  # the stages put the time of the run into these
KIND_WORDS = {
    "STRING": "text",
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a JSON list",
    "STRUCT": "a JSON object",
}


def parameters_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    """The declared parameters of a compiled pipeline, by name."""
    parameters = specification["root"].get("inputDefinitions", {}).get("parameters", {})
    assert isinstance(parameters, dict)
    return parameters


def defaults_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    declared = parameters_of(specification)
    return {name: each["defaultValue"] for name, each in declared.items() if "defaultValue" in each}


def placeholder_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        for text in texts_within(name, value):
            try:
                require_known(text)
            except ConfigError as error:
                yield f"parameter {name}: {error}"
            else:
                if SCHEDULED_TIME in text and name not in TIMED_PARAMETERS:
                    where = ", ".join(TIMED_PARAMETERS)
                    yield f"parameter {name} = {text!r}: {SCHEDULED_TIME} is replaced in {where} only"


def texts_within(name: str, value: Any) -> Iterator[str]:
    """Yield the texts of a parameter, also those within its JSON."""
    if name in ("config", *JSON_PARAMETERS) and isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:  # reported as the value's own problem
            return
    yield from (text for _, text in texts_of(value, name))


def containers_of(specification: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, executor in specification["deploymentSpec"]["executors"].items():
        if "container" in executor:
            yield name, executor["container"]


def texts_of(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from texts_of(each, f"{path}.{key}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from texts_of(each, f"{path}.{index}")
