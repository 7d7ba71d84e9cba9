"""The command `submit`: start a run on Kubeflow."""

import argparse
from typing import Any

from mappo.cli.arguments import add_config_arguments
from pipelines.commands.arguments import (
    add_command,
    add_connection_arguments,
    add_pipeline_arguments,
    add_site_arguments,
    add_submission_arguments,
    connect,
    submission_of,
)
from pipelines.commands.output import add_output_argument, show_one
from pipelines.commands.runs import add_watch_arguments, run_summary, watch
from pipelines.kubeflow import client

_EPILOG = """examples:
  python -m pipelines submit balance --image ghcr.io/you/mappo:1.0 --watch
  python -m pipelines submit --site site.yaml --seeds 0,1,2 -p store=s3://bucket/runs -p run=first
  python -m pipelines submit --site site.yaml --matrix matrix.yaml -p store=s3://bucket/runs
  python -m pipelines submit --file compiled/training.yaml --upload nightly-7 -p train_gpu_count=1
"""


def add(commands: Any) -> None:
    """Add the command `submit`."""
    summary = "start a run on Kubeflow, after checking its parameters; the pipeline is compiled now or is a file"
    command = add_command(commands, "submit", summary, _EPILOG)
    command.add_argument(
        "--name",
        default="",
        metavar="NAME",
        help="display name of the run; a time stamp is appended (default: the pipeline's name)",
    )
    command.add_argument("--watch", action="store_true", help="wait for the run and show its stages")
    add_watch_arguments(command)
    add_submission_arguments(command)
    add_pipeline_arguments(command)
    add_site_arguments(command)
    add_connection_arguments(command)
    add_output_argument(command)
    add_config_arguments(command)
    command.set_defaults(execute=_submit)


def _submit(arguments: argparse.Namespace) -> int:
    submission = submission_of(arguments)
    kubeflow = connect(arguments)
    run = client.submit(kubeflow, submission, arguments.name)
    if not (arguments.watch and arguments.output == "json"):  # watch prints one JSON object at the end
        show_one(arguments, run_summary(kubeflow, run))
    return watch(arguments, kubeflow, run) if arguments.watch else 0
