"""Command-line flags made from the configuration: one flag a field, help and range from its declaration."""

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mappo.config import ExperimentConfig, override, require_run_name
from mappo.errors import ConfigError
from mappo.promotion.gate import Gate
from mappo.recipes import DEFAULT_RECIPE, RECIPES, recipe
from mappo.strict_json import checked, parse_json, parse_json_object
from mappo.tuning.search_space import TuningConfig, extended_space

Fields = list[tuple[str, dict[str, Any]]]  # dotted path, JSON schema
Commands = Any  # argparse's private type of the object that add_subparsers returns
CHAMPIONS_HELP = "where champions are kept: a directory or s3://bucket/prefix (default: champions)"
RUN_HELP = "a run: its directory, such as runs/first, or s3://bucket/prefix/first"
_RUNS = "runs"
_SECTION = "experiment"  # the title of the flags that belong to no section


def add_command(
    commands: Commands, name: str, execute: Callable[[argparse.Namespace], int] | None, summary: str
) -> argparse.ArgumentParser:
    """Add a command with its summary. `execute` returns the exit status; None if the command's actions set it."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary, allow_abbrev=False
    )
    command.set_defaults(execute=execute)
    return command


def add_config_arguments(parser: argparse.ArgumentParser, with_recipe: bool = True, required: str = "") -> None:
    """Add `[RECIPE] [--config FILE]` and one dotted flag for each field, such as --learner.clip-epsilon.

    `required` is what else the command needs, for its usage line, which does not list every field.
    """
    words = ["%(prog)s", required, "[RECIPE]" if with_recipe else "", "[--config FILE]"]
    parser.usage = " ".join([*filter(None, words), "[--SECTION.FIELD VALUE ...] [options]"])
    if with_recipe:
        parser.add_argument(
            "recipe",
            nargs="?",
            metavar="RECIPE",
            help=f"the configuration to start from: {', '.join(RECIPES)} (default: {DEFAULT_RECIPE})",
        )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON file whose fields replace the recipe's, as show-config prints it or any part of it",
    )
    for section, fields in _sections():
        _add_group(parser, section, fields)


def add_gate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one flag for each field of `Gate`, such as --gate.margin."""
    _add_group(parser, "gate", _gate_fields())


def add_tuning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--space` and one flag for each field of `TuningConfig`, such as --tuning.pruner."""
    parser.add_argument(
        "--space",
        default="{}",
        metavar="JSON",
        help="what is tuned besides or in place of the default, a JSON object or a file with one, such as "
        '{"learner.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": true}}; null leaves a '
        "field out (default: clip_epsilon, gae_lambda and epochs of the learner)",
    )
    _add_group(parser, "tuning", _tuning_fields())


def add_study_arguments(parser: argparse.ArgumentParser, is_required: bool) -> None:
    """Add what is asked of a study: `--study NAME`, `--trials`, `--hours`, and all of `add_tuning_arguments`."""
    group = parser.add_argument_group("study", "see docs/tuning.md")
    group.add_argument(
        "--study",
        required=is_required,
        metavar="NAME",
        help="tune the configuration, in a study of this name; one that was begun is gone on with",
    )
    group.add_argument("--trials", type=count, default=20, metavar="N", help="trials of the study (default: 20)")
    group.add_argument(
        "--hours", type=float, default=0.0, metavar="X", help="start no trial later than this (default: no limit)"
    )
    add_finish_arguments(parser)
    add_tuning_arguments(parser)


def add_finish_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how many work on a study, and what becomes of its best."""
    group = parser.add_argument_group("work on a study, and what becomes of its best")
    group.add_argument("--workers", type=count, default=1, metavar="N", help="that work on trials (default: 1)")
    group.add_argument(
        "--retrain-seeds",
        type=count,
        default=3,
        metavar="N",
        help="fresh seeds from which the best and the default are trained again, at least 2 (default: 3)",
    )
    group.add_argument(
        "--champions",
        default="",
        metavar="PLACE",
        help="put the best in its task's champion's place there, if the gate says so: a directory or "
        "s3://bucket/prefix (default: promote nothing)",
    )
    add_gate_arguments(parser)


def count(text: str) -> int:
    """A number of things, at least one, from a flag."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: must be 1 or more")
    return value


def tuning_from_arguments(
    arguments: argparse.Namespace, config: ExperimentConfig
) -> tuple[dict[str, Any], TuningConfig]:
    """What is tuned besides or in place of the default, as JSON; and how trials are judged.

    Raises:
        ConfigError: a file that cannot be read, or a value that is not allowed.
    """
    changes = parse_json_object(_text_or_file("--space", arguments.space))
    extended_space(changes, config)
    return changes, checked(TuningConfig, _given(arguments, _tuning_fields()).get("tuning", {}))


def gate_from_arguments(arguments: argparse.Namespace) -> Gate:
    """What a candidate must show.

    Raises:
        ConfigError: a value that is not allowed.
    """
    return checked(Gate, _given(arguments, _gate_fields()).get("gate", {}))


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--run NAME` and `--store STORE`, which say where a run is kept."""
    parser.add_argument(
        "--run",
        metavar="NAME",
        default=time.strftime("%Y%m%d-%H%M%S"),
        help="name of the run; one that was begun is gone on with (default: the date and time)",
    )
    parser.add_argument(
        "--store",
        metavar="STORE",
        default=_RUNS,
        help="where runs are kept: a directory, s3://bucket/prefix or minio://bucket/prefix; endpoint and "
        f"credentials come from the environment (default: {_RUNS})",
    )


def add_monitor_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how a stage can be watched; `apply_monitor_arguments` hands it on."""
    group = parser.add_argument_group("monitoring", "see docs/monitoring.md")
    for variable, metavar, description in (
        ("MAPPO_METRICS_PORT", "PORT", "training serves its metrics to Prometheus here; 0 takes any free port"),
        ("MAPPO_PUSHGATEWAY", "URL", "a Pushgateway, to which stages too short for Prometheus push their outcome"),
    ):
        flag = variable.removeprefix("MAPPO_").lower().replace("_", "-")
        group.add_argument(
            f"--{flag}",
            dest=variable,
            metavar=metavar,
            help=f"{description} (default: {variable} in the environment)",
        )


