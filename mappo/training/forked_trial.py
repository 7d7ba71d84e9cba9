"""The trial: it calls a function in a copy of this process, which the kernel ends if the function takes too long.

Whatever the function changes, breaks or never finishes stays in the copy. So a trial decides whether a checkpoint
can be used without a trace in the process that then uses it.
"""

import os
import signal
import time
import warnings
from collections.abc import Callable
from contextlib import suppress

import torch

from mappo.errors import SimulationStateError, one_line

SECONDS = 30.0  # that a trial may take, and 20 times as long as its rehearsal took
_REHEARSAL_SECONDS = 3600.0  # after which a copy without an original ends, too
_SUCCESS = "success"
_MAX_BYTES = 4_000  # of the result; a pipe holds more than that


def require_success(rehearse: Callable[[], object], attempt: Callable[[], object]) -> None:
    """Call both functions in a copy of this process; the time of the first decides how long the second may take.

    The copy computes with one thread, since it has none of the threads of this process. It must not use a GPU. If
    `rehearse` raises an exception, nothing is tried: it is the task that fails there.

    Raises:
        SimulationStateError: `attempt` raised an exception, took too long, or ended its process.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the copy uses no lock of another thread
        child = os.fork()
    if child == 0:
        _run_and_exit(rehearse, attempt, writer)
    os.close(writer)
    status = 0
    try:
        with os.fdopen(reader, "rb") as pipe:
            result = pipe.read(_MAX_BYTES).decode(errors="replace")
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        with suppress(ChildProcessError):  # where SIGCHLD is ignored, the kernel forgets how the copy ended
            _, status = os.waitpid(child, 0)
    if result != _SUCCESS:
        raise SimulationStateError(f"the restored simulation cannot be played: {result or _ending(status)}")


def _ending(status: int) -> str:
    """Return how a process has ended that wrote nothing."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
        return f"it takes more than {SECONDS:.0f} s"
    return f"it ends the process, with status {os.waitstatus_to_exitcode(status)}"


def _run_and_exit(rehearse: Callable[[], object], attempt: Callable[[], object], writer: int) -> None:
    """Call the functions in the copy, write the reason of a failure into the pipe, and end the copy."""
    result, is_rehearsed = _SUCCESS, False
    try:
        torch.set_num_threads(1)
        start = time.monotonic()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the kernel ends the process, whatever it computes
        signal.setitimer(signal.ITIMER_REAL, _REHEARSAL_SECONDS)
        with suppress(Exception):
            rehearse()
            is_rehearsed = True
        signal.setitimer(signal.ITIMER_REAL, SECONDS + 20 * (time.monotonic() - start))
        if is_rehearsed:
            attempt()
    except SimulationStateError as error:
        result = one_line(error)
    except BaseException as error:  # a scenario is foreign code, and a checkpoint holds any data
        result = one_line(f"{type(error).__name__}: {error}")
    try:
        os.write(writer, result.encode(errors="replace")[:_MAX_BYTES])
    finally:
        os._exit(0)  # without the clean-up of this process, which belongs to the original
