"""`compile`: the YAML of one pipeline or of all, or whether files are up to date."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mappo.cli.arguments import add_config_arguments
from mappo.errors import ConfigError
from pipelines.commands.arguments import add_pipeline_arguments, add_site_arguments, compiled_of, pipeline_of
from pipelines.compiling import NAMES, difference

_EPILOG = """examples:
  python -m pipelines compile --image ghcr.io/you/mappo:1.0                all pipelines, into compiled/
  python -m pipelines compile --site site.yaml --output training.yaml      one; with --seeds or --study, another
  python -m pipelines compile --site site.yaml --check                     1 if the files in compiled/ are not that
"""
_SHOWN_LINES = 20


def add(commands: Any) -> None:
    """Add the command."""
    summary = "compile pipelines for Kubeflow"
    command = commands.add_parser(
        "compile",
        help=summary,
        description="Compile pipelines for Kubeflow. Equal inputs give equal files. The configuration becomes the "
        "default of a parameter.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument(
        "--pipeline",
        choices=("all", *NAMES),
        help="training: one run; seeds: several and their comparison; tuning: a study (default: all; for a file, "
        "as --seeds or --study says)",
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("compiled"),
        metavar="PATH",
        help="a directory, or for one pipeline a .yaml file (default: compiled)",
    )
    command.add_argument("--check", action="store_true", help="write nothing; exit with 1 if files would change")
    add_pipeline_arguments(command)
    add_site_arguments(command)
    add_config_arguments(command)
    command.set_defaults(execute=_compile)


def _compile(arguments: argparse.Namespace) -> int:
    is_file = arguments.output.suffix in (".yaml", ".yml")
    chosen = arguments.pipeline or (pipeline_of(arguments) if is_file else "all")
    if is_file and chosen == "all":
        raise ConfigError(f"--output {arguments.output}: one file for one pipeline: give --pipeline {NAMES[0]}")
    names = NAMES if chosen == "all" else (chosen,)
    outdated = 0
    for name in names:
        path = arguments.output if is_file else arguments.output / f"{name}.yaml"
        compiled = compiled_of(arguments, name)
        if arguments.check:
            outdated += _is_outdated(difference(path, compiled))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(compiled.text)
            print(f"wrote {path}")
    return 1 if outdated else 0


def _is_outdated(lines: list[str]) -> bool:
    if lines:
        print("\n".join(lines[:_SHOWN_LINES]), file=sys.stderr)
        if len(lines) > _SHOWN_LINES:
            print(f"... and {len(lines) - _SHOWN_LINES} lines more", file=sys.stderr)
    return bool(lines)
