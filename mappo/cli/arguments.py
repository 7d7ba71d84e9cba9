"""The flags of commands, made from configurations: one flag for each field, with its help text and range.

This file is long because the commands of `mappo` and of `pipelines` share these flags.
"""

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mappo.cli.merging import merge
from mappo.cli.run_names import RUNS
from mappo.config import ExperimentConfig, require_run_name
from mappo.errors import ConfigError
from mappo.monitoring.mlflow_settings import URI_VARIABLE, require_mlflow
from mappo.promotion.gate import Gate
from mappo.recipes import DEFAULT_RECIPE, RECIPES, recipe
from mappo.reporting.webhook import required_webhook
from mappo.strict_json import checked, parse_json, parse_json_object, to_dict
from mappo.tuning.search_space import extended_space
from mappo.tuning.study_config import StudyConfig

Fields = list[tuple[str, dict[str, Any]]]  # dotted path, JSON schema
Commands = Any  # argparse's private type of the object that add_subparsers returns
CHAMPIONS_HELP = "location of champions: a directory or s3://bucket/prefix (default: champions)"
RUN_HELP = "a run: its directory, such as runs/first, its name, if it is in runs, or s3://bucket/prefix/first"
Group = Any  # argparse's private type of the object that add_argument_group returns
RECIPE_HELP = f"the configuration to start from: {', '.join(RECIPES)} (default: {DEFAULT_RECIPE})"
_DEFAULTS_NOTE = (
    f"Defaults of fields are those of the recipe {DEFAULT_RECIPE}; `mappo show-config RECIPE` prints others."
)
_SHORT_FLAGS = {"budget.num_trials": "trials", "budget.hours": "hours", "retraining.num_seeds": "retrain-seeds"}
_LOOSE = "experiment"  # the title of the flags that belong to no section


def add_command(
    commands: Commands, name: str, execute: Callable[[argparse.Namespace], int] | None, summary: str
) -> argparse.ArgumentParser:
    """Add a command with its summary. `execute` returns the exit status; None if the command's actions set it."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    command.set_defaults(execute=execute)
    return command


def add_config_arguments(
    parser: argparse.ArgumentParser, with_recipe: bool = True, required: str = "", recipe_help: str = ""
) -> None:
    """Add `[RECIPE] [--config FILE]` and one dotted flag for each field, such as --learner.clip-epsilon.

    `required` names the positional arguments of the usage line, which does not list every field. Help texts show
    the default recipe's values; without a recipe, the defaults are those of a run, which only the command knows.
    """
    words = ["%(prog)s", required, "[RECIPE]" if with_recipe else "", "[--config FILE]"]
    parser.usage = " ".join([*filter(None, words), "[--SECTION.FIELD VALUE ...] [options]"])
    if with_recipe:
        parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=recipe_help or RECIPE_HELP)
        parser.epilog = "\n\n".join(filter(None, [parser.epilog, _DEFAULTS_NOTE]))
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON file whose fields replace the recipe's: what show-config prints, or a part of it",
    )
    defaults = to_dict(recipe(DEFAULT_RECIPE)) if with_recipe else None
    for section, fields in _sections(ExperimentConfig).items():
        values = defaults[section] if defaults and section != _LOOSE else defaults
        _add_fields(parser.add_argument_group(section), fields, values)


def add_gate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of `Gate`, such as --gate.margin."""
    _add_group(parser, "gate", _sections(StudyConfig)["gate"], with_defaults=True)


def add_study_arguments(parser: argparse.ArgumentParser, is_required: bool) -> Group:
    """Add `--study NAME` and one flag for each field of `StudyConfig`; return the group of `--study`."""
    group = parser.add_argument_group("study", "see docs/tuning.md")
    group.add_argument(
        "--study",
        required=is_required,
        metavar="NAME",
        help="tune the configuration; name of the study, which continues if it exists",
    )
    sections = _sections(StudyConfig)
    _add_fields(group, sections["budget"], _schema_defaults(sections["budget"]))
    ((_, space),) = sections[_LOOSE]
    group.add_argument("--space", default="{}", metavar="JSON", help=_help(space))
    add_retraining_arguments(parser)
    _add_group(parser, "tuning", sections["tuning"], with_defaults=True)
    return group


