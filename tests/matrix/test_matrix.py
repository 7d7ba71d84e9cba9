"""The file of a matrix: the order of changes, the cells, and the refusal of wrong files with the line."""

from pathlib import Path

import pytest

from mappo.config import config_hash, override
from mappo.errors import ConfigError
from mappo.matrix.matrix import Matrix, episodes_hash, read_matrix
from mappo.recipes import recipe

FILE = """\
name: first
seeds: [3, 1]
changes:
  learner: {epochs: 2, learning_rate: 1e-3}
  collection: {total_frames: 12_000}
algorithms:
  mappo:
  ippo: {networks: {critic: own}, learner: {epochs: 5}}
  gru: {networks: {memory: gru}}
tasks:
  navigation: {collisions: agent_collisions}
  wheel:
    recipe: balance
    changes:
      environment: {scenario: wheel}
      learner: {epochs: 3, clip_epsilon: 0.1}
    algorithms: [mappo, ippo]
    success: terminated
"""


def read(tmp_path: Path, text: str) -> Matrix:
    file = tmp_path / "matrix.yaml"
    file.write_text(text)
    return read_matrix(file)


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    return str(error.value).replace(f"{tmp_path}/", "")


def test_configuration_is_the_recipe_then_the_file_then_the_task_then_the_algorithm_then_the_seed(tmp_path):
    matrix = read(tmp_path, FILE)
    assert [cell.name for cell in matrix.cells] == [
        *("navigation-mappo-3", "navigation-mappo-1", "navigation-ippo-3", "navigation-ippo-1"),
        *("navigation-gru-3", "navigation-gru-1"),
        *("wheel-mappo-3", "wheel-mappo-1", "wheel-ippo-3", "wheel-ippo-1"),
    ]
    configs = {cell.name: cell.config for cell in matrix.cells}
    shared = {"learner": {"epochs": 2, "learning_rate": 0.001}, "collection": {"total_frames": 12_000}}
    wheel = {"environment": {"scenario": "wheel"}, "learner": {"epochs": 3, "clip_epsilon": 0.1}}
    ippo = {"networks": {"critic": "own"}, "learner": {"epochs": 5}}
    assert configs["navigation-mappo-1"] == override(recipe("navigation"), shared, {"seed": 1})
    assert configs["wheel-mappo-3"] == override(recipe("balance"), shared, wheel, {"seed": 3})
    assert configs["wheel-ippo-3"] == override(recipe("balance"), shared, wheel, ippo, {"seed": 3})
    assert configs["wheel-ippo-3"].learner.epochs == 5
    assert configs["wheel-ippo-3"].environment.scenario_kwargs == {}  # those of balance are not the wheel's
    assert all(cell.config_hash == config_hash(cell.config) for cell in matrix.cells)
    assert (matrix.task("wheel").success, matrix.task("navigation").collisions) == (
        "terminated",
        "agent_collisions",
    )


def test_algorithms_of_a_task_are_judged_on_the_same_episodes_and_other_tasks_on_others(tmp_path):
    hashes = {cell.name: episodes_hash(cell.config) for cell in read(tmp_path, FILE).cells}
    assert len({value for name, value in hashes.items() if name.startswith("wheel")}) == 1
    assert len(set(hashes.values())) == 2


