"""The scenarios that have a name, and their keyword arguments, from their source code: no torch is imported.

So a command refuses a misspelt name in a moment, before it imports torch and VMAS, which take seconds.
"""

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from mappo.config import EnvironmentConfig
from mappo.errors import ConfigError, hint_for

_OWN = ("recall", "swarm")  # the scenarios of this package
_FOLDERS = ("", "mpe", "debug")  # of vmas.scenarios
_NOT_FOR_SCENARIOS = {  # arguments of VMAS and of TorchRL's wrapper, which only `environment` may set
    *("batch_dim", "clamp_actions", "categorical_actions", "continuous_actions", "device", "dict_spaces"),
    *("from_pixels", "grad_enabled", "group_map", "max_steps", "multidiscrete_actions", "num_envs", "pixels_only"),
    *("scenario", "scenario_kwargs", "seed", "terminated_truncated", "wrapper", "wrapper_kwargs"),
}


def require_known_scenario(config: EnvironmentConfig) -> None:
    """Check the scenario's name and the names of its keyword arguments; code of a user's own is not read.

    Raises:
        ConfigError: there is no such scenario, or it does not take an argument; the message names the closest.
    """
    if reserved := sorted(_NOT_FOR_SCENARIOS & set(config.scenario_kwargs)):
        raise ConfigError(f"environment.scenario_kwargs: not arguments of a scenario: {', '.join(reserved)}")
    name = config.scenario
    if ":" in name:
        return
    if name not in scenario_modules():
        hint = hint_for(name, scenario_modules(), f"scenarios: {', '.join(sorted(scenario_modules()))}")
        raise ConfigError(f"environment.scenario = {name!r}: there is no such scenario; {hint}")
    known = keyword_arguments(name)
    for argument in config.scenario_kwargs:
        if argument not in known:
            listing = ", ".join(f"{key} ({default})" for key, default in known.items())
            hint = hint_for(argument, known, f"its arguments, with defaults: {listing or 'none'}")
            raise ConfigError(f"environment.scenario_kwargs.{argument}: {name} takes no such argument; {hint}")


@cache
def scenario_modules() -> dict[str, str]:
    """Return the modules of all scenarios that have a name, by name."""
    return {
        **{name: f"mappo.environment.scenarios.{name}" for name in _OWN},
        **{
            file.stem: ".".join(filter(None, ["vmas.scenarios", folder, file.stem]))
            for folder in _FOLDERS
            for file in sorted(_directory("vmas", "scenarios", folder).glob("[a-z]*.py"))
        },
    }


def keyword_arguments(name: str) -> dict[str, str]:
    """Return the keyword arguments of a scenario that has a name, each with its default as source code.

    Scenarios read them as `kwargs.pop("n_agents", 4)`.
    """
    package, *path = scenario_modules()[name].split(".")
    return dict(_read_arguments(ast.parse(_directory(package, *path[:-1], f"{path[-1]}.py").read_bytes())))


def _directory(package: str, *path: str) -> Path:
    """Return a folder or file of an installed package, which is found and not imported."""
    spec = find_spec(package)
    assert spec
    assert spec.origin
    return Path(spec.origin).parent.joinpath(*path)


def _read_arguments(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Attribute(ast.Name("kwargs"), "pop" | "get"), [ast.Constant(str(key)), *default]):
                yield key, ast.unparse(default[0]) if default else "required"
