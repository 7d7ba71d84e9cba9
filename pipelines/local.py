"""Run a pipeline on this machine, without a cluster or containers: each stage is a Python process."""

import builtins
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout, suppress
from io import TextIOBase
from pathlib import Path
from typing import Any

from kfp import local

from pipelines.errors import PipelineFailed

_STAGE_LINE = re.compile(r"\s*(\[(?P<stage>[a-z-]+)\] (?P<message>.*))")
_FAILED_TASK = re.compile(r"Inner task failed: \S*?'(?P<stage>[^']+)'")
_TAIL_LINES = 15


def run_locally(pipeline: Callable[..., Any], arguments: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """Run a pipeline and return the path of each of its artifacts, by name.

    All files are written below `directory`. The terminal shows the lines that stages print. `pipeline.log` there
    holds all output, also that of Kubeflow's runner.

    Raises:
        PipelineFailed: a stage failed; the message names the stage and the reason.
    """
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(directory))
    log = directory / "pipeline.log"
    with log.open("wb", buffering=0) as file:
        filtered = _StageLines(file, sys.stdout)
        original_print = builtins.print
        try:
            with redirect_stdout(filtered), warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", "You may be attemping", RuntimeWarning
                )  # kfp warns about images, which local runs do not use
                outputs = pipeline(**arguments).outputs
        except RuntimeError as error:
            match = _FAILED_TASK.search(str(error))
            if match is None:
                raise
            stage = match["stage"]
            reason = filtered.reasons(stage) or f"it gave no reason; last lines:\n{filtered.tail()}"
            raise PipelineFailed(f"stage {stage} failed: {reason}\nwhole log: {log}") from None
        finally:
            builtins.print = original_print  # Kubeflow's runner replaces it to indent, and keeps that after a loop
    return {name: Path(artifact.path) for name, artifact in sorted(outputs.items())}


class _StageLines(TextIOBase):
    """A text stream that writes every line to a log and copies the lines that stages print to the terminal."""

    def __init__(self, log: Any, terminal: Any):
        self._log, self._terminal = log, terminal
        self._partial = ""
        self._failures: list[tuple[str, str]] = []
        self._last: deque[str] = deque(maxlen=_TAIL_LINES)

    def write(self, text: str) -> int:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            self._write_line(line)
        return len(text)

    def reasons(self, stage: str) -> str:
        """Return the reasons for its failure that a stage printed."""
        return "; ".join(reason for name, reason in self._failures if name == stage)

    def tail(self) -> str:
        """Return the last lines of all output."""
        return "\n".join(self._last)

    def _write_line(self, line: str) -> None:
        with suppress(OSError):  # a full disk must not end the pipeline
            self._log.write(f"{line}\n".encode(errors="backslashreplace"))
        if line.strip():
            self._last.append(line)
        if match := _STAGE_LINE.match(line):
            print(match[1], file=self._terminal, flush=True)
            if match["message"].startswith(("failed: ", "preempted: ")):
                self._failures.append((match["stage"], match["message"].removeprefix("failed: ")))
