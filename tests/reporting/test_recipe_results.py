"""The measured results of recipes and the studies that tuned them, against the recipes of today."""

import csv
from pathlib import Path

import pytest

from mappo.config import fields_of
from mappo.recipes import RECIPES, recipe
from mappo.reporting.recipe_results import changes_of_recipe, recipe_results


@pytest.mark.parametrize("name", RECIPES)
def test_result_is_of_the_recipe_as_it_is_today(name):
    """If this fails: `python -m benchmarks.recipes NAME --save` measures the recipe again."""
    result = recipe_results()[name]
    assert result.changes == changes_of_recipe(name)
    assert result.frames > 0
    assert result.random.value < result.trained.value


def test_line_says_when_less_than_the_recipe_was_trained():
    result = recipe_results()["benchmarl-fine-tuned"]
    line = result.line(recipe("benchmarl-fine-tuned").collection.total_frames)
    assert line.startswith("600,000 of 10,000,000 frames in 11 min: return 0.99 [0.96, 1.03], random -0.5")
    assert recipe_results()["balance"].line(300_000).startswith("300,000 frames in ")


@pytest.mark.parametrize("file", sorted(Path("docs/results/studies").glob("*.csv")), ids=lambda file: file.stem)
def test_recipe_has_the_values_of_a_trial_of_its_study(file):
    """The values are rounded to two digits. docs/recipes.md says why a trial was chosen."""
    fields = fields_of(recipe(file.stem))
    trials = [row for row in csv.DictReader(file.read_text().splitlines()) if row["state"] == "complete"]
    tuned = [name for name in trials[0] if "." in name]
    assert len(trials) >= 2
    assert tuned
    own = [float(fields[name]) for name in tuned]
    assert any(own == [float(f"{float(trial[name]):.2g}") for name in tuned] for trial in trials)
