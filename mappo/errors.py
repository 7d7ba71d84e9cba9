"""The exceptions of this package, in one tree.

`MappoError` is the base of every error that a user can understand and mend: its message says what happened, with
which value, and what to do. A stage prints it as one line. Each class keeps the built-in exception that it is a
kind of as a second base.
"""

import signal
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path


class MappoError(Exception):
    """The base of all errors of this package.

    `may_pass`: another attempt may not meet the error again. `exit_status`: that of a command which fails by it,
    1, or 2 if the command or the configuration is wrong.
    """

    may_pass = False
    exit_status = 1


class ConfigError(MappoError, ValueError):
    """A configuration cannot be used; the message names the field, its value and the bound."""

    exit_status = 2


class StudyUnreadable(ConfigError):
    """The database holds something about a study that mappo did not write; the message names it."""

    exit_status = 1


class CompilationFailed(ConfigError):
    """A graph cannot be compiled on this machine; the message says why, and which settings need no compiler."""


class EnvironmentUnfit(MappoError):
    """A task is not fit to train on; the message says what is wrong and what its author can do about it."""


class Concern(MappoError):
    """A warning about a task: a check passed, but somebody should look at the reason."""


class NotTraceable(MappoError):
    """A function cannot be traced; the message says why, and in which line."""


class NotFaithful(MappoError, ValueError):
    """A scenario cannot run on the fast path; the message says why."""


class SimulationDiffers(MappoError):
    """The running fast simulation gives other results than VMAS; the message says what differs."""


class NoHeuristic(MappoError):
    """A scenario has no heuristic policy for this task, or it cannot run; the message says why."""


class NonFiniteError(MappoError, ArithmeticError):
    """A number is NaN or infinite. `source`: the value of the metric label `source`."""

    source = ""


class NonFiniteLoss(NonFiniteError):
    """A term of the loss is NaN or infinite; the optimiser did not step on it."""

    source = "loss"


class NonFiniteObservation(NonFiniteError):
    """An observation is NaN or infinite; the policy did not act on it."""

    source = "observation"


class NonFiniteReturn(NonFiniteError):
    """The return of an episode is NaN or infinite, so there is nothing to average."""

    source = "return"


class ProcessDied(MappoError, RuntimeError):
    """A process that collects has ended; the message says which one and how."""

    may_pass = True


class CheckpointError(MappoError, ValueError):
    """A checkpoint cannot be read, or does not fit these networks; the message says why."""


class NoCheckpoint(CheckpointError):
    """A run does not exist, or has no such checkpoint; the message says what there is."""

    exit_status = 2


class SimulationStateError(MappoError, ValueError):
    """A state cannot be captured, or does not fit the simulation that it is restored into."""


class NotExportable(MappoError, ValueError):
    """The exported policy does not act as the trained one does; the message says how they differ."""


class StoreError(MappoError):
    """A store refused a request; the message names the location and the cause. `outcome`: a metric label."""

    outcome = "refused"


class NotALocation(StoreError):
    """A text does not name a directory or a prefix in a bucket; the message has the form of both."""

    exit_status = 2


class StoreUnavailable(StoreError):
    """A store did not answer, or not in time, or not usably; the same request may succeed later."""

    outcome = "unavailable"
    may_pass = True


class KeyMissing(StoreError):
    """A store holds nothing under this key."""

    outcome = "missing"


class KeyTaken(StoreError):
    """A store holds something else under a key that was to be created."""

    outcome = "taken"


class TooLarge(StoreError):
    """An entry of a store has more bytes than its reader accepts."""


class Superseded(StoreError):
    """A later attempt trains this run; what this attempt does no longer counts."""


class NotSaved(StoreError):
    """The last checkpoints could not be saved in time. `rescue` writes them to a directory."""

    may_pass = True

    def __init__(self, message: str, rescue: Callable[[Path], None]):
        super().__init__(message)
        self.rescue = rescue


class DatabaseError(MappoError, OSError):
    """The database of studies cannot be reached, or refuses a request."""

    may_pass = True


class TrialLost(MappoError):
    """The trial belongs to another worker, or may; what this worker does with it no longer counts."""


class NoBestTrial(MappoError):
    """The error of a study that has nothing to choose: no trial is complete, or none keeps the constraints."""


class Pruned(MappoError):
    """The pruner ends a trial early; the message says when."""


class TrialOverdue(BaseException):
    """A trial took longer than its time limit; the message says so.

    A signal raises it in the middle of a scenario's code, which may catch every `Exception`.
    """


class Preempted(SystemExit):
    """The exit of a stage whose pod is evicted (SIGTERM). The next start resumes from the last checkpoint."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class StageFailed(MappoError):
    """A stage ended without a result and has printed why. `is_final`: another attempt would fail alike.

    `exit_status` is that of the error by which the stage failed.
    """

    def __init__(self, message: str, *, is_final: bool = False, exit_status: int = 1):
        super().__init__(message)
        self.is_final, self.exit_status = is_final, exit_status


def hint_for(name: str, known: Iterable[str], otherwise: str) -> str:
    """Return the question whether the closest known name is meant; `otherwise` if none is close."""
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def reason_of(error: BaseException) -> str:
    """Return the text of an error for people: of a file, its name and what is wrong, without a number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def one_line(error: object, limit: int = 500) -> str:
    """Return the text of an error, or of anything that others wrote, as one short line that can be printed."""
    words = " ".join(str(error).split())
    line = "".join(character if character.isprintable() else "?" for character in words)
    return line if len(line) <= limit else f"{line[: limit - 4]} ..."
