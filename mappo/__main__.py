"""The command `mappo`, which runs a stage, a study or a tool in this process."""

import argparse
import sys
from collections.abc import Sequence

import mappo
from mappo.cli import (
    champion,
    checkpoints,
    completion,
    configuration,
    matrix,
    overview_commands,
    stages,
    study,
)
from mappo.cli.arguments import apply_monitor_arguments, dashed, search_current_directory
from mappo.cli.parser import Parser
from mappo.compute.standard_streams import OutputFailed, run_command
from mappo.errors import MappoError, reason_of

_EXAMPLES = """examples:
  mappo train                                          train the navigation recipe; write the run into runs/
  mappo train balance --learner.clip-epsilon 0.1       train another recipe with one setting changed
  mappo train --networks.critic own                    train by IPPO: the critic sees its agent's observation only
  mappo train --environment.scenario wheel --environment.scenario-kwargs '{"n_agents": 3}'
  mappo show-config balance > balance.json             write a configuration to a file; edit the file, then
  mappo train --config balance.json                    train with it
  mappo train --run first --store s3://bucket/runs     name the run; after a kill, the same command resumes it
  mappo evaluate runs/20260101-120000                  evaluate a run's best checkpoint on held-out seeds
  mappo train --extend runs/20260101-120000 --collection.total-frames 200000
  mappo runs --sort evaluation                         list the runs in runs/, the best first; --page writes a page
  mappo checkpoints list runs/20260101-120000          list the checkpoints of a run
  mappo tune --study first --trials 20                 tune clip_epsilon, gae_lambda and epochs with Optuna
  mappo matrix run benchmarks/matrix.yaml              train tasks x algorithms x seeds; write one table
  mappo promote runs/20260101-120000                   make a run the champion of its task if it is better
  mappo train --mlflow http://localhost:5000           log curves and configuration to an MLflow server
  mappo train --metrics-port 9464                      let Prometheus scrape http://localhost:9464/metrics

exit status: 0 success; 1 a stage failed, or a result cannot be written; 2 the command line or the configuration is
wrong, or names what does not exist; 130 interrupted (Ctrl-C); 141 the reader of the output has left; 143 evicted
(SIGTERM). The same command with the same --run resumes an interrupted run.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `mappo --help` lists the statuses."""
    return run_command("mappo", lambda: _run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    search_current_directory()
    arguments = _parser().parse_args(dashed(argv))
    try:
        apply_monitor_arguments(arguments)
        return int(arguments.execute(arguments))
    except OutputFailed:
        raise
    except (MappoError, OSError) as error:
        print(f"mappo {arguments.command}: error: {reason_of(error)}", file=sys.stderr)
        return error.exit_status if isinstance(error, MappoError) else 1
    except KeyboardInterrupt:
        print(f"\ninterrupted{_resumption(arguments)}", file=sys.stderr)
        return 130


def _resumption(arguments: argparse.Namespace) -> str:
    """Return how an interrupted command goes on, if it can."""
    if "run" in arguments:
        return f"; to resume, give the same command with --run {arguments.run}"
    continued = {"tune": "the study", "matrix": "the matrix"}.get(arguments.command)
    return f"; the same command continues {continued}" if continued else ""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mappo",
        description=mappo.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"mappo {mappo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (stages, overview_commands, study, matrix, champion, checkpoints, configuration):
        group.add(commands)
    completion.add(commands, parser, "mappo")
    return parser


if __name__ == "__main__":
    sys.exit(main())
