"""The validation of an environment: checks that take seconds and find mistakes before hours of training."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, config_hash
from mappo.environment.checks import (
    CHECKS,
    Task,
    batch_fits_in_memory,
    environment_is_built,
    interface_is_kept,
    measure_speed,
)
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.environment.vmas_environment import place_in, place_of_mistake
from mappo.errors import Concern, ConfigError, EnvironmentUnfit

SLOW_SECONDS = 20.0  # after which a check says that it still runs, and where


@dataclass(frozen=True)
class Check:
    """A line of the report: the name of the check, its outcome, and a measurement, a reason or advice."""

    name: str
    outcome: Literal["passed", "warning", "failed"]
    detail: str


@dataclass(frozen=True)
class ValidationReport:
    """The checks in order. A failed check is a reason not to train; somebody should look at a warning."""

    config_hash: str
    checks: list[Check]

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.outcome == "failed"]


def validate(
    config: ExperimentConfig,
    on_check: Callable[[Check], object],
    rehearse: Callable[[ExperimentConfig], str] | None = None,
    on_slow: Callable[[str], object] = lambda _: None,
) -> ValidationReport:
    """Run every check on the task and the device that `config` names.

    `on_check` is called with each check when it ends, and `on_slow` with a line every `SLOW_SECONDS` of a check,
    by another thread. `rehearse` trains a little, as one more check. A check that raises any exception has failed,
    with the exception as its reason. Later checks are skipped if the device, the environment or the interface
    fails.
    """
    checks: list[Check] = []

    def run(name: str, check: Callable[[], str]) -> bool:
        with _told_when_slow(name, on_slow):
            checks.append(_run(name, check))
        on_check(checks[-1])
        return checks[-1].outcome != "failed"

    if run("device", lambda: str(resolve_device(config.device))):
        device = resolve_device(config.device)
        task = Task(config, device)
        with private_random_streams(config.seed, Stream.VALIDATION, device):
            is_built = run("environment", lambda: environment_is_built(task))
            if is_built and run("interface", lambda: interface_is_kept(task)):
                for name, check in CHECKS.items():
                    run(name, partial(check, task))
                if run("memory", lambda: batch_fits_in_memory(task)):
                    if rehearse:
                        run("training", lambda: rehearse(config))
                    run("speed", lambda: measure_speed(task))
    return ValidationReport(config_hash(config), checks)


@contextmanager
def _told_when_slow(name: str, on_slow: Callable[[str], object]) -> Iterator[None]:
    """Call `on_slow` every `SLOW_SECONDS` while the block runs, with the line of the user's code that it runs."""
    has_ended, checking = threading.Event(), threading.get_ident()

    def watch() -> None:
        started = time.monotonic()
        while not has_ended.wait(SLOW_SECONDS):
            place = place_in(traceback.extract_stack(sys._current_frames()[checking]))
            on_slow(f"{name}: still running after {time.monotonic() - started:.0f} s{place}")

    thread = threading.Thread(target=watch, name="slow check", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()


def _run(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name, "passed", check())
    except Concern as concern:
        return Check(name, "warning", str(concern))
    except (EnvironmentUnfit, ConfigError) as reason:
        return Check(name, "failed", str(reason))
    except Exception as error:  # a scenario is foreign code, so every exception is a finding
        message = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(name, "failed", f"{message}{place_of_mistake(error)}")
