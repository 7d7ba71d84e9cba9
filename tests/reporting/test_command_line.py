"""The command on a page that makes a run again, read by the parser of the real command line."""

import shlex
from dataclasses import replace

import pytest

from mappo.__main__ import _parser
from mappo.cli.arguments import config_from_arguments, dashed
from mappo.config import from_dict, override
from mappo.recipes import RECIPES, nearest_recipe, recipe
from mappo.reporting.command_line import command_of
from tests.conftest import TINY, endless

CONFIGS = {
    **{name: make() for name, make in RECIPES.items()},
    "tiny": from_dict(TINY),
    "own": endless(),
    "quotes": override(
        recipe("balance"),
        {"environment": {"scenario": "tasks.own:Wheel", "scenario_kwargs": {"name": 'it\'s "x" $HOME'}}},
    ),
    "null": replace(
        recipe("navigation"),
        environment=replace(recipe("navigation").environment, scenario_kwargs={"lidar_range": None}),
    ),
    "lists": override(
        recipe("swarm"),
        {"evaluation": {"seeds": [7, 8], "deterministic": False}, "networks": {"hidden_sizes": [8]}},
    ),
    "seed": override(recipe("navigation"), {"seed": 3, "device": "cpu"}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_gives_the_configuration_again_or_asks_for_a_file(name):
    command = command_of(CONFIGS[name])
    if command.endswith("; mappo train --config config.json"):
        assert name == "null"  # a flag removes an argument by null
        return
    program, *arguments = shlex.split(command)
    assert program == "mappo"
    assert config_from_arguments(_parser().parse_args(dashed(arguments))) == CONFIGS[name]


def test_the_command_of_a_recipe_with_one_change_is_short():
    assert command_of(CONFIGS["seed"]) == "mappo train navigation --seed 3 --device cpu"
    assert [nearest_recipe(make())[0] for make in RECIPES.values()] == list(RECIPES)
