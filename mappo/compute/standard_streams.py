"""The standard output and error of a process, which may be closed, full, or a pipe whose reader has left.

A stage never ends because its output cannot be printed: the output is dropped. A command whose result is its
output fails instead. The error stream is always dropped, because there is nowhere else to report it.
"""

import errno
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from typing_extensions import Buffer


class OutputFailed(OSError):
    """The standard output cannot be written, so the command, whose result it is, must end."""


class _Descriptor(io.FileIO):
    """A descriptor for output, which drops what it cannot write. If `is_result`, the first failure raises."""

    def __init__(self, descriptor: int, was_closed: bool):
        super().__init__(descriptor, "w", closefd=False)
        self.is_result, self._was_closed = False, was_closed
        self.failure: OSError | None = None

    def write(self, data: Buffer, /) -> int:
        """Write some bytes and return their number; return the number of all if they are dropped."""
        try:
            if self._was_closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            while (written := super().write(data)) is None:  # another process has made the descriptor non-blocking
                select.select([], [self], [])
        except OSError as error:
            is_first, self.failure = self.failure is None, error
            if self.is_result and is_first:
                raise OutputFailed(error.errno, error.strerror) from error
            return memoryview(data).nbytes
        return int(written)


def run_command(program: str, command: Callable[[], int]) -> int:
    """Run a command whose result is its output, and return its exit status.

    If the output cannot be written, the status is that of SIGPIPE for a reader that has left, and 1 for other
    reasons. Stages that the command runs call `dropped_output`.
    """
    with _own_streams() as output:
        if output is None:
            return command()
        output.is_result = True
        try:
            try:
                status = command()
            finally:
                sys.stdout.flush()
        except OutputFailed:
            status = 1
        except SystemExit:  # argparse ignores that its help cannot be written
            if output.failure is None:
                raise
        if output.failure is None:
            return status
        if isinstance(output.failure, BrokenPipeError):
            return 128 + signal.SIGPIPE
        print(f"{program}: error: the output cannot be written: {output.failure.strerror}", file=sys.stderr)
        return 1


@contextmanager
def dropped_output() -> Iterator[None]:
    """Drop the output that cannot be written in the block, which then continues."""
    output = _descriptor_of(sys.stdout)
    if output is None:
        with _own_streams():
            yield
        return
    was_result, output.is_result = output.is_result, False
    try:
        yield
    finally:
        sys.stdout.flush()
        output.is_result, output.failure = was_result, None


@contextmanager
def _own_streams() -> Iterator[_Descriptor | None]:
    """Replace the standard streams in the block, unless somebody else has; yield the descriptor of the output."""
    if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
        yield None
        return
    closed = _open_closed_descriptors()
    originals = sys.stdout, sys.stderr
    output = _Descriptor(1, 1 in closed)
    sys.stdout = _text(output, originals[0])
    sys.stderr = _text(_Descriptor(2, 2 in closed), originals[1])
    try:
        yield output
    finally:
        output.is_result = False
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = originals


def _open_closed_descriptors() -> set[int]:
    """Open /dev/null in place of standard streams that are closed, and return their descriptors.

    Otherwise the next file that is opened, such as a checkpoint, would receive what libraries and child processes
    print.
    """
    closed = set()
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            assert os.open(os.devnull, os.O_RDWR) == descriptor
            os.set_inheritable(descriptor, True)
            closed.add(descriptor)
    return closed


def _text(output: _Descriptor, original: TextIO | None) -> TextIO:
    """Return a text stream like the original one, which may be None; it escapes what the encoding lacks."""
    is_by_line = original is None or bool(original.line_buffering or getattr(original, "write_through", False))
    encoding = original.encoding if original else "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(output), encoding=encoding, errors="backslashreplace", line_buffering=is_by_line
    )


def _descriptor_of(stream: TextIO) -> _Descriptor | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Descriptor) else None
