"""`mappo champion`: list, show, roll back or export the policies in use."""

import argparse
from pathlib import Path

from mappo.cli.arguments import CHAMPIONS_HELP, Commands, add_command, count
from mappo.cli.status import status


def add(commands: Commands) -> None:
    """Add the command and its actions."""
    summary = "the policies in use: list, show, history, rollback, export"
    command = add_command(commands, "champion", _champion, summary)
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("list", "list the tasks that have a champion"),
        ("show", "print the decision in force, its numbers and where its policy is, as JSON"),
        ("history", "list the decisions that changed the champion"),
        ("rollback", "put an earlier champion in force; the history keeps both"),
        ("export", "copy the policy as a file that needs PyTorch alone, with its model card"),
    ):
        action = actions.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        action.add_argument("place", metavar="PLACE", nargs="?", default="champions", help=CHAMPIONS_HELP)
        if name != "list":
            action.add_argument(
                "--task", default="", help="as list shows it; may be left out where there is one only"
            )
        if name == "rollback":
            action.add_argument(
                "--to", type=count, metavar="N", help="the decision to go back to (default: the policy before)"
            )
            action.add_argument("--reason", default="", metavar="TEXT", help="kept in the history")
        if name == "export":
            action.add_argument(
                "--output", type=Path, metavar="DIRECTORY", default=Path("policy"), help="(default: policy)"
            )


def _champion(arguments: argparse.Namespace) -> int:
    from mappo.cli.champion_actions import CHAMPION_ACTIONS

    known = ("place", "task", "to", "reason", "output")
    options = {name: value for name, value in vars(arguments).items() if name in known}
    return status(lambda: CHAMPION_ACTIONS[arguments.action](**options))
