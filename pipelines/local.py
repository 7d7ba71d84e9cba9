"""Run a pipeline on this machine, without a cluster or containers: each stage is a Python process."""

import builtins
import os
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import TextIOBase
from pathlib import Path
from typing import Any

from kfp import local

from pipelines.errors import PipelineFailed

_STAGE_LINE = re.compile(r"\s*(\[(?P<stage>[a-z-]+)\] (?P<message>.*))")
_FAILED_TASK = re.compile(r"Inner task failed: \S*?'(?P<stage>[^']+)'")
_TAIL_LINES = 15


def run_locally(pipeline: Callable[..., Any], arguments: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """Run a pipeline with all its files below `directory`; return where each of its artifacts lies.

    Lines that stages print are shown; everything, also what Kubeflow's runner prints, goes to `pipeline.log`.

    Raises:
        PipelineFailed: a stage failed.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(directory))
    log = directory / "pipeline.log"
    with log.open("w") as file:
        filtered = _StageLines(file, sys.stdout)
        own_print = builtins.print
        try:
            with redirect_stdout(filtered), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "You may be attemping", RuntimeWarning)  # images are not used
                outputs = pipeline(**arguments).outputs
        except RuntimeError as error:
            failed = _FAILED_TASK.search(str(error))
            if failed is None:
                raise
            stage = failed["stage"]
            reason = filtered.reasons(stage) or f"it ended without a reason; last lines:\n{filtered.tail()}"
            raise PipelineFailed(f"stage {stage} failed: {reason}\nwhole log: {log}") from None
        finally:
            builtins.print = own_print  # Kubeflow's runner indents it, and loops leave it so
    return {name: Path(artifact.path) for name, artifact in sorted(outputs.items())}


class _StageLines(TextIOBase):
    """A text stream that writes every line to a log and passes on the lines that stages print."""

    def __init__(self, log: Any, terminal: Any):
        self._log, self._terminal = log, terminal
        self._partial = ""
        self._failures: list[tuple[str, str]] = []
        self._last: deque[str] = deque(maxlen=_TAIL_LINES)

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._line(line)
        return len(text)

    def reasons(self, stage: str) -> str:
        """What a stage said about its failure."""
        return "; ".join(reason for name, reason in self._failures if name == stage)

    def tail(self) -> str:
        """The last lines of everything."""
        return "\n".join(self._last)

    def _line(self, line: str) -> None:
        self._log.write(line + os.linesep)
        self._log.flush()
        if line.strip():
            self._last.append(line)
        if shown := _STAGE_LINE.match(line):
            print(shown[1], file=self._terminal, flush=True)
            if shown["message"].startswith(("failed: ", "preempted: ")):
                self._failures.append((shown["stage"], shown["message"].removeprefix("failed: ")))
