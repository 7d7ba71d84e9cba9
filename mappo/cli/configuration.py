"""The commands `mappo recipes`, `mappo show-config` and `mappo schema`: configurations, and schemas of reports."""

import argparse
import inspect
import json

from mappo.cli.arguments import Commands, add_command, add_config_arguments, config_from_arguments
from mappo.recipes import RECIPES
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
    command = add_command(commands, "show-config", _show_config, "print a complete configuration as JSON")
    add_config_arguments(command)


def _recipes(_: argparse.Namespace) -> int:
    for name, make in RECIPES.items():
        summary, *details = inspect.cleandoc(make.__doc__ or "").splitlines()
        print(f"{name}, {make().collection.total_frames:,} frames: {summary}")
        print("\n".join(f"    {line}" for line in details if line))
    return 0


def _show_config(arguments: argparse.Namespace) -> int:
    print(json.dumps(to_dict(config_from_arguments(arguments)), indent=2))
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    from pydantic import TypeAdapter

    from mappo.environment.validation import ValidationReport
    from mappo.evaluation.comparison import ComparisonReport
    from mappo.evaluation.evaluation import EvaluationReport
    from mappo.promotion.contract import Contract
    from mappo.promotion.promotion import Decision

    kinds: tuple[type, ...] = (ValidationReport, EvaluationReport, ComparisonReport, Decision, Contract)
    schema = TypeAdapter(dict(zip(_REPORTS, kinds, strict=True))[arguments.report]).json_schema(
        mode="serialization"
    )
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}, indent=1))
    return 0
