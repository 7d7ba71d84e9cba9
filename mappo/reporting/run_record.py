"""The record of a run: its history, last evaluation and recorded episodes, stored beside its checkpoints."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mappo.errors import ConfigError, KeyMissing
from mappo.evaluation.evaluation import EvaluationReport
from mappo.evaluation.rollouts import Rollouts
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.run import Run
from mappo.strict_json import parse_report, to_dict

EVALUATION, ROLLOUTS = "evaluation.json", "rollouts.json"  # keys in the store of a run
MAX_BYTES = 100_000_000  # limit for each of the two files
_REPORT = TypeAdapter(EvaluationReport)
_ROLLOUTS = TypeAdapter(Rollouts)


@dataclass(frozen=True)
class RunRecord:
    """The data about one run that a page shows.

    history: as CSV. rollouts: recorded episodes as JSON. facts: further values to show, by name.
    """

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
    """Return the record of the run that saved `checkpoint`."""
    platform = checkpoint.platform
    facts = {
        "device": platform.device,
        "threads": str(platform.threads),
        "computation": str(checkpoint.computation),
        "started from": checkpoint.started_from or "scratch",
        "versions": ", ".join(f"{package} {version}" for package, version in platform.versions.items()),
    }
    return RunRecord(name, to_dict(checkpoint.config), history, evaluation, rollouts, facts)


def of_runs(locations: Sequence[str]) -> list[RunRecord]:
    """Return the records of stored runs, under short names that differ.

    Raises:
        CheckpointError: a run has no checkpoint that can be read.
        ConfigError: a run appears twice, or its evaluation or recorded episodes are not valid.
        StoreError: a store does not answer.
    """
    names = _unique_names(locations)
    return [_of_run(name, location) for name, location in zip(names, locations, strict=True)]


def keep(run: str | Path, evaluation: EvaluationReport, rollouts: Rollouts) -> None:
    """Save the evaluation of a run and its recorded episodes with the run, in place of earlier ones.

    Raises:
        StoreError: the store does not accept them.
    """
    store = Run.at(run).store
    for key, value in ((EVALUATION, evaluation), (ROLLOUTS, rollouts)):
        store.write(key, json.dumps(asdict(value), allow_nan=False).encode())


def parse_evaluation(location: str, content: bytes) -> EvaluationReport:
    """Return an evaluation report from its JSON. `location` names the file in errors.

    Raises:
        ConfigError: the content is not an evaluation report.
    """
    return parse_report(_REPORT, location, content, "an evaluation report")


def _of_run(name: str, location: str) -> RunRecord:
    run = Run.at(location)
    last = run.load(run.choose("last"), ["history"])
    contents: dict[str, bytes] = {}
    for key in (EVALUATION, ROLLOUTS):
        with suppress(KeyMissing):
            contents[key] = run.store.read(key, MAX_BYTES)
    evaluation, rollouts = None, None
    if EVALUATION in contents:
        evaluation = parse_evaluation(f"{location}/{EVALUATION}", contents[EVALUATION])
    if ROLLOUTS in contents:
        parsed = parse_report(_ROLLOUTS, f"{location}/{ROLLOUTS}", contents[ROLLOUTS], "recorded episodes")
        rollouts = asdict(parsed)
    return of_checkpoint(name, last, run.whole_history(last), evaluation, rollouts)


def _unique_names(locations: Sequence[str]) -> list[str]:
    """Return the last parts of each location, as many as are needed to make the names differ."""
    paths = [[part for part in location.split("/") if part] for location in locations]
    if len({tuple(path) for path in paths}) < len(paths):
        raise ConfigError("a run is given twice; every run may appear once")
    names: list[str] = []
    for length in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names
