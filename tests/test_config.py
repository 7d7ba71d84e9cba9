import pytest

from mappo.config import ExperimentConfig, config_hash, from_dict, from_json, override, to_json
from mappo.errors import ConfigError
from mappo.recipes import RECIPES, recipe
from mappo.strict_json import to_dict


@pytest.mark.parametrize("name", RECIPES)
def test_json_round_trip_gives_the_same_configuration(name):
    config = recipe(name)
    assert from_json(to_json(config)) == config
    assert to_json(from_json(to_json(config))) == to_json(config)


def test_hash_does_not_depend_on_key_order_or_number_format():
    first = from_json('{"seed": 3, "learner": {"discount": 1, "epochs": 4}}')
    second = from_json('{"learner": {"epochs": 4, "discount": 1.0}, "seed": 3}')
    assert config_hash(first) == config_hash(second)
    assert config_hash(first) != config_hash(override(first, {"seed": 4}))


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ('{"learner": {"clip_epsilom": 0.1}}', ["learner.clip_epsilom", "0.1", "did you mean clip_epsilon?"]),
        ('{"sed": 1}', ["sed = 1", "did you mean seed?"]),
        ('{"learner": {"clip_epsilon": 5}}', ["learner.clip_epsilon = 5", "less than 1"]),
        ('{"learner": {"epochs": 2.0}}', ["learner.epochs = 2.0", "integer"]),
        ('{"learner": {"epochs": true}}', ["learner.epochs = true", "integer"]),
        ('{"learner": {"epochs": "2"}}', ['learner.epochs = "2"', "integer"]),
        ('{"learner": {"discount": NaN}}', ["NaN", "finite"]),
        ('{"learner": {"discount": 1e999}}', ["1e999", "finite"]),
        ('{"learner": 3}', ["learner = 3"]),
        ('{"device": "tpu"}', ['device = "tpu"', "'cuda'"]),
        ('{"networks": {"hidden_sizes": []}}', ["networks.hidden_sizes", "at least 1"]),
        ('{"networks": {"hidden_sizes": [0]}}', ["networks.hidden_sizes.0 = 0", "greater than or equal to 1"]),
        ('{"evaluation": {"seeds": [1, 1]}}', ["evaluation.seeds", "once"]),
        ('{"learner": {"minibatch_frames": 6001}}', ["learner.minibatch_frames = 6001", "6000"]),
        ('{"seed": 1, "seed": 2}', ["seed", "more than once"]),
        ('{"seed": 4294967296}', ["seed = 4294967296", "4294967296"]),
        ('{"environment": {"scenario_kwargs": {"a": 1e999}}}', ["1e999", "finite"]),
        ('{"environment": {"max_episode_frames": 99999999999999999999}}', ["max_episode_frames", "1000000"]),
        ("[" * 100_000, ["not JSON", "nested"]),
        (f'{{"environment": {{"scenario_kwargs": {{"a": {"[" * 900}{"]" * 900}}}}}}}', ["not JSON"]),
        ('{"environment": {"scenario": "\\ud800"}}', ["not JSON"]),
        (f'{{"seed": {"9" * 5_000}}}', ["not JSON", "5000"]),
        ("[1]", ["JSON object"]),
        ("{", ["not JSON"]),
    ],
)
def test_bad_configuration_is_refused_naming_field_value_and_bound(text, fragments):
    with pytest.raises(ConfigError) as error:
        from_json(text)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as error:
        from_dict({"seed": -1, "learner": {"epochs": 0}})
    assert "seed = -1" in str(error.value)
    assert "learner.epochs = 0" in str(error.value)


def test_override_changes_only_what_it_names():
    base = recipe("navigation")
    changed = override(base, {"learner": {"clip_epsilon": 0.1}, "environment": {"max_episode_frames": 5}})
    expected = to_dict(base)
    expected["learner"]["clip_epsilon"] = 0.1
    expected["environment"]["max_episode_frames"] = 5
    assert to_dict(changed) == expected


def test_another_scenario_drops_the_arguments_of_the_previous_one():
    changed = override(recipe("navigation"), {"environment": {"scenario": "wheel"}})
    assert changed.environment.scenario_kwargs == {}
    same = override(recipe("navigation"), {"environment": {"scenario": "navigation"}})
    assert same == recipe("navigation")


def test_total_frames_are_rounded_up_to_whole_iterations():
    collection = from_dict(
        {"collection": {"num_envs": 60, "rollout_frames": 100, "total_frames": 6001}}
    ).collection
    assert collection.num_iterations == 2


def test_every_field_is_described():
    from pydantic import TypeAdapter

    schema = TypeAdapter(ExperimentConfig).json_schema()
    sections = [schema, *schema["$defs"].values()]
    fields = {name: value for section in sections for name, value in section.get("properties", {}).items()}
    assert len(fields) > 25
    undescribed = [name for name, value in fields.items() if "$ref" not in value and not value.get("description")]
    assert undescribed == []


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'nav'.*navigation, navigation-quick, navigation-ippo, balance"):
        recipe("nav")


def test_only_the_result_of_all_changes_is_checked():
    base = recipe("navigation")
    changed = override(base, {"learner": {"minibatch_frames": 9_000}}, {"collection": {"num_envs": 90}})
    assert changed.learner.minibatch_frames == 9_000


def arguments_after(*changes):
    """Return the scenario's arguments after changes of the navigation recipe, which has three."""
    return override(
        recipe("navigation"), *({"environment": change} for change in changes)
    ).environment.scenario_kwargs


NAVIGATION = {"n_agents": 3, "shared_rew": False, "lidar_range": 0.35}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{"scenario_kwargs": {"n_agents": 5}}], {**NAVIGATION, "n_agents": 5}),
        ([{"scenario": "navigation", "scenario_kwargs": {"n_agents": 5}}], {**NAVIGATION, "n_agents": 5}),
        ([{"scenario_kwargs": {"collisions": False}}], {**NAVIGATION, "collisions": False}),
        ([{"scenario_kwargs": {"shared_rew": None}}], {"n_agents": 3, "lidar_range": 0.35}),
        ([{"scenario_kwargs": {"max_speed": None}}], {**NAVIGATION, "max_speed": None}),
        ([{"scenario_kwargs": {}}], NAVIGATION),
        ([{"scenario": "wheel"}], {}),
        ([{"scenario": "wheel", "scenario_kwargs": {"n_agents": 3}}], {"n_agents": 3}),
        ([{"scenario": "wheel", "scenario_kwargs": {"n_agents": 3}}, {"scenario": "balance"}], {}),
        (
            [{"scenario": "wheel", "scenario_kwargs": {"n_agents": 3}}, {"scenario_kwargs": {"line_length": 2}}],
            {"n_agents": 3, "line_length": 2},
        ),
        ([{"scenario": "wheel"}, {"scenario": "navigation"}], {}),
    ],
)
def test_scenario_arguments_merge_while_the_scenario_stays_the_same(changes, expected):
    assert arguments_after(*changes) == expected


def test_argument_that_is_an_object_is_replaced_as_a_whole():
    nested = {"scenario": "own:S", "scenario_kwargs": {"map": {"width": 2, "height": 3}}}
    assert arguments_after(nested, {"scenario_kwargs": {"map": {"width": 9}}}) == {"map": {"width": 9}}


@pytest.mark.parametrize("environment", [3, None, [], {"scenario": None}, {"scenario_kwargs": 3}])
def test_override_refuses_an_environment_that_is_not_an_object(environment):
    with pytest.raises(ConfigError, match="environment"):
        override(recipe("navigation"), {"environment": {"scenario": "wheel"}}, {"environment": environment})
