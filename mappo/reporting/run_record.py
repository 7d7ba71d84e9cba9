"""What is known of a run afterwards: its history, its evaluation and episodes to watch, kept in its place."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mappo.errors import ConfigError, KeyMissing
from mappo.evaluation.evaluation import EvaluationReport
from mappo.evaluation.rollouts import Rollouts
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.run import Run
from mappo.strict_json import to_dict

EVALUATION, ROLLOUTS = "evaluation.json", "rollouts.json"  # in the place of a run
_MAX_BYTES = 100_000_000  # of either
_REPORT = TypeAdapter(EvaluationReport)
_ROLLOUTS = TypeAdapter(Rollouts)


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run. history: CSV; facts: what else to tell of it, by name; rollouts: as JSON."""

    name: str
    config: dict[str, Any]
    history: str
    evaluation: EvaluationReport | None = None
    rollouts: dict[str, Any] | None = None
    facts: dict[str, str] = field(default_factory=dict)


def of_checkpoint(
    name: str,
    checkpoint: Checkpoint,
    history: str,
    evaluation: EvaluationReport | None,
    rollouts: dict[str, Any] | None,
) -> RunRecord:
    """The record of a run of which this is a checkpoint."""
    platform = checkpoint.platform
    facts = {
        "device": platform.device,
        "threads": str(platform.threads),
        "started from": checkpoint.started_from or "scratch",
        "versions": ", ".join(f"{package} {version}" for package, version in platform.versions.items()),
    }
    return RunRecord(name, to_dict(checkpoint.config), history, evaluation, rollouts, facts)


def of_runs(locations: Sequence[str]) -> list[RunRecord]:
    """What runs have kept of themselves, under short names that tell them apart.

    Raises:
        CheckpointError: there is no checkpoint that can be read.
        ConfigError: a run twice, or something kept with it that is not what it should be.
        StoreError: a store does not answer.
    """
    names = _different_names(locations)
    return [_of_run(name, location) for name, location in zip(names, locations, strict=True)]


def keep(run: str | Path, evaluation: EvaluationReport, rollouts: Rollouts) -> None:
    """Keep an evaluation in the place of the run that it judged, instead of an earlier one.

    Raises:
        StoreError: it cannot be written there.
    """
    store = Run.at(run).store
    for key, value in ((EVALUATION, evaluation), (ROLLOUTS, rollouts)):
        store.write(key, json.dumps(asdict(value), allow_nan=False).encode())


def parse_evaluation(place: str, content: bytes) -> EvaluationReport:
    """An evaluation that was written as JSON; `place` is where, for errors.

    Raises:
        ConfigError: it is none.
    """
    report: EvaluationReport = _parsed(_REPORT, place, content, "an evaluation report")
    return report


def _of_run(name: str, location: str) -> RunRecord:
    place = Run.at(location)
    last = place.load(place.choose("last"))
    found: dict[str, bytes] = {}
    for key in (EVALUATION, ROLLOUTS):
        with suppress(KeyMissing):
            found[key] = place.store.read(key, _MAX_BYTES)
    evaluation, rollouts = None, None
    if EVALUATION in found:
        evaluation = parse_evaluation(f"{location}/{EVALUATION}", found[EVALUATION])
    if ROLLOUTS in found:
        seen = _parsed(_ROLLOUTS, f"{location}/{ROLLOUTS}", found[ROLLOUTS], "recorded episodes")
        rollouts = asdict(seen)
    return of_checkpoint(name, last, last.history, evaluation, rollouts)


def _parsed(adapter: TypeAdapter[Any], place: str, content: bytes, what: str) -> Any:
    try:
        return adapter.validate_json(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field_name = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(f"{place}: not {what}: {field_name}: {problem['msg']}") from None


def _different_names(locations: Sequence[str]) -> list[str]:
    """The last parts of their places, as many as tell them apart."""
    parts = [[part for part in location.split("/") if part] for location in locations]
    if len({tuple(each) for each in parts}) < len(parts):
        raise ConfigError("every run may appear once")
    names: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-length:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return names
