"""The commands `mappo recipes`, `mappo show-config` and `mappo schema`: configurations, and schemas of reports."""

import argparse
import inspect
import json
from typing import Any

from mappo.cli.arguments import (
    RECIPE_HELP,
    Commands,
    add_command,
    add_config_arguments,
    changes_from_arguments,
    config_from_arguments,
)
from mappo.cli.merging import merge
from mappo.cli.run_names import find_run, manifest_of, trained_config
from mappo.config import ExperimentConfig
from mappo.errors import NoCheckpoint
from mappo.recipes import DEFAULT_RECIPE, RECIPES
from mappo.reporting.recipe_results import recipe_results
from mappo.strict_json import to_dict

_REPORTS = ("validation", "evaluation", "comparison", "decision", "contract")


def add(commands: Commands) -> None:
    """Add the three commands."""
    command = add_command(
        commands, "schema", _schema, "print the JSON Schema of a report or of a policy's contract"
    )
    command.add_argument(
        "report", choices=_REPORTS, metavar="REPORT", help=f"kind of report: {', '.join(_REPORTS)}"
    )
    add_command(commands, "recipes", _recipes, "list the named configurations")
    summary = "print a complete configuration as JSON: that of a recipe or of a run"
    command = add_command(commands, "show-config", _show_config, summary)
    add_config_arguments(command, recipe_help=f"{RECIPE_HELP}; or a run, such as runs/first")


def _recipes(_: argparse.Namespace) -> int:
    results = recipe_results()
    for name, make in RECIPES.items():
        frames = make().collection.total_frames
        print(f"{name}: {inspect.getdoc(make)}")
        print(f"    {results[name].line(frames) if name in results else f'{frames:,} frames, not measured'}")
    return 0


def _show_config(arguments: argparse.Namespace) -> int:
    print(json.dumps(to_dict(_shown_config(arguments)), indent=2))
    return 0


def _shown_config(arguments: argparse.Namespace) -> ExperimentConfig:
    """Return the configuration of the recipe or of the run, with the changes of the file and the flags."""
    name = arguments.recipe or DEFAULT_RECIPE
    if name in RECIPES:
        return config_from_arguments(arguments)
    try:
        run = find_run(name)
    except NoCheckpoint:
        if "/" in name:
            raise
        return config_from_arguments(arguments)  # it raises: there is no such recipe
    return merge(trained_config(manifest_of(run, "last")), *changes_from_arguments(arguments))


def _schema(arguments: argparse.Namespace) -> int:
    from pydantic import TypeAdapter
    from pydantic.json_schema import GenerateJsonSchema

    from mappo.environment.validation import ValidationReport
    from mappo.evaluation.comparison import ComparisonReport
    from mappo.evaluation.evaluation import EvaluationReport
    from mappo.promotion.contract import Contract
    from mappo.promotion.promotion import Decision

    class EveryField(GenerateJsonSchema):
        """The schema of what mappo writes: every field is there, also one with a default for older files."""

        def field_is_required(self, field: Any, total: bool) -> bool:  # noqa: ARG002
            return True

    kinds: tuple[type, ...] = (ValidationReport, EvaluationReport, ComparisonReport, Decision, Contract)
    schema = TypeAdapter(dict(zip(_REPORTS, kinds, strict=True))[arguments.report]).json_schema(
        mode="serialization", schema_generator=EveryField
    )
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1))
    return 0