def add_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a study's budget to a command that continues one; a flag left out changes nothing."""
    group = parser.add_argument_group("study", "a setting that is not given stays as it was")
    _add_fields(group, _sections(StudyConfig)["budget"])


def add_retraining_arguments(parser: argparse.ArgumentParser, is_resumed: bool = False) -> None:
    """Add the number of workers, and the flags of what follows the trials: retraining, promotion and its gate.

    `is_resumed`: a flag left out keeps the study's own setting.
    """
    note = "a setting that is not given stays as it was" if is_resumed else None
    group = parser.add_argument_group("workers, retraining and promotion", note)
    group.add_argument(
        "--workers", type=count, default=1, metavar="N", help="number of worker processes (default: 1)"
    )
    retraining = _sections(StudyConfig)["retraining"]
    _add_fields(group, retraining, None if is_resumed else _schema_defaults(retraining))
    default = "as the study was given it" if is_resumed else "promote nothing"
    group.add_argument(
        "--champions",
        default=None if is_resumed else "",
        metavar="LOCATION",
        help="promote the best there if the gate lets it pass: a directory or s3://bucket/prefix "
        f"(default: {default})",
    )
    _add_group(parser, "gate", _sections(StudyConfig)["gate"], with_defaults=not is_resumed)


def count(text: str) -> int:
    """Return the number of things that a flag gives, at least one."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be 1 or more")
    return value


def study_config_from_arguments(arguments: argparse.Namespace, config: ExperimentConfig) -> StudyConfig:
    """Return the settings of a study that the flags give, checked together with the configuration.

    Raises:
        ConfigError: a file cannot be read, or a value is not allowed.
    """
    values = study_changes_from_arguments(arguments)
    values["space"] = _space_of(arguments.space)
    settings = checked(StudyConfig, values)
    extended_space(settings.space, config)
    return settings


def study_changes_from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of `StudyConfig` that flags give, as nested JSON; others are left out."""
    sections = _sections(StudyConfig).items()
    return _values_of(arguments, [field for name, fields in sections if name != _LOOSE for field in fields])


def gate_from_arguments(arguments: argparse.Namespace) -> Gate:
    """Return the gate that the flags describe.

    Raises:
        ConfigError: a value is not allowed.
    """
    return checked(Gate, _values_of(arguments, _sections(StudyConfig)["gate"]).get("gate", {}))


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument RUN, and `--checkpoint` for one of the run's checkpoints."""
    parser.add_argument("run_location", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        default="best",
        help="checkpoint to use: best, last, or the number of an iteration (default: best)",
    )


def add_format_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--output`, the format of a look-up's result."""
    parser.add_argument(
        "--output",
        choices=("table", "json"),
        default="table",
        help="format: table for people, json for scripts (default: table)",
    )


def add_keep_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--keep`, the number of newest checkpoints that stay."""
    parser.add_argument(
        "--keep",
        type=count,
        metavar="N",
        default=3,
        help="number of newest checkpoints to keep, besides the best (default: 3)",
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--run NAME` and `--store STORE`, which say where a run is kept."""
    parser.add_argument(
        "--run",
        metavar="NAME",
        default=f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}",
        help="name of the run; an existing run is resumed (default: the date, the time and a random number)",
    )
    parser.add_argument(
        "--store",
        metavar="STORE",
        default=RUNS,
        help="store of runs: a directory, s3://bucket/prefix or minio://bucket/prefix; the environment gives "
        f"endpoint and credentials (default: {RUNS})",
    )


