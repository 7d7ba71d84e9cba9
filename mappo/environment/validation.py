"""Is this environment fit to train on? Checks that cost seconds, before a GPU is spent on hours."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, config_hash
from mappo.environment.checks import CHECKS, Concern, Task, batch_fits, interface_is_kept, is_built, measure_speed
from mappo.environment.environment import scenario_module
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import ConfigError, EnvironmentUnfit


@dataclass(frozen=True)
class Check:
    """One line of the report: what was checked, how it went, and what was found or should be done."""

    name: str
    outcome: Literal["passed", "warning", "failed"]
    detail: str


@dataclass(frozen=True)
class ValidationReport:
    """All checks in order. A failed check is a reason not to train; a warning is something to look at."""

    config_hash: str
    checks: list[Check]

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.outcome == "failed"]


def validate(config: ExperimentConfig, on_check: Callable[[Check], object]) -> ValidationReport:
    """Run every check on the task and the device that `config` names; `on_check` hears of each as it ends.

    Whatever a check raises makes it a failed check with that reason. Without a device, an environment or answers
    in the right shape there is nothing more to check.
    """
    checks: list[Check] = []

    def run(name: str, check: Callable[[], str]) -> bool:
        checks.append(_run(name, check, config.environment.scenario))
        on_check(checks[-1])
        return checks[-1].outcome != "failed"

    if run("device", lambda: f"{resolve_device(config.device)}"):
        device = resolve_device(config.device)
        task = Task(config, device)
        with private_random_streams(config.seed, Stream.VALIDATION, device):
            if run("environment", lambda: is_built(task)) and run("interface", lambda: interface_is_kept(task)):
                for name, check in CHECKS.items():
                    run(name, partial(check, task))
                if run("memory", lambda: batch_fits(task)):
                    run("speed", lambda: measure_speed(task))
    return ValidationReport(config_hash(config), checks)


def _run(name: str, check: Callable[[], str], scenario: str) -> Check:
    try:
        return Check(name, "passed", check())
    except Concern as concern:
        return Check(name, "warning", str(concern))
    except (EnvironmentUnfit, ConfigError) as reason:
        return Check(name, "failed", str(reason))
    except Exception as error:  # a scenario is foreign code: anything it raises is a finding
        found = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(name, "failed", f"{found}{_place(error, scenario)}")


def _place(error: Exception, scenario: str) -> str:
    """The last line of the scenario's own file that an exception came through; empty if it did not."""
    file = scenario_module(scenario).__file__
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f", in {lines[-1].name}, {Path(lines[-1].filename).name} line {lines[-1].lineno}" if lines else ""
