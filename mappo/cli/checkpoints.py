"""`mappo checkpoints`: list, show, verify or tidy up what a run has saved."""

import argparse

from mappo.cli.arguments import RUN_HELP, Commands, add_command, count
from mappo.cli.status import status


def add(commands: Commands) -> None:
    """Add the command and its actions."""
    command = add_command(
        commands, "checkpoints", _checkpoints, "list, show, verify or tidy up what a run has saved"
    )
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("list", "list a run's checkpoints, newest first"),
        ("show", "print the manifest of one: configuration, versions, hashes"),
        ("verify", "read all parts of all checkpoints and compare their hashes; exit status 1 if one is damaged"),
        ("prune", "delete all but the last ones and the best"),
        ("gc", "delete what no checkpoint needs, such as parts of saves that a crash cut short"),
    ):
        action = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        action.add_argument("trained", metavar="RUN", help=RUN_HELP)
        if name == "show":
            action.add_argument(
                "--checkpoint", metavar="WHICH", default="last", help="best, last, or an iteration (default: last)"
            )
        if name == "prune":
            action.add_argument(
                "--keep", type=count, metavar="N", default=3, help="how many besides the best (default: 3)"
            )
        if name == "gc":
            action.add_argument(
                "--grace-hours",
                type=float,
                metavar="X",
                default=24.0,
                help="leave what is younger: a training may be about to need it (default: 24)",
            )
        if name in ("prune", "gc"):
            action.add_argument("--delete", action="store_true", help="delete; without it, only say what would be")


def _checkpoints(arguments: argparse.Namespace) -> int:
    from mappo.cli.checkpoint_actions import ACTIONS

    options = {
        name: value
        for name, value in vars(arguments).items()
        if name in ("checkpoint", "keep", "grace_hours", "delete")
    }
    return status(lambda: ACTIONS[arguments.action](arguments.trained, **options))
