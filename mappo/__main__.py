"""The terminal: each stage alone, in this process."""

import argparse
import os
import sys
from collections.abc import Sequence

import mappo
from mappo.cli import champion, checkpoints, configuration, stages, study
from mappo.cli.arguments import apply_monitor_arguments, dashed
from mappo.errors import ConfigError

_EXAMPLES = """examples:
  mappo train                                          the navigation recipe, into runs/
  mappo train balance --learner.clip-epsilon 0.1       another recipe, one knob changed
  mappo train --environment.scenario wheel --environment.scenario-kwargs '{"n_agents": 3}'
  mappo show-config balance > balance.json             edit it, then
  mappo train --config balance.json
  mappo train --run first --store s3://bucket/runs     under a name; the same command goes on after a kill
  mappo evaluate runs/20260101-120000                  a run's best checkpoint on held-out seeds
  mappo train --extend runs/20260101-120000 --collection.total-frames 200000
  mappo checkpoints list runs/20260101-120000
  mappo tune --study first --trials 20                 clip_epsilon, gae_lambda and epochs, by Optuna
  mappo promote runs/20260101-120000                   the champion of its task, if it is better
  mappo train --metrics-port 9464                      watched by Prometheus at http://localhost:9464/metrics

exit status: 0 done, 1 the stage failed, 2 the command or the configuration is wrong, 130 interrupted,
143 preempted (SIGTERM); the same command with the same --run goes on where an interrupted one stopped
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status, as the examples list it."""
    if "" not in sys.path:
        sys.path.insert(0, "")  # scenarios of the user's own are found here, as by python -m
    arguments = _parser().parse_args(dashed(sys.argv[1:] if argv is None else argv))
    apply_monitor_arguments(arguments)
    try:
        return int(arguments.execute(arguments))
    except ConfigError as error:
        print(f"mappo {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = f"; to go on, give the same command with --run {arguments.run}" if "run" in arguments else ""
        print(f"\ninterrupted{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `mappo show-config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mappo",
        description=mappo.__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mappo {mappo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for group in (stages, study, champion, checkpoints, configuration):
        group.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
