"""The command `compile`: write the YAML of one pipeline or of all, or check that files are up to date."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mappo.cli.arguments import add_config_arguments
from mappo.errors import ConfigError
from pipelines.commands.arguments import add_pipeline_arguments, add_site_arguments, compiled_of, pipeline_of
from pipelines.compiling import NAMES, difference
from pipelines.manifests import kubernetes_manifests

_EPILOG = """examples:
  python -m pipelines compile --image ghcr.io/you/mappo:1.0                write all pipelines into compiled/
  python -m pipelines compile --site site.yaml --output training.yaml      write one pipeline into a file
  python -m pipelines compile --site site.yaml --check                     exit with 1 if compiled/ is out of date
  python -m pipelines compile --site site.yaml --format kubernetes --output manifests
"""
_SHOWN_LINES = 20


def add(commands: Any) -> None:
    """Add the command `compile`."""
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
        help="training: one run; seeds: several runs and their comparison; tuning: a study; matrix: tasks x "
        "algorithms x seeds (default: all, or if --output is a file, the one that --seeds, --matrix or --study "
        "selects)",
    )
    command.add_argument(
        "--output",
        type=Path,
        default=Path("compiled"),
        metavar="PATH",
        help="a directory, or a .yaml file for one pipeline (default: compiled)",
    )
    command.add_argument(
        "--format",
        choices=("pipeline", "kubernetes"),
        default="pipeline",
        help="pipeline: the YAML that `submit --file` and Kubeflow's UI read; kubernetes: a Pipeline and a "
        "PipelineVersion to apply, for a Kubeflow that keeps pipelines in Kubernetes (default: pipeline)",
    )
    command.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file would change")
    add_pipeline_arguments(command)
    add_site_arguments(command)
    add_config_arguments(command)
    command.set_defaults(execute=_compile)


def _compile(arguments: argparse.Namespace) -> int:
    is_file = arguments.output.suffix in (".yaml", ".yml")
    selected = arguments.pipeline or (pipeline_of(arguments) if is_file else "all")
    if is_file and selected == "all":
        raise ConfigError(f"--output {arguments.output}: a file holds one pipeline: give --pipeline {NAMES[0]}")
    names = NAMES if selected == "all" else (selected,)
    num_outdated = 0
    for name in names:
        path = arguments.output if is_file else arguments.output / f"{name}.yaml"
        compiled = compiled_of(arguments, name)
        text = kubernetes_manifests(compiled) if arguments.format == "kubernetes" else compiled.text
        if arguments.check:
            num_outdated += _show_difference(difference(path, text))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path}")
    return 1 if num_outdated else 0


def _show_difference(lines: list[str]) -> bool:
    """Print the first lines of a difference; return whether there is one."""
    if lines:
        print("\n".join(lines[:_SHOWN_LINES]), file=sys.stderr)
        if len(lines) > _SHOWN_LINES:
            print(f"... and {len(lines) - _SHOWN_LINES} lines more", file=sys.stderr)
    return bool(lines)
