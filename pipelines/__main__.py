"""Run a pipeline on this machine, or compile, submit, watch and schedule it on Kubeflow."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from mappo.cli.arguments import dashed
from mappo.compute.standard_streams import OutputFailed, run_command
from mappo.errors import ConfigError, MappoError

_EXAMPLES = """examples:
  python -m pipelines run                                   run the navigation recipe here, into runs/
  python -m pipelines run balance --seed 3                  choose a recipe and a seed
  python -m pipelines run --run first --store s3://bucket/runs
                                                            name the run: the same command resumes it
  python -m pipelines run balance --seeds 0,1,2             train three seeds and compare them
  python -m pipelines observe                               run it watched by a Prometheus
  python -m pipelines compile --image ghcr.io/you/mappo:1.0 write the YAML for Kubeflow into compiled/
  python -m pipelines doctor --site site.yaml               check what a cluster lacks
  python -m pipelines submit balance --site site.yaml --watch
  python -m pipelines schedule create nightly --cron "30 2 * * *" --site site.yaml
  python -m pipelines artifacts fetch latest

exit status: 0 success, 1 a stage or a run failed, 2 the command or the configuration is wrong,
3 Kubeflow or the store refused the request or did not answer, 130 interrupted
"""
_COMMANDS = ("local", "compile", "submit", "runs", "artifacts", "schedule", "export_metrics", "doctor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `--help` lists the statuses."""
    return run_command("pipelines", lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
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
    except (ConfigError, OSError) as error:
        print(f"pipelines {command}: error: {error}", file=sys.stderr)
        return 2
    except MappoError as error:
        print(f"pipelines {command}: error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        is_run = arguments.command in ("run", "observe")
        hint = f"; to resume, give the same command with --run {arguments.run}" if is_run else ""
        print(f"\ninterrupted{hint}", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in _COMMANDS:
        import_module(f"pipelines.commands.{name}").add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
