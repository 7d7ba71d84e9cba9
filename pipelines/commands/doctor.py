"""The command `doctor`: check that a cluster has everything that a run needs."""

import argparse
import textwrap
from dataclasses import asdict
from typing import Any

from pipelines.commands.arguments import (
    add_command,
    add_connection_arguments,
    add_site_arguments,
    connect,
    connection_of,
    site_of,
)
from pipelines.commands.output import add_output_argument, console, show_rows
from pipelines.kubeflow.doctor import findings
from pipelines.kubeflow.namespace_checks import Finding, Target

_EPILOG = """examples:
  python -m pipelines doctor --site site.yaml --store s3://bucket/runs
  python -m pipelines doctor --namespace team --service-account mappo-runner
  python -m pipelines doctor --endpoint http://localhost:8888 --output json

exit status: 0 no check failed (there may be warnings), 1 something that a run needs is missing
"""
_STYLES = {"ok": "green", "warning": "yellow", "failed": "red"}
_PATIENCE_SECONDS = 10.0


def add(commands: Any) -> None:
    """Add the command `doctor`."""
    summary = "check API, versions, credentials, secrets, rights, retries, nodes and stores, and show fixes"
    command = add_command(commands, "doctor", summary, _EPILOG)
    command.add_argument(
        "--store", default="", metavar="URI", help="store of runs; check from here that it can be read and written"
    )
    command.add_argument(
        "--pipeline-root",
        default="",
        metavar="URI",
        help="store of artifacts; check it from here (default: only show the root of config map kfp-launcher)",
    )
    command.add_argument(
        "--service-account",
        default="",
        metavar="NAME",
        help="service account of the pods (default: Kubeflow's own)",
    )
    add_site_arguments(command)
    add_connection_arguments(command)
    add_output_argument(command)
    command.set_defaults(execute=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    results = []
    for finding in findings(
        connection_of(arguments),
        lambda: connect(arguments, _PATIENCE_SECONDS),
        Target(site_of(arguments), arguments.service_account, arguments.store, arguments.pipeline_root),
    ):
        results.append(finding)
        if arguments.output == "table":
            _print(finding)
    if arguments.output == "json":
        show_rows(arguments, [asdict(finding) for finding in results], "")
    return int(any(finding.state == "failed" for finding in results))


def _print(finding: Finding) -> None:
    terminal = console()
    terminal.print(f"{finding.state:<8} {finding.check}: {finding.detail}", style=_STYLES[finding.state])
    if finding.fix and finding.state != "ok":
        terminal.print(textwrap.indent(finding.fix, " " * 9), soft_wrap=True)
