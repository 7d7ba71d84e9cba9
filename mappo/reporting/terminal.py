"""The lines that a stage prints, also while a progress bar is on the terminal."""

import logging
import sys

from tqdm import tqdm


def say(stage: str, message: str) -> None:
    """Print one line of a stage. The prefix `[stage]` separates it from the output of libraries."""
    print(f"[{stage}] {message}", flush=True)


class LogLines(logging.Handler):
    """A log handler that prints what the package logs as lines of a stage, also beside a progress bar."""

    def __init__(self, stage: str):
        super().__init__(logging.INFO)
        self._stage = stage

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log record as one line."""
        kind = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"[{self._stage}] {kind}{record.getMessage()}", file=sys.stdout)
        sys.stdout.flush()
