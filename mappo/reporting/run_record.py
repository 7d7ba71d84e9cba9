"""The record of a run: its history, evaluations and recorded episodes, stored beside its checkpoints.

A run has one evaluation of its own, which judges its best checkpoint under its own settings. Evaluations of other
checkpoints, or under other settings, are kept beside it, each under a name of its own.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from mappo.errors import ConfigError, KeyMissing, StoreError
from mappo.evaluation.evaluation import EvaluationReport
from mappo.evaluation.rollouts import Rollouts
from mappo.reporting.texts import moment
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.run import Run
from mappo.runs.tags import read_tags
from mappo.strict_json import json_hash, parse_report, to_dict

EVALUATION, ROLLOUTS = "evaluation.json", "rollouts.json"  # keys in the store of a run
_OTHERS = "evaluations/"  # the prefix of the keys of other evaluations
_MAX_OTHERS = 20  # that a record has
MAX_BYTES = 100_000_000  # limit for each file
_REPORT = TypeAdapter(EvaluationReport)
_ROLLOUTS = TypeAdapter(Rollouts)


@dataclass(frozen=True)
class RunRecord:
    """The data about one run that a page shows.

    history: as CSV. rollouts: recorded episodes as JSON. facts: further values to show, by name. best_frames: the
    frames of the run's best checkpoint; None if that is not known. others: other evaluations. problems: what could
    not be read, in sentences.
    """

    name: str
    config: dict[str, Any]
    history: str
    evaluation: EvaluationReport | None = None
    rollouts: dict[str, Any] | None = None
    facts: dict[str, str] = field(default_factory=dict)
    best_frames: int | None = None
    others: tuple[EvaluationReport, ...] = ()
    problems: tuple[str, ...] = ()


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
        "device": platform.device if platform.device != "cpu" else f"cpu ({platform.cpu})",
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
    """Save a run's own evaluation and its recorded episodes with the run, in place of earlier ones.

    Raises:
        StoreError: the store does not accept them.
    """
    store = Run.at(run).store
    for key, value in ((EVALUATION, evaluation), (ROLLOUTS, rollouts)):
        store.write(key, json.dumps(asdict(value), allow_nan=False).encode())


def keep_other(run: str | Path, iteration: int, evaluation: EvaluationReport) -> str:
    """Save another evaluation with the run; return its key, which names the iteration and hashes the settings.

    Raises:
        StoreError: the store does not accept it.
    """
    settings = {name: evaluation.config[name] for name in ("environment", "evaluation")}
    key = f"{_OTHERS}{iteration:010d}-{json_hash(settings)[:8]}.json"
    Run.at(run).store.write(key, json.dumps(asdict(evaluation), allow_nan=False).encode())
    return key


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
    record = of_checkpoint(name, last, run.whole_history(last), evaluation, rollouts)
    others, problems = _other_evaluations(run)
    labels: dict[str, str] = {}
    try:
        tags = read_tags(run.store)
        labels = {"tags": " ".join(tags.tags), "comment": tags.comment}
    except (ConfigError, StoreError) as error:
        problems.append(str(error))
    return replace(
        record,
        facts={"location": location, **labels, **origin(run), **record.facts},
        best_frames=run.manifest(run.choose("best")).frames,
        others=tuple(others),
        problems=tuple(problems),
    )


def origin(run: Run) -> dict[str, str]:
    """Return when, where and from which source the run was trained, as the notes of its attempts say."""
    notes = [note for _, note in run.attempts.from_number(1)]
    if not notes:
        return {}
    first, last = notes[-1], notes[0]
    facts = {"began": f"{moment(first.started)} on {first.host}"}
    if len(notes) > 1:
        facts["attempts"] = f"{len(notes)}, the last one began {moment(last.started)} on {last.host}"
    commits = dict.fromkeys(note.commit for note in reversed(notes) if note.commit)
    return {**facts, "commit": ", ".join(commits)}


def _other_evaluations(run: Run) -> tuple[list[EvaluationReport], list[str]]:
    """Return the other evaluations that were saved last, and sentences about those that cannot be read."""
    entries = sorted(run.store.entries(_OTHERS), key=lambda entry: entry.modified)[-_MAX_OTHERS:]
    reports: list[EvaluationReport] = []
    problems: list[str] = []
    for entry in entries:
        try:
            content = run.store.read(entry.key, MAX_BYTES)
            reports.append(parse_evaluation(f"{run.store.location}/{entry.key}", content))
        except (ConfigError, StoreError) as error:
            problems.append(str(error))
    return reports, problems


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
