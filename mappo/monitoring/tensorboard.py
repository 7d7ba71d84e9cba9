"""The event files for TensorBoard: the configuration, and the same numbers as the history."""

import io
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mappo.config import ExperimentConfig, fields_of
from mappo.errors import ConfigError
from mappo.monitoring.curves import curves
from mappo.training.history import IterationReport, TrainingStarted

_log = logging.getLogger(__name__)
_RESULTS = ("return/evaluation_return_mean", "return/episode_return_mean")  # shown beside hyperparameters


class EventFiles:
    """A directory of event files. Every column of the history becomes a scalar over frames; NaN is left out.

    The fields of the configuration are TensorBoard's hyperparameters, so that it can tell runs apart by them.

    While the disk is full, the numbers are kept and written later. TensorBoard's own writer would raise the error
    in a thread, and leave half a record, at which TensorBoard stops reading.

    Raises:
        ConfigError: the package tensorboard is not installed.
    """

    def __init__(self, directory: Path, config: ExperimentConfig):
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.summary.writer.record_writer import RecordWriter
            from torch.utils.tensorboard import summary
        except ImportError:
            raise ConfigError(
                "--tensorboard: the package tensorboard is missing: pip install 'mappo[tensorboard]'"
            ) from None
        self._event, self._session, self._records = Event, SessionLog, RecordWriter
        self._scalar: Callable[[str, float], Any] = summary.scalar
        fields = fields_of(config)
        values = {name: value if _is_plain(value) else json.dumps(value) for name, value in fields.items()}
        listing = "\n".join(f"    {name} = {json.dumps(value)}" for name, value in fields.items())
        self._hyperparameters = [
            *summary.hparams(values, dict.fromkeys(_RESULTS, 0.0)),  # type: ignore[no-untyped-call]
            summary.text("configuration", listing),  # type: ignore[no-untyped-call]
        ]
        owner = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(2)}"
        self._path, self._size = directory / f"events.out.tfevents.{owner}", 0
        self._pending, self._has_failed = b"", False

    def begin(self, start: TrainingStarted) -> None:
        """Create the file with the configuration, and discard later frames of an earlier process."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        self._add(file_version="brain.Event:2")
        session = self._session(status=self._session.START)  # TensorBoard discards what is not before its step
        self._add(step=start.progress.frames + 1, session_log=session)
        for summary in self._hyperparameters:
            self._add(summary=summary)

    def write(self, report: IterationReport) -> None:
        """Write the numbers of an iteration."""
        for name, value in curves(report).items():
            self._add(step=report.progress.frames, summary=self._scalar(name, value))
        try:
            with self._path.open("ab") as file:
                file.write(self._pending)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._path, self._size)  # no half record
            if not self._has_failed:
                message = "%s: %s; training continues, and the numbers are written later"
                _log.warning(message, self._path, error.strerror)
            self._has_failed = True
        else:
            self._size, self._pending, self._has_failed = self._size + len(self._pending), b"", False

    def _add(self, **fields: Any) -> None:
        record = io.BytesIO()
        self._records(record).write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._pending += record.getvalue()


def _is_plain(value: object) -> bool:
    """Return whether TensorBoard accepts a hyperparameter as it is."""
    return isinstance(value, bool | int | float | str)