def add_monitor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of monitoring; `apply_monitor_arguments` passes their values on."""
    group = parser.add_argument_group("monitoring", "see docs/monitoring.md")
    for variable, metavar, description in (
        (
            "MAPPO_METRICS_PORT",
            "PORT",
            "port where training serves its metrics to Prometheus; 0 takes any free port",
        ),
        ("MAPPO_PUSHGATEWAY", "URL", "Pushgateway that receives the metrics of stages too short to be scraped"),
    ):
        flag = variable.removeprefix("MAPPO_").lower().replace("_", "-")
        group.add_argument(
            f"--{flag}",
            dest=variable,
            metavar=metavar,
            help=f"{description} (default: {variable} in the environment)",
        )
    _add_reporting(group)


def add_reporting_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of MLflow and of messages; `apply_monitor_arguments` passes their values on."""
    _add_reporting(parser.add_argument_group("monitoring", "see docs/monitoring.md"))


def _add_reporting(group: Group) -> None:
    group.add_argument(
        "--notify",
        action="store_true",
        help="send a message when the command ends, to the webhook whose URL is in MAPPO_NOTIFY_URL",
    )
    group.add_argument(
        "--mlflow",
        dest=URI_VARIABLE,
        metavar="URL",
        help="MLflow server that receives curves, configuration and evaluations; a password belongs into "
        f"MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (default: {URI_VARIABLE} in the environment)",
    )


def apply_monitor_arguments(arguments: argparse.Namespace) -> None:
    """Set the environment variables of monitoring, which stages read, also those in other processes.

    Raises:
        ConfigError: `--mlflow` has no URL of a server, or no package mlflow-skinny; or `--notify` has no webhook.
    """
    if getattr(arguments, "notify", False):
        required_webhook()
    prefixes = ("MAPPO_", URI_VARIABLE)
    variables = {name: value for name, value in vars(arguments).items() if name.startswith(prefixes) and value}
    if URI_VARIABLE in variables:
        require_mlflow(variables)
    os.environ.update(variables)


def run_directory(arguments: argparse.Namespace) -> Path:
    """Return the directory of a run's local files: the run itself if the store is a directory, else below runs/.

    Raises:
        ConfigError: the name of the run is not allowed.
    """
    store: str = RUNS if "://" in arguments.store else arguments.store
    return Path(store) / require_run_name(arguments.run)


def config_from_arguments(arguments: argparse.Namespace) -> ExperimentConfig:
    """Return the recipe's configuration with the changes of the file, then of the flags.

    Raises:
        ConfigError: the recipe is unknown, the file cannot be read, or a value is not allowed.
    """
    if "configuration" not in arguments:  # merged once, so that its note is printed once
        start = recipe(arguments.recipe or DEFAULT_RECIPE)
        arguments.configuration = merge(start, *changes_from_arguments(arguments))
    config: ExperimentConfig = arguments.configuration
    return config


