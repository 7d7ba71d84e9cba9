"""The errors of stages, for people: one line for each reason. It imports no torch."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mappo.errors import MappoError, StageFailed, reason_of
from mappo.reporting.terminal import printed_logs, say


@contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Print an error that a user can fix, without its traceback, and print what the package logs.

    Raises:
        StageFailed: the block raised an error that a user can fix.
    """
    with printed_logs(name):
        try:
            yield
        except StageFailed:  # a stage inside this one has printed the error
            raise
        except _mendable() as error:
            reason = reason_of(error) or "out of memory"
            for line in reason.splitlines():
                say(name, f"failed: {line}")
            raise StageFailed(
                f"{name}: {reason}",
                is_final=not (_may_pass(error) or _may_pass(error.__cause__)),
                exit_status=error.exit_status if isinstance(error, MappoError) else 1,
            ) from error
        except Exception as error:
            say(name, f"failed: {type(error).__name__}: {error}")
            raise


def _mendable() -> tuple[type[Exception], ...]:
    """Return the errors that a user can fix, with torch's own if torch is imported: else it cannot be raised."""
    torch = sys.modules.get("torch")
    out_of_gpu_memory = [torch.OutOfMemoryError] if torch else []
    return MappoError, OSError, MemoryError, *out_of_gpu_memory


def _may_pass(error: BaseException | None) -> bool:
    """Return whether another attempt may succeed."""
    return isinstance(error, OSError) or (isinstance(error, MappoError) and error.may_pass)
