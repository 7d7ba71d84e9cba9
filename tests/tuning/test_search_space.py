"""The search space is checked against the configuration's own declaration."""

import pytest

from mappo.errors import ConfigError
from mappo.recipes import RECIPES, recipe
from mappo.tuning.search_space import Choices, FloatRange, IntRange, applied, default_space, read_space, value_of

CONFIG = recipe("navigation")


def test_applied_sets_values_of_the_configuration_by_their_paths():
    config = applied(CONFIG, {"learner.epochs": 3, "networks.hidden_sizes": [8, 8], "learner.gae_lambda": 0.5})
    assert (config.learner.epochs, config.networks.hidden_sizes, config.learner.gae_lambda) == (3, (8, 8), 0.5)
    assert value_of(config, "networks.hidden_sizes") == [8, 8]


@pytest.mark.parametrize("name", RECIPES)
def test_default_space_holds_each_recipes_own_values(name):
    config = recipe(name)
    space = default_space(config)
    assert set(space) == {"learner.clip_epsilon", "learner.gae_lambda", "learner.epochs"}
    for path, dimension in space.items():
        assert not isinstance(dimension, Choices)
        assert dimension.low <= value_of(config, path) <= dimension.high


def test_a_space_is_read_from_json():
    assert read_space(
        {
            "learner.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
            "learner.minibatch_frames": {"type": "int", "low": 100, "high": 1000, "step": 100},
            "networks.activation": {"type": "categorical", "choices": ["tanh", "relu"]},
        },
        CONFIG,
    ) == {
        "learner.learning_rate": FloatRange("float", 1e-4, 1e-2, log=True),
        "learner.minibatch_frames": IntRange("int", 100, 1000, step=100),
        "networks.activation": Choices("categorical", ("tanh", "relu")),
    }


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "names no field"),
        ({"learner.epoch": {"type": "int", "low": 2, "high": 30}}, "space.learner.epoch: not a field"),
        ({"learner": {"type": "int", "low": 2, "high": 30}}, "not a field"),
        ({"seed": {"type": "int", "low": 0, "high": 30}}, "may not be tuned: .*chance"),
        ({"environment.scenario": {"type": "categorical", "choices": ["a", "b"]}}, "would change the task"),
        ({"collection.total_frames": {"type": "int", "low": 1, "high": 10**6}}, "more training"),
        ({"evaluation.seeds": {"type": "categorical", "choices": [[1], [2]]}}, "it judges the trials"),
        (
            {"learner.gae_lambda": {"type": "float", "low": 0.8, "high": 1.1}},
            "gae_lambda = 1.1: .*less than",
        ),
        ({"learner.epochs": {"type": "float", "low": 2.5, "high": 30}}, "epochs = 2.5: .*integer"),
        ({"learner.epochs": {"type": "int", "low": 2, "high": 5}}, "leaves out 10"),
        ({"learner.epochs": {"type": "int", "low": 2, "high": 12, "step": 5}}, "leaves out 10"),
        ({"learner.epochs": {"type": "int", "low": 2, "high": 13, "step": 5}}, "not reached from low"),
        ({"learner.epochs": {"type": "int", "low": 30, "high": 5}}, "low must be below high"),
        ({"learner.gae_lambda": {"type": "float", "low": 0, "high": 1, "log": True}}, "above 0 with log"),
        ({"learner.epochs": {"type": "int", "low": 2, "high": 30, "logg": True}}, "did you mean log"),
        ({"learner.epochs": {"low": 2, "high": 30}}, "type is one of"),
        ({"learner.epochs": 3}, "must be an object"),
        ({"networks.activation": {"type": "categorical", "choices": ["tanh", "gelu"]}}, "activation = .*gelu"),
        ({"networks.activation": {"type": "categorical", "choices": ["tanh", "tanh"]}}, "once"),
        ({"learner.gae_lambda": {"type": "float", "low": 0.5, "high": float("inf")}}, "space.learner.gae_lambda"),
    ],
)
def test_an_invalid_space_is_refused_with_the_field_and_the_reason(space, words):
    with pytest.raises(ConfigError, match=words):
        read_space(space, CONFIG)
