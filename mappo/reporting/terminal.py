"""The lines that a stage prints, also while a progress bar is on the terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm


def say(stage: str, message: str) -> None:
    """Print one line of a stage. The prefix `[stage]` separates it from the output of libraries."""
    print(f"[{stage}] {message}", flush=True)


@contextmanager
def printed_logs(name: str, stream: TextIO | None = None) -> Iterator[None]:
    """Print what the package logs in the block as lines of a stage or look-up.

    `stream` is where: by default the standard output. A look-up, whose output is its result, gives the error
    stream.
    """
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    logger, handler = logging.getLogger("mappo"), LogLines(name, stream)
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class LogLines(logging.Handler):
    """A log handler that prints what the package logs as lines of a stage, also beside a progress bar."""

    def __init__(self, stage: str, stream: TextIO | None = None):
        super().__init__(logging.INFO)
        self._stage, self._stream = stage, stream

    def emit(self, record: logging.LogRecord) -> None:
        """Print a log record as one line."""
        kind = "warning: " if record.levelno >= logging.WARNING else ""
        stream = self._stream or sys.stdout
        tqdm.write(f"[{self._stage}] {kind}{record.getMessage()}", file=stream)
        stream.flush()
