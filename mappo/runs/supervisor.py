"""The supervisor of one stage on a cluster, which retries the stage's process and counts all attempts.

Kubeflow's compiler sets no retry policy. So the cluster decides which failures Argo retries, and at how many
levels of its workflow. To be independent of that, a stage supervises its own process. It restarts a process that
failed, in the same pod, and counts the attempts in an object beside the artifacts of the run. A pod that Argo
creates later continues this count, and makes no more attempts than the site allows.
"""

import json
import os
import re
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
FINAL_STATUS = 78  # the exit status of a process that would fail again in the same way; EX_CONFIG in sysexits.h
COUNT_VARIABLE = "MAPPO_ATTEMPTS"  # tells the process of an attempt the number of attempts so far, itself included
REASON_VARIABLE = "MAPPO_REASON_FILE"  # names the file into which this process writes the reason of its failure
_MAX_BYTES = 100_000
_MAX_ATTEMPTS = 100_000  # beyond which a count is not that of a stage
_STORE_SECONDS = 30.0
_OUT_OF_MEMORY = (
    "out of memory: the kernel killed the stage at its pod's memory limit; raise the limit by "
    "-p {stage}_memory=..., or by stages.{stage}.memory in the site's file"
)


@dataclass(frozen=True)
class RetryPolicy:
    """The number of retries of a stage, the wait before the first retry, and the factor between two waits."""

    retries: int
    backoff_seconds: float
    backoff_factor: float

    def wait_seconds(self, attempt: int) -> float:
        """Return the wait after an attempt. `attempt` is its number, counted from 0."""
        return self.backoff_seconds * self.backoff_factor**attempt


@dataclass(frozen=True)
class AttemptCount:
    """The attempts of a stage so far.

    pods: the UID of each pod by its name. failure: the reason why no other attempt follows; empty if one may.
    """

    num_attempts: int = 0
    pods: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""


class Ledger:
    """The count of a stage's attempts, in a store at `location` under `key`.

    If the store fails, the ledger counts only the attempts of this pod, and starts from Argo's retry number.
    """

    def __init__(self, location: str, key: str, environment: Mapping[str, str], announce: Callable[[str], object]):
        self._location, self._key, self._announce = location, key, announce
        self._pod, self._uid = environment.get("KFP_POD_NAME", ""), environment.get("KFP_POD_UID", "")
        index = environment.get("KFP_RETRY_INDEX", "")
        self._count = AttemptCount(num_attempts=int(index) if re.fullmatch("[0-9]{1,5}", index) else 0)
        self._is_usable = True
        self._count = self._with_store(self._read) or self._count

    @property
    def failure(self) -> str:
        """The reason why no other attempt follows; empty if one may follow."""
        return self._count.failure

    @property
    def num_attempts(self) -> int:
        """The number of attempts that have started."""
        return self._count.num_attempts

    def begin(self) -> int:
        """Count an attempt and return its number, counted from 0."""
        self._set(replace(self._count, num_attempts=self._count.num_attempts + 1))
        return self._count.num_attempts - 1

    def fail(self, reason: str) -> None:
        """Store the reason why no other attempt follows."""
        self._set(replace(self._count, failure=reason))

    def succeed(self) -> None:
        """Reset the count: Argo may repeat the whole pipeline, and the stage then has all its attempts again."""
        self._set(AttemptCount())

    def remember_pod(self) -> None:
        """Store the UID of this pod, by which the ledger notices later that somebody has retried the run."""
        self._set(self._count)

    def _set(self, count: AttemptCount) -> None:
        self._count = replace(count, pods={**count.pods, self._pod: self._uid})
        self._with_store(self._write)

    def _read(self) -> AttemptCount:
        """Return the count in the store, or an empty count if somebody has retried the run since.

        A retried run creates its failed pods again: a pod has the same name then, but another UID.
        """
        try:
            text = open_store(self._location, _STORE_SECONDS).read(self._key, _MAX_BYTES)
        except KeyMissing:
            return self._count
        count = parse_count(text)
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
    """Run a command until it succeeds, fails for good or gets SIGTERM, and return the exit status.

    It fails for good if another attempt would fail in the same way, or if all attempts of the policy were made.
    Pods that Argo creates afterwards make no attempt. `pipelines.kubeflow.progress` parses the lines that
    `announce` prints.
    """
    max_attempts = policy.retries + 1
    if ledger.failure or ledger.num_attempts >= max_attempts:
        ledger.remember_pod()
        _announce_failure(ledger.failure or "its pods were lost", announce)
        announce(f"not tried again: {ledger.num_attempts} of at most {max_attempts} attempts were made")
        return 1
    while True:
        number = ledger.begin()
        remaining = max_attempts - ledger.num_attempts
        announce(f"attempt {number}; {remaining} left")
        end = _run(stage, command, ledger.num_attempts)
        if end.status == 0:
            ledger.succeed()
        if end.status == 0 or end.was_terminated:
            return end.status
        if end.status == FINAL_STATUS or not remaining:
            if not end.has_printed_reason:
                _announce_failure(end.reason, announce)
            cause = (
                "another attempt would fail in the same way"
                if remaining
                else f"all {max_attempts} attempts were made"
            )
            announce(f"not tried again: {cause}")
            ledger.fail(end.reason)
            return 1
        wait = policy.wait_seconds(number)
        announce(f"attempt {number} ended: {end.reason}; attempt {number + 1} begins in {wait:g} s")
        time.sleep(wait)


