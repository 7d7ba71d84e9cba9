"""The command that trains a run again, made from its configuration alone, so that it shows nothing secret."""

import json
import shlex
from typing import Any

from mappo.config import ExperimentConfig, override
from mappo.recipes import nearest_recipe, recipe

_SCENARIO, _ARGUMENTS = "environment.scenario", "environment.scenario_kwargs"


def command_of(config: ExperimentConfig) -> str:
    """Return a command for a shell: `mappo train`, the nearest recipe, and a flag for each field that differs.

    A configuration that flags cannot describe needs a file with its JSON.
    """
    name, changes = nearest_recipe(config)
    if _ARGUMENTS in changes and _SCENARIO not in changes:
        changes |= {_ARGUMENTS: _changed_arguments(recipe(name).environment.scenario_kwargs, changes[_ARGUMENTS])}
    if override(recipe(name), _nested(changes)) != config:
        return "mappo show-config RUN > config.json; mappo train --config config.json"
    flags = (f"--{field.replace('_', '-')} {shlex.quote(_text(value))}" for field, value in changes.items())
    return " ".join(["mappo train", name, *flags])


def _changed_arguments(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a scenario that differ; null removes one."""
    removed = {name: None for name in old if name not in new}
    return removed | {name: value for name, value in new.items() if name not in old or old[name] != value}


def _text(value: Any) -> str:
    """Return a value as a flag takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _nested(fields: dict[str, Any]) -> dict[str, Any]:
    """Return fields by dotted name as nested objects."""
    result: dict[str, Any] = {}
    for field, value in fields.items():
        section, _, name = field.rpartition(".")
        (result.setdefault(section, {}) if section else result)[name] = value
    return result