def changes_from_arguments(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the user changes: the fields of the file, which may be none, and those of the flags.

    Raises:
        ConfigError: the file cannot be read.
    """
    if arguments.config is None:
        return {}, _flags(arguments)
    source = f"--config {arguments.config}"
    return parse_json_object(_text_of(source, arguments.config), source), _flags(arguments)


def _text_of(source: str, file: Path) -> str:
    """Return the text of a file that a flag names; `source` is the flag with its value."""
    try:
        return file.read_text()
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: not a text file: {error}") from None


def search_current_directory() -> None:
    """Search the current directory for modules, as with python -m, so that a user can name a scenario in it."""
    if "" not in sys.path:
        sys.path.insert(0, "")


def dashed(argv: Sequence[str]) -> list[str]:
    """Write flags with hyphens: --learner.clip_epsilon becomes --learner.clip-epsilon."""
    words = [word.partition("=") if word.startswith("--") else (word, "", "") for word in argv]
    return [
        (name.replace("_", "-") if name.startswith("--") else name) + equals + value
        for name, equals, value in words
    ]


def _flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the configuration that flags give, as nested JSON."""
    return _values_of(arguments, [field for fields in _sections(ExperimentConfig).values() for field in fields])


def _values_of(arguments: argparse.Namespace, fields: Fields) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for path, schema in fields:
        text = getattr(arguments, path, None)  # a command may have the flags of some fields only
        if text is None:
            continue
        *sections, name = path.split(".")
        target = changes
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = _parse(path, text, schema)
    return changes


def _add_group(parser: argparse.ArgumentParser, title: str, fields: Fields, with_defaults: bool = False) -> None:
    _add_fields(parser.add_argument_group(title), fields, _schema_defaults(fields) if with_defaults else None)


def _schema_defaults(fields: Fields) -> dict[str, Any]:
    return {path.rpartition(".")[2]: schema.get("default", {}) for path, schema in fields}


def _add_fields(group: Group, fields: Fields, defaults: Mapping[str, Any] | None = None) -> None:
    """Add one flag for each field. Help texts show the `defaults`, which are by the field's name."""
    for path, schema in fields:
        flag = _SHORT_FLAGS.get(path, path.replace("_", "-"))
        default = None if defaults is None else _flag_value(defaults[path.rpartition(".")[2]])
        group.add_argument(
            f"--{flag}",
            dest=path,
            metavar=_metavar(schema),
            choices=_choices(schema),
            default=None,
            help=_help(schema, default),
        )


def _space_of(text: str) -> dict[str, Any]:
    """Return the JSON object that --space gives: itself, or in a file."""
    is_object = text.lstrip().startswith("{")
    source = "--space" if is_object else f"--space {text} (neither a JSON object nor a file with one)"
    return parse_json_object(text if is_object else _text_of(source, Path(text)), source)


def _parse(path: str, text: str, schema: dict[str, Any]) -> Any:
    """Return a flag's text as a JSON value; text that is not JSON stays text, for the configuration to refuse."""
    kind = schema["type"]
    if kind == "string":
        return text
    if kind == "array" and not text.lstrip().startswith("["):
        text = f"[{text}]"
    try:
        return parse_json(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError as error:
        if kind != "object":
            return text
        example = '{"n_agents": 3}'
        raise ConfigError(f"{path}: {text} is not JSON: {error}; quote names and text: '{example}'") from None


@cache
def _sections(kind: type) -> dict[str, Fields]:
    """Return the sections of a configuration by name, each with (dotted path, JSON schema) of its fields.

    The last one, `_LOOSE`, has the fields that belong to no section.
    """
    schema = TypeAdapter(kind).json_schema()
    sections: dict[str, Fields] = {}
    loose: Fields = []
    for name, entry in schema["properties"].items():
        if "$ref" not in entry:
            loose.append((name, entry))
            continue
        inner = schema["$defs"][entry["$ref"].split("/")[-1]]
        sections[name] = [(f"{name}.{key}", value) for key, value in inner["properties"].items()]
    return {**sections, _LOOSE: loose}


def _metavar(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return "{" + ",".join(schema["enum"]) + "}"
    return {
        "integer": "N",
        "number": "X",
        "boolean": "{true,false}",
        "array": "N,N,...",
        "object": "JSON",
        "string": "TEXT",
    }[schema["type"]]


def _choices(schema: dict[str, Any]) -> tuple[str, ...] | None:
    return ("true", "false") if schema["type"] == "boolean" else schema.get("enum")


def _help(schema: dict[str, Any], default: str | None = None) -> str:
    limits = _limits(schema)
    if "items" in schema:
        limits = f"at least {schema['minItems']}; each {_limits(schema['items'])}"
    if default is not None:
        limits = "; ".join(filter(None, [limits, f"default: {default}"]))
    return f"{schema['description']}{f' ({limits})' if limits else ''}".replace("%", "%%")


def _flag_value(value: Any) -> str:
    """Return a value as a flag takes it."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _limits(schema: dict[str, Any]) -> str:
    return ", ".join(
        f"{sign} {schema[key]}"
        for key, sign in (
            ("minimum", ">="),
            ("exclusiveMinimum", ">"),
            ("maximum", "<="),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    )
