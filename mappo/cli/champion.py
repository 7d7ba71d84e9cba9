"""The command `mappo champion`: list, show, roll back or export the policies in use."""

import argparse
from pathlib import Path

from mappo.cli.arguments import CHAMPIONS_HELP, Commands, add_command, add_format_argument, count
from mappo.cli.status import look_up, status


def add(commands: Commands) -> None:
    """Add the command and its actions."""
    command = add_command(
        commands, "champion", None, "list, show, roll back or export the policies in use (the champions)"
    )
    actions = command.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("list", "list the tasks that have a champion"),
        ("show", "print the decision in force, its numbers and the location of its policy"),
        ("history", "list the decisions that changed the champion"),
        ("rollback", "put an earlier champion in force; the history keeps both"),
        ("export", "copy the policy, as a file that needs neither mappo nor VMAS, and its model card"),
    ):
        action = add_command(actions, name, _champion, summary)
        action.add_argument("location", metavar="LOCATION", nargs="?", default="champions", help=CHAMPIONS_HELP)
        if name != "list":
            action.add_argument(
                "--task",
                default="",
                help="name of the task, as `list` prints it; optional if only one task has a champion",
            )
        if name in ("list", "show", "history"):
            add_format_argument(action)
        if name == "rollback":
            action.add_argument(
                "--to",
                type=count,
                metavar="N",
                help="number of the decision to restore (default: the previous policy)",
            )
            action.add_argument("--reason", default="", metavar="TEXT", help="reason, which the history keeps")
        if name == "export":
            action.add_argument(
                "--output",
                type=Path,
                metavar="DIRECTORY",
                default=Path("policy"),
                help="directory of the files (default: policy)",
            )
            action.add_argument(
                "--format",
                choices=("pytorch", "onnx"),
                default="pytorch",
                help="pytorch: policy.pt2, which needs only PyTorch (default); onnx: policy.onnx, which needs "
                "only onnxruntime, and contract.json, which describes its inputs and outputs",
            )
            action.add_argument(
                "--environment.scenario",
                dest="scenario",
                default="",
                metavar="MODULE:CLASS",
                help="scenario of the champion, named to let its code run here; needed if the promotion made no "
                "policy.onnx and the scenario is not one of VMAS's",
            )


def _champion(arguments: argparse.Namespace) -> int:
    from mappo.cli.champion_actions import CHAMPION_ACTIONS

    names = ("location", "task", "to", "reason", "output", "format", "scenario")
    options = {name: value for name, value in vars(arguments).items() if name in names}
    action = CHAMPION_ACTIONS[arguments.action]
    if arguments.action == "export":
        return status(lambda: action(**options))
    return look_up("champion", lambda: action(**options))