WRONG = {  # a replacement in FILE, and what the error says
    ("seeds: [3, 1]", "seed: [3, 1]"): "matrix.yaml: line 2: the file: seed: unknown key; did you mean seeds?",
    ("name: first\n", ""): "matrix.yaml: name: missing; the keys of the file are name, seeds,",
    ("name: first", "name: First"): "line 1: name: matrix 'First': a name has",
    ("name: first", "name: 5"): "line 1: name: 5: must be a text",
    ("[3, 1]", "[3, 3]"): "line 2: seeds: every seed may appear only once",
    ("[3, 1]", "[3, yes]"): "line 2: seeds: True: a seed is a whole number from 0 to 4294967295",
    ("[3, 1]", "[-1]"): "line 2: seeds: -1: a seed is",
    ("[3, 1]", "[]"): "line 2: seeds: must be a list of whole numbers",
    ("epochs: 2,", "epochs: 0,"): "line 4: task navigation, mappo: learner.epochs = 0: input should be greater",
    (
        "epochs: 2,",
        "epoch: 2,",
    ): "line 4: task navigation, mappo: learner.epoch = 2: unknown key; did you mean epochs?",
    ("epochs: 5", "epochs: 5000"): "line 8: task navigation, ippo: learner.epochs = 5000: input should be less",
    (
        "epochs: 3",
        "epochs: x",
    ): 'line 16: task wheel, mappo: learner.epochs = "x": input should be a valid integer',
    ("critic: own", "critic: own, seed: 1"): "line 8: task navigation, ippo: networks.seed = 1: unknown key",
    (
        "scenario: wheel",
        "scenario: weel",
    ): "line 15: task wheel, mappo: environment.scenario = 'weel': there is no such",
    (
        "recipe: balance",
        "recipe: balence",
    ): "line 13: tasks.wheel.recipe: recipe = 'balence': unknown; did you mean",
    (
        "  wheel:\n    recipe: balance\n",
        "  football:\n",
    ): "line 12: tasks.football.recipe: recipe = 'football': unknown; give one of navigation",
    (
        "    recipe: balance\n",
        "    recipes: a\n",
    ): "line 13: task wheel: recipes: unknown key; did you mean recipe?",
    ("[mappo, ippo]", "[mappo, ipo]"): "line 17: tasks.wheel.algorithms: ipo: unknown; did you mean ippo?",
    ("[mappo, ippo]", "[mappo, mappo]"): "line 17: tasks.wheel.algorithms: every algorithm may appear only once",
    ("[mappo, ippo]", "mappo"): "line 17: tasks.wheel.algorithms: must be a list of names",
    ("success: terminated", "success: [a]"): "line 18: tasks.wheel.success: must be the name of a measurement",
    ("  wheel:\n", "  give_way:\n"): "line 12: tasks.give_way: task 'give_way': a name has 1 to 63 lower-case",
    ("  mappo:\n", "  mappo: 5\n"): "line 7: algorithms.mappo: must hold keys and values",
    ("  mappo:\n", "  mappo: {seed: 5}\n"): "line 7: algorithms.mappo: seed: the seeds of a matrix stand under",
    ("  mappo:\n", "  mappo:\n  mappo:\n"): "line 8: mappo: given more than once",
    ("{memory: gru}", "{}"): "line 11: task navigation, gru: the same configuration as task navigation, mappo",
    ("{memory: gru}", "{memory: gru}, evaluation: {seeds: [9]}"): "evaluation.seeds: the algorithm gru changes it",
    ("{critic: own}", "{critic: own}, environment: {max_episode_frames: 9}"): "give it in the changes of the task",
    ("epochs: 2,", "epochs: .nan,"): "line 4: changes.learner.epochs: nan: numbers must be finite",
    ("epochs: 2,", "epochs: 2026-01-01,"): "line 4: changes.learner.epochs: read as a date; write it in quotes",
    ("changes:\n  learner", "changes:\n - learner"): "not YAML",
    ("  wheel:\n", "  ? [a]\n  : {}\n  wheel:\n"): "a key must be text",
}


@pytest.mark.parametrize("change", WRONG)
def test_wrong_file_is_refused_with_the_line_and_the_fix(tmp_path, change):
    assert change[0] in FILE
    assert WRONG[change] in refusal(tmp_path, FILE.replace(*change, 1))


def test_every_problem_of_the_configurations_is_named_at_once(tmp_path):
    text = refusal(
        tmp_path, FILE.replace("epochs: 5", "epochs: -5").replace("clip_epsilon: 0.1", "clip_epsilon: 7")
    )
    assert "line 8: task navigation, ippo: learner.epochs = -5" in text
    assert "line 16: task wheel, mappo: learner.clip_epsilon = 7" in text


def test_two_cells_with_one_name_are_refused(tmp_path):
    text = "name: a\nseeds: [0]\nalgorithms: {b: {}, a-b: {networks: {critic: own}}}\ntasks:\n  navigation: {}\n"
    text += "  navigation-a: {recipe: navigation, changes: {learner: {epochs: 3}}}\n"
    assert (
        "line 6: task navigation-a, b: its run would be named navigation-a-b-0, as that of task navigation, a-b"
        in (refusal(tmp_path, text))
    )


def test_name_that_is_too_long_with_task_and_seed_is_refused(tmp_path):
    text = f"name: a\nseeds: [0]\nalgorithms: {{{'b' * 60}: {{}}}}\ntasks: {{navigation: {{}}}}\n"
    assert "63 lower-case letters, digits and hyphens (it has 73)" in refusal(tmp_path, text)


def test_matrix_with_too_many_cells_is_refused(tmp_path):
    text = FILE.replace("[3, 1]", str(list(range(3000))))
    assert "15000 cells: a matrix has at most 10000" in refusal(tmp_path, text)


def test_missing_file_and_a_directory_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        read_matrix(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_matrix(tmp_path)
