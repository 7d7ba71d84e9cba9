"""The commit of the source code that a training runs from, which the note of its attempt holds."""

import os
import subprocess
from functools import cache

_SECONDS = 5.0  # to wait for git; the commit of a repository on a slow disk stays unknown
_CHANGED = "-changed"


@cache
def source_commit() -> str:
    """Return the commit of the repository of the current directory; empty outside of one, and without git.

    "-changed" follows if a tracked file differs from it.
    """
    commit = _git("rev-parse", "--verify", "HEAD")
    if not commit:
        return ""
    return f"{commit}{_CHANGED}" if _git("status", "--porcelain", "--untracked-files=no") else commit


def _git(*arguments: str) -> str:
    """Return what git prints; empty if it fails. It takes no lock that a user's own git command could miss."""
    try:
        process = subprocess.run(
            ["git", *arguments],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return process.stdout.strip() if process.returncode == 0 else ""
