"""The attempts of one stage on a cluster, counted in one place for processes and pods.

Kubeflow's compiler sets no retry policy, so that the cluster decides which failures Argo tries again, at how many
levels of its workflow. So a stage supervises its own process: it starts a process that ended badly again, in the
same pod, and it keeps count in an object beside the artifacts of the run. A pod that Argo makes later counts on
there, and refuses to try more often than the site says.
"""

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TypeVar

from mappo.compute.cgroups import num_oom_kills
from mappo.errors import ConfigError, KeyMissing, StoreError
from mappo.runs.locations import open_store

T = TypeVar("T")
FINAL_STATUS = 78  # of a process that would fail again in the same way; EX_CONFIG in sysexits.h
COUNT_VARIABLE = "MAPPO_ATTEMPTS"  # for the process of an attempt: how many there were, with this one
REASON_VARIABLE = "MAPPO_REASON_FILE"  # where that process writes why it failed
_MAX_BYTES = 100_000
_STORE_SECONDS = 30.0
_OUT_OF_MEMORY = (
    "out of memory: the kernel ended the stage at its pod's limit; give it more: -p {stage}_memory=..., or "
    "stages.{stage}.memory in the site's file"
)


@dataclass(frozen=True)
class RetryPolicy:
    """The number of retries of a stage; the wait before the first of them, and its growth with each."""

    retries: int
    backoff_seconds: float
    backoff_factor: float

    def wait_seconds(self, attempt: int) -> float:
        """Return the wait after an attempt, which is counted from 0."""
        return self.backoff_seconds * self.backoff_factor**attempt


@dataclass(frozen=True)
class AttemptCount:
    """The attempts so far. pods: the UID of each pod by its name; failure: why there is no other attempt."""

    num_attempts: int = 0
    pods: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""


class Ledger:
    """The count of a stage's attempts, in a store at `location` under `key`.

    Without a store that can be used, it counts the attempts of this pod alone, after those that Argo numbers.
    """

    def __init__(self, location: str, key: str, environment: Mapping[str, str], announce: Callable[[str], object]):
        self._location, self._key, self._announce = location, key, announce
        self._pod, self._uid = environment.get("KFP_POD_NAME", ""), environment.get("KFP_POD_UID", "")
        index = environment.get("KFP_RETRY_INDEX", "")
        self._count = AttemptCount(num_attempts=int(index) if index.isdecimal() else 0)
        self._is_usable = True
        self._count = self._with_store(self._read) or self._count

    @property
    def failure(self) -> str:
        """The reason why there is no other attempt; empty if there may be one."""
        return self._count.failure

    @property
    def num_attempts(self) -> int:
        """The attempts that have begun."""
        return self._count.num_attempts

    def begin(self) -> int:
        """Count an attempt; return its number, from 0."""
        self._set(replace(self._count, num_attempts=self._count.num_attempts + 1))
        return self._count.num_attempts - 1

    def fail(self, reason: str) -> None:
        """Keep why there is no other attempt."""
        self._set(replace(self._count, failure=reason))

    def succeed(self) -> None:
        """Forget the count: a stage that succeeded begins anew, should Argo repeat all that is around it."""
        self._set(AttemptCount())

    def refuse(self) -> None:
        """Remember this pod, so that it is known again when somebody retries the run."""
        self._set(self._count)

    def _set(self, count: AttemptCount) -> None:
        self._count = replace(count, pods={**count.pods, self._pod: self._uid})
        self._with_store(self._write)

    def _read(self) -> AttemptCount:
        """Return the count so far; none if this pod had another UID before, since somebody retried the run."""
        try:
            text = open_store(self._location, _STORE_SECONDS).read(self._key, _MAX_BYTES)
        except KeyMissing:
            return self._count
        count = _parsed(text)
        is_retried_run = count.pods.get(self._pod, self._uid) != self._uid
        return AttemptCount() if is_retried_run else count

    def _write(self) -> None:
        text = json.dumps(asdict(self._count))
        open_store(self._location, _STORE_SECONDS).write(self._key, text.encode())

    def _with_store(self, action: Callable[[], T]) -> T | None:
        if not self._is_usable:
            return None
        try:
            return action()
        except (StoreError, OSError, ValueError) as error:
            self._is_usable = False
            self._announce(f"warning: attempts are counted in this pod alone: {error}")
            return None


