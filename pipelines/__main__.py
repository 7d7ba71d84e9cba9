"""Run a pipeline on this machine, or compile, submit, watch and schedule it on Kubeflow."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import mappo
from mappo.cli import completion
from mappo.cli.arguments import dashed, search_current_directory
from mappo.cli.parser import Parser
from mappo.compute.standard_streams import OutputFailed, run_command
from mappo.errors import MappoError, reason_of

_EXAMPLES = """examples:
  python -m pipelines run                                   run the navigation recipe here, into runs/
  python -m pipelines run balance --seed 3                  choose a recipe and a seed
  python -m pipelines run --run first --store s3://bucket/runs
                                                            name the run: the same command resumes it
  python -m pipelines run balance --seeds 0,1,2             train three seeds and compare them
  python -m pipelines run --matrix matrix.yaml              train tasks x algorithms x seeds and summarise them
  python -m pipelines observe                               run it watched by a Prometheus
  python -m pipelines compile --image ghcr.io/you/mappo:1.0 write the YAML for Kubeflow into compiled/
  python -m pipelines doctor --site site.yaml               check what a cluster lacks
  python -m pipelines submit balance --site site.yaml --watch
  python -m pipelines schedule create nightly --cron "30 2 * * *" --site site.yaml
  python -m pipelines artifacts fetch latest

`mappo-pipelines` is the same command.

exit status: 0 success; 1 a stage or a run failed or was cancelled, a check of doctor failed, compile --check found
an old file, or the output cannot be written; 2 the command line or the configuration is wrong, or names what does
not exist; 3 Kubeflow or the store refused the request or did not answer; 130 interrupted (Ctrl-C); 141 the reader
of the output has left; 143 ended by SIGTERM
"""
_SCRIPT = "mappo-pipelines"  # the console command
_COMMANDS = ("local", "compile", "submit", "runs", "artifacts", "schedule", "export_metrics", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `--help` lists the statuses."""
    return run_command("pipelines", lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    search_current_directory()
    try:
        arguments = _parser().parse_args(dashed(argv))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("kfp", "kfp_server_api", "kubernetes", "rich"):
            raise
        print('pipelines: Kubeflow\'s SDK is not installed: pip install ".[kubeflow]"', file=sys.stderr)
        return 2
    command = " ".join([arguments.command, *([arguments.verb] if "verb" in arguments else [])])
    try:
        return int(arguments.execute(arguments))
    except OutputFailed:
        raise
    except (MappoError, OSError) as error:
        print(f"pipelines {command}: error: {reason_of(error)}", file=sys.stderr)
        return 2 if not isinstance(error, MappoError) or error.exit_status == 2 else 3
    except KeyboardInterrupt:
        is_run = arguments.command in ("run", "observe")
        hint = f"; to resume, give the same command with --run {arguments.run}" if is_run else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=_SCRIPT if Path(sys.argv[0]).name == _SCRIPT else "python -m pipelines",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mappo {mappo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        import_module(f"pipelines.commands.{name}").add(commands)
    completion.add(commands, parser, _SCRIPT)
    return parser


if __name__ == "__main__":
    sys.exit(main())