def _announce_failure(reason: str, announce: Callable[[str], object]) -> None:
    for line in reason.splitlines():
        announce(f"failed: {line}")


@dataclass(frozen=True)
class _AttemptEnd:
    """The end of an attempt's process.

    has_printed_reason: the process itself has printed the reason. was_terminated: the pod is being evicted
    (SIGTERM).
    """

    status: int
    reason: str = ""
    has_printed_reason: bool = False
    was_terminated: bool = False


def _run(stage: str, command: Sequence[str], num_attempts: int) -> _AttemptEnd:
    """Run one attempt in a process of its own. `num_attempts` includes this attempt."""
    num_kills = num_oom_kills()
    with tempfile.TemporaryDirectory() as directory:
        reason_file = Path(directory, "reason")
        environment = {**os.environ, COUNT_VARIABLE: str(num_attempts), REASON_VARIABLE: str(reason_file)}
        process = subprocess.Popen(command, env=environment)
        with _forwarded_sigterm(process) as sigterms:
            status = process.wait()
        reason = reason_file.read_text(errors="replace").strip() if reason_file.exists() else ""
    if status and sigterms:
        return _AttemptEnd(128 + signal.SIGTERM, was_terminated=True)
    if status and num_oom_kills() > num_kills:
        return _AttemptEnd(FINAL_STATUS, _OUT_OF_MEMORY.replace("{stage}", stage))
    if reason:
        return _AttemptEnd(status, reason, has_printed_reason=True)
    if status < 0:
        return _AttemptEnd(status, f"signal {-status} ended its process ({signal.Signals(-status).name})")
    return _AttemptEnd(status, f"its process ended with exit status {status}")


@contextmanager
def _forwarded_sigterm(process: subprocess.Popen[bytes]) -> Iterator[list[bool]]:
    """Forward SIGTERM to a process while the block runs. The list has an element for every SIGTERM."""
    sigterms: list[bool] = []

    def forward(_: int, __: FrameType | None) -> None:
        sigterms.append(True)
        process.terminate()

    previous_handler = signal.signal(signal.SIGTERM, forward)
    try:
        yield sigterms
    finally:
        signal.signal(signal.SIGTERM, previous_handler)


def parse_count(text: bytes) -> AttemptCount:
    """Parse a count.

    Raises:
        ConfigError: the text is not a count.
    """
    try:
        values = json.loads(text)
        count = AttemptCount(**values)
        is_sound = isinstance(count.pods, dict) and isinstance(count.failure, str)
        if not is_sound or type(count.num_attempts) is not int or not 0 <= count.num_attempts < _MAX_ATTEMPTS:
            raise TypeError("wrong types")
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"the count of attempts cannot be read: {error}") from None
    return count