def apply_monitor_arguments(arguments: argparse.Namespace) -> None:
    """Put what was given into the environment, where stages look for it, also those in processes of their own."""
    given = {name: value for name, value in vars(arguments).items() if name.startswith("MAPPO_") and value}
    os.environ.update(given)


def run_directory(arguments: argparse.Namespace) -> Path:
    """Where a run's files on this machine go: its place in a store that is a directory, or below runs/.

    Raises:
        ConfigError: its name is not allowed.
    """
    store: str = _RUNS if "://" in arguments.store else arguments.store
    return Path(store) / require_run_name(arguments.run)


def config_from_arguments(arguments: argparse.Namespace) -> ExperimentConfig:
    """The recipe's configuration, changed by the file, changed by the flags.

    Raises:
        ConfigError: an unknown recipe, a file that cannot be read, or a value that is not allowed.
    """
    return override(recipe(arguments.recipe or DEFAULT_RECIPE), *changes_from_arguments(arguments))


def changes_from_arguments(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the user asked to change, for `override`: the file's fields, then the flags.

    Raises:
        ConfigError: the file cannot be read.
    """
    if arguments.config is None:
        return [_flags(arguments)]
    try:
        text = arguments.config.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {arguments.config}: {error}") from None
    return [parse_json_object(text), _flags(arguments)]


def dashed(argv: Sequence[str]) -> list[str]:
    """Flags spelt as in the JSON, --learner.clip_epsilon, become --learner.clip-epsilon."""
    words = [word.partition("=") if word.startswith("--") else (word, "", "") for word in argv]
    return [
        (name.replace("_", "-") if name.startswith("--") else name) + equals + value
        for name, equals, value in words
    ]


def _flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, nested as the configuration is."""
    return _given(arguments, [field for _, fields in _sections() for field in fields])


def _given(arguments: argparse.Namespace, fields: Fields) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for path, schema in fields:
        text = getattr(arguments, path)
        if text is None:
            continue
        *sections, name = path.split(".")
        target = changes
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = _parse(path, text, schema)
    return changes


def _add_group(parser: argparse.ArgumentParser, title: str, fields: Fields) -> None:
    group = parser.add_argument_group(title)
    for path, schema in fields:
        group.add_argument(
            f"--{path.replace('_', '-')}",
            dest=path,
            metavar=_metavar(schema),
            default=None,
            help=_help(schema),
        )


def _gate_fields() -> Fields:
    return _fields("gate", Gate)


def _tuning_fields() -> Fields:
    return _fields("tuning", TuningConfig)


def _fields(prefix: str, kind: type) -> Fields:
    schema = TypeAdapter(kind).json_schema()
    return [(f"{prefix}.{name}", value) for name, value in schema["properties"].items()]


def _text_or_file(flag: str, given: str) -> str:
    if given.lstrip().startswith("{"):
        return given
    try:
        return Path(given).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {given}: neither a JSON object nor a file with one: {error}") from None


def _parse(path: str, text: str, schema: dict[str, Any]) -> Any:
    """A flag's text as a JSON value; what is no JSON stays text, and the configuration says what is wrong."""
    if schema["type"] == "string":
        return text
    if schema["type"] == "array" and not text.lstrip().startswith("["):
        text = f"[{text}]"
    try:
        return parse_json(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValueError:
        return text


@cache
def _sections() -> tuple[tuple[str, Fields], ...]:
    """Sections in order, each with (dotted path, JSON schema) of its fields."""
    schema = TypeAdapter(ExperimentConfig).json_schema()
    sections: list[tuple[str, Fields]] = []
    loose: Fields = []
    for name, entry in schema["properties"].items():
        if "$ref" not in entry:
            loose.append((name, entry))
            continue
        inner = schema["$defs"][entry["$ref"].split("/")[-1]]
        sections.append((name, [(f"{name}.{key}", value) for key, value in inner["properties"].items()]))
    return (*sections, (_SECTION, loose))


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


def _help(schema: dict[str, Any]) -> str:
    limits = _limits(schema)
    if "items" in schema:
        limits = f"at least {schema['minItems']}; each {_limits(schema['items'])}"
    return f"{schema['description']}{f' ({limits})' if limits else ''}".replace("%", "%%")


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
