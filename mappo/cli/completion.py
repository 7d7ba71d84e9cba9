"""The command `completion`: print a script by which a shell completes commands, flags and values."""

import argparse
from pathlib import Path

from mappo.cli.arguments import Commands, add_command
from mappo.recipes import RECIPES

_DIRECTORIES = ("run_location", "runs", "reports", "extend", "warm_start", "store", "champions")  # by `dest`
_SHELLS = ("bash", "zsh", "fish")


def add(commands: Commands, parser: argparse.ArgumentParser, program: str) -> None:
    """Add the command. `parser` is that of the whole program, which shells know by the name `program`."""
    command = add_command(commands, "completion", None, "print the completion of commands and flags for a shell")
    command.add_argument("shell", choices=_SHELLS, metavar="SHELL", help=", ".join(_SHELLS))
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = f"""install it for new shells:
  bash   {program} completion bash > ~/.local/share/bash-completion/completions/{program}
  zsh    {program} completion zsh > ~/.zfunc/_{program}     with fpath+=~/.zfunc before compinit in ~/.zshrc
  fish   {program} completion fish > ~/.config/fish/completions/{program}.fish
"""

    def complete(arguments: argparse.Namespace) -> int:
        import shtab

        parser.prog = program
        _describe(parser)
        print(shtab.complete(parser, arguments.shell))
        return 0

    command.set_defaults(execute=complete)


def _describe(parser: argparse.ArgumentParser) -> None:
    """Mark the values that are recipes, files or directories; the parser itself does not check them."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in set(action.choices.values()):
                _describe(child)
        elif action.dest == "recipe":
            action.choices, action.help = list(RECIPES), "recipe"
        elif action.dest in _DIRECTORIES:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
