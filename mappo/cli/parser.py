"""The parser of command lines: argparse, with a suggestion for a mistyped command, flag or choice."""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any


class Parser(argparse.ArgumentParser):
    """A parser that refuses an unknown flag by itself, so that the error names the command and the closest flag.

    argparse would leave that to the outermost parser, after it has complained of missing arguments. No flag may be
    abbreviated.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse arguments, all of which must be known."""
        words = list(sys.argv[1:] if args is None else args)
        for word in words:
            flag = word.partition("=")[0]
            if word == "--" or (self._subparsers and not word.startswith("-")):
                break  # no flag follows, or flags of a command
            if word.startswith("--") and " " not in flag and flag not in self._option_string_actions:
                self.error(f"{flag}: there is no such flag; {self._closest_flag(flag)}")
        namespace, rest = super().parse_known_args(words, namespace)
        if rest:
            self.error(f"one argument too many: {rest[0]}")
        return namespace, rest

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError:
            close = get_close_matches(str(value), map(str, action.choices or ()), n=1)
            if not close:
                raise
            raise argparse.ArgumentError(action, f"{value!r} is unknown; did you mean {close[0]}?") from None

    def _closest_flag(self, flag: str) -> str:
        """Return a suggestion; a flag may lack its section, as --clip-epsilon does."""
        if self._subparsers:
            return f"flags follow the command; see {self.prog} --help"
        flags = self._option_string_actions
        names = {str(action.metavar or action.dest) for action in self._get_positional_actions()}
        if flag.removeprefix("--").upper() in names:
            return f"give {flag.removeprefix('--').upper()} without a flag"
        whole = {f"--{name.removeprefix('--').rpartition('.')[2]}": name for name in flags} | {n: n for n in flags}
        close = get_close_matches(flag, whole, n=1, cutoff=0.7)
        return f"did you mean {whole[close[0]]}?" if close else f"`{self.prog} --help` lists all"
