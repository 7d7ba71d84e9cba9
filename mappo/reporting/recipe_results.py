"""The measured results of recipes, as `mappo recipes` shows them.

`python -m benchmarks.recipes --save` measures recipes and writes the results.
"""

from importlib.resources import files
from typing import Any

from pydantic import JsonValue
from pydantic.dataclasses import dataclass

from mappo.config import ExperimentConfig, fields_of
from mappo.evaluation.statistics import Estimate
from mappo.recipes import recipe
from mappo.strict_json import STRICT, checked, parse_json_object

FILE = "recipe_results.json"


@dataclass(frozen=True, config=STRICT)
class RecipeResult:
    """The result of training a recipe and of evaluating its best checkpoint.

    changes: the fields in which the recipe differed from the defaults when it was measured, by dotted name.
    seconds: the wall-clock time of training. The intervals are over the episodes of the evaluation. note: what
    else a reader must know.
    """

    changes: dict[str, JsonValue]
    seed: int
    frames: int
    seconds: float
    trained: Estimate
    random: Estimate
    heuristic: Estimate | None = None
    note: str = ""

    def line(self, total_frames: int) -> str:
        """Return the result as one line, of a recipe that trains for `total_frames`."""
        baselines = {"heuristic": self.heuristic, "random": self.random}
        texts = [f"return {self.trained}", *(f"{name} {mean}" for name, mean in baselines.items() if mean)]
        minutes, note = self.seconds / 60, f"; {self.note}" if self.note else ""
        time = f"{self.seconds:.0f} s" if minutes < 10 else f"{minutes:.0f} min"
        of_total = f" of {total_frames:,}" if self.frames < total_frames else ""
        return f"{self.frames:,}{of_total} frames in {time}: {', '.join(texts)}{note}"


def recipe_results() -> dict[str, RecipeResult]:
    """Return the results of the recipes that have been measured, by name.

    Raises:
        ConfigError: the file of results is not valid.
    """
    records = parse_json_object(files("mappo.reporting").joinpath(FILE).read_text(), FILE)
    return {name: checked(RecipeResult, record) for name, record in records.items()}


def changes_of_recipe(name: str) -> dict[str, Any]:
    """Return the fields in which a recipe differs from the defaults, as JSON values by dotted name."""
    defaults = fields_of(ExperimentConfig())
    return {field: value for field, value in fields_of(recipe(name)).items() if value != defaults[field]}