def supervise(
    stage: str, command: Sequence[str], policy: RetryPolicy, ledger: Ledger, announce: Callable[[str], object]
) -> int:
    """Run a command until it succeeds, cannot succeed, or has been tried often enough; return the exit status."""
    most = policy.retries + 1
    if ledger.failure or ledger.num_attempts >= most:
        ledger.refuse()
        _announce_failure(ledger.failure or "its pods were lost", announce)
        announce(f"not tried again: {ledger.num_attempts} of at most {most} attempts were made")
        return 1
    while True:
        number = ledger.begin()
        left = most - ledger.num_attempts
        announce(f"attempt {number}; {left} left")
        ended = _run(stage, command, ledger.num_attempts)
        if ended.status == 0:
            ledger.succeed()
        if ended.status == 0 or ended.was_asked:
            return ended.status
        if ended.status == FINAL_STATUS or not left:
            if not ended.has_told_why:
                _announce_failure(ended.reason, announce)
            why = "another attempt would fail in the same way" if left else f"all {most} attempts were made"
            announce(f"not tried again: {why}")
            ledger.fail(ended.reason)
            return 1
        wait = policy.wait_seconds(number)
        announce(f"attempt {number} ended: {ended.reason}; attempt {number + 1} begins in {wait:g} s")
        time.sleep(wait)


def _announce_failure(reason: str, announce: Callable[[str], object]) -> None:
    for line in reason.splitlines():
        announce(f"failed: {line}")


@dataclass(frozen=True)
class _Ended:
    """The end of an attempt's process. has_told_why: it printed the reason. was_asked: its pod has to go."""

    status: int
    reason: str = ""
    has_told_why: bool = False
    was_asked: bool = False


def _run(stage: str, command: Sequence[str], num_attempts: int) -> _Ended:
    """Run one attempt, with which there are so many."""
    kills = num_oom_kills()
    with tempfile.TemporaryDirectory() as directory:
        reason = Path(directory, "reason")
        environment = {**os.environ, COUNT_VARIABLE: str(num_attempts), REASON_VARIABLE: str(reason)}
        process = subprocess.Popen(command, env=environment)
        with _forwarded_sigterm(process) as was_asked:
            status = process.wait()
        told = reason.read_text().strip() if reason.exists() else ""
    if status and was_asked:
        return _Ended(128 + signal.SIGTERM, was_asked=True)
    if status and num_oom_kills() > kills:
        return _Ended(FINAL_STATUS, _OUT_OF_MEMORY.replace("{stage}", stage))
    if told:
        return _Ended(status, told, has_told_why=True)
    if status < 0:
        return _Ended(status, f"signal {-status} ended its process ({signal.Signals(-status).name})")
    return _Ended(status, f"its process ended with exit status {status}")


@contextmanager
def _forwarded_sigterm(process: subprocess.Popen[bytes]) -> Iterator[list[bool]]:
    """Pass SIGTERM on to a process; the list is filled when that happens."""
    was_asked: list[bool] = []

    def forward(_: int, __: FrameType | None) -> None:
        was_asked.append(True)
        process.terminate()

    before = signal.signal(signal.SIGTERM, forward)
    try:
        yield was_asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _parsed(text: bytes) -> AttemptCount:
    """Read a count.

    Raises:
        ConfigError: the text is none.
    """
    try:
        values = json.loads(text)
        count = AttemptCount(**values)
        is_sound = isinstance(count.pods, dict) and isinstance(count.failure, str)
        if not is_sound or not isinstance(count.num_attempts, int) or count.num_attempts < 0:
            raise TypeError("wrong types")
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"the count of attempts cannot be read: {error}") from None
    return count
