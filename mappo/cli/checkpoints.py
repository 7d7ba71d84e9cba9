"""The command `mappo checkpoints`: list, show, verify or delete the checkpoints of a run."""

import argparse

from mappo.cli.arguments import RUN_HELP, Commands, add_command, add_format_argument, add_keep_argument
from mappo.cli.run_names import find_run
from mappo.cli.status import look_up


def add(commands: Commands) -> None:
    """Add the command and its actions."""
    command = add_command(commands, "checkpoints", None, "list, show, verify or delete the checkpoints of a run")
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("list", "list a run's checkpoints, newest first"),
        ("show", "print the manifest of a checkpoint as JSON: configuration, versions, hashes"),
        ("verify", "read all parts of all checkpoints and check their hashes; exit status 1 if one is damaged"),
        ("prune", "delete all checkpoints but the newest ones and the best"),
        ("gc", "delete files that no checkpoint needs, such as parts of saves that a crash interrupted"),
    ):
        action = add_command(actions, name, _checkpoints, summary)
        action.add_argument("run_location", metavar="RUN", help=RUN_HELP)
        if name == "list":
            add_format_argument(action)
        if name == "show":
            action.add_argument(
                "--checkpoint",
                metavar="WHICH",
                default="last",
                help="checkpoint to show: best, last, or the number of an iteration (default: last)",
            )
        if name == "prune":
            add_keep_argument(action)
        if name == "gc":
            action.add_argument(
                "--grace-hours",
                type=float,
                metavar="X",
                default=24.0,
                help="keep files younger than this, in hours: a running training may be about to need them "
                "(default: 24)",
            )
        if name in ("prune", "gc"):
            action.add_argument(
                "--delete", action="store_true", help="delete them; without this flag, only list them"
            )


def _checkpoints(arguments: argparse.Namespace) -> int:
    from mappo.cli.checkpoint_actions import ACTIONS

    run, action = find_run(arguments.run_location), ACTIONS[arguments.action]
    names = ("checkpoint", "keep", "grace_hours", "delete", "output")
    options = {name: value for name, value in vars(arguments).items() if name in names}
    return look_up("checkpoints", lambda: action(run, **options))
