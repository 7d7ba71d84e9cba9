"""What a stage shows: a progress bar on a terminal, plain readable lines anywhere else."""

import logging
import sys

from tqdm import tqdm


def say(stage: str, message: str) -> None:
    """Print one line of a stage; `[stage]` in front tells it from what libraries print."""
    print(f"[{stage}] {message}", flush=True)


class WarningLines(logging.Handler):
    """Shows what the package logs as lines of a stage, also while there is a progress bar."""

    def __init__(self, stage: str):
        super().__init__(logging.WARNING)
        self._stage = stage

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        tqdm.write(f"[{self._stage}] warning: {record.getMessage()}", file=sys.stdout)
        sys.stdout.flush()
