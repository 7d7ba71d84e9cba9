"""The measured results of recipes, against the recipes of today."""

import pytest

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
