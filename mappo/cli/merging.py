"""The merge of a configuration with a file, then with flags, and the note about arguments that merge."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mappo.config import ExperimentConfig, override
from mappo.environment.known_scenarios import require_known_scenario


def merge(config: ExperimentConfig, file: Mapping[str, Any], flags: Mapping[str, Any]) -> ExperimentConfig:
    """Return a configuration with the changes of a file, then of flags; print which arguments are kept.

    A file with a scenario and its arguments has all of these arguments, as show-config prints them: the file gives
    the same task whichever configuration it changes.

    Raises:
        ConfigError: a value is not allowed, or the scenario or an argument of it does not exist.
    """
    task = file.get("environment")
    if isinstance(task, Mapping) and {"scenario", "scenario_kwargs"} <= task.keys():
        config = replace(config, environment=replace(config.environment, scenario_kwargs={}))
    result = override(config, file, flags)
    require_known_scenario(result.environment)
    if result.environment.scenario == config.environment.scenario:
        _print_merged(config.environment.scenario_kwargs, result.environment.scenario_kwargs)
    return result


def _print_merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Print which arguments of a scenario are changed, and which are kept."""
    if not old or old == new:
        return
    same = [name for name in old if name in new]
    changed = [
        f"{name} = {json.dumps(old[name])} -> {json.dumps(new[name])}" for name in same if old[name] != new[name]
    ]
    added = [f"{name} = {json.dumps(new[name])} is added" for name in new if name not in old]
    removed = [f"{name} is removed" for name in old if name not in new]
    kept = [f"{name} = {json.dumps(old[name])}" for name in same if old[name] == new[name]]
    rest = f"; kept: {', '.join(kept)}" if kept else ""
    print(f"note: environment.scenario_kwargs: {', '.join([*changed, *added, *removed])}{rest}", file=sys.stderr)
