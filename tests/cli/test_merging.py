"""The merge of a scenario's arguments with those of the recipe, and the note about it."""

import json

import pytest

from mappo.__main__ import main

KWARGS = "--environment.scenario-kwargs"


@pytest.fixture
def show(capsys):
    """Return a function that runs show-config and returns the arguments of the scenario, and the notes."""

    def run(*arguments: str) -> tuple[dict[str, object], str]:
        assert main(["show-config", *arguments]) == 0
        output = capsys.readouterr()
        return json.loads(output.out)["environment"]["scenario_kwargs"], output.err

    return run


def test_flag_keeps_the_other_arguments_of_the_recipe_and_says_so(show):
    kwargs, note = show(KWARGS, '{"n_agents": 5}')
    assert kwargs == {"n_agents": 5, "shared_rew": False, "lidar_range": 0.35}
    assert note == (
        "note: environment.scenario_kwargs: n_agents = 3 -> 5; kept: shared_rew = false, lidar_range = 0.35\n"
    )


def test_null_removes_an_argument_of_the_recipe(show):
    kwargs, note = show(KWARGS, '{"shared_rew": null, "collisions": false}')
    assert kwargs == {"n_agents": 3, "lidar_range": 0.35, "collisions": False}
    assert note.startswith(
        "note: environment.scenario_kwargs: collisions = false is added, shared_rew is removed; kept: n_agents = 3"
    )


def test_another_scenario_has_no_argument_of_the_recipe(show):
    assert show("--environment.scenario", "wheel", KWARGS, '{"n_agents": 5}') == ({"n_agents": 5}, "")
    assert show("--environment.scenario", "wheel") == ({}, "")


def test_same_arguments_give_no_note(show):
    assert show(KWARGS, '{"n_agents": 3}')[1] == ""
    assert show()[1] == ""


def test_file_without_a_scenario_merges_and_flags_merge_with_the_file(show, tmp_path):
    file = tmp_path / "changes.json"
    file.write_text('{"environment": {"scenario_kwargs": {"n_agents": 5}}}')
    kwargs, note = show("--config", str(file), KWARGS, '{"lidar_range": 0.2}')
    assert kwargs == {"n_agents": 5, "shared_rew": False, "lidar_range": 0.2}
    assert "n_agents = 3 -> 5, lidar_range = 0.35 -> 0.2; kept: shared_rew = false" in note


def test_file_with_its_scenario_has_all_arguments(show, tmp_path):
    file = tmp_path / "whole.json"
    whole = {"scenario": "navigation", "scenario_kwargs": {"n_agents": 5, "comms_range": None}}
    file.write_text(json.dumps({"environment": whole}))
    assert show("--config", str(file)) == ({"n_agents": 5, "comms_range": None}, "")
    merged, _ = show("--config", str(file), KWARGS, '{"collisions": true}')
    assert merged == {"n_agents": 5, "comms_range": None, "collisions": True}


def test_note_is_printed_once_for_all_pipelines(tmp_path, capsys):
    from pipelines.__main__ import main as pipelines

    flags = ["--image", "example.org/a:1", "--output", str(tmp_path), KWARGS, '{"n_agents": 5}']
    assert pipelines(["compile", *flags]) == 0
    assert capsys.readouterr().err.count("n_agents = 3 -> 5") == 1
