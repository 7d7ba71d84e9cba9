"""The overview of a store: one summary for each of its runs, read without torch and without any tensor.

A listing shows the runs. One manifest of each is read, besides its evaluation and its tags. A file that was read
before is taken from a cache of this user: manifests by their SHA-256, other files by size and time. Nothing here
decides anything, and what cannot be read is a summary with the reason.

A run is a folder with the note of an attempt, so that a copy of a checkpoint is none. A run inside of the folder
of another one is a part of that.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as strict_dataclass

import mappo
from mappo.config import from_dict
from mappo.errors import CheckpointError, ConfigError, MappoError, StoreUnavailable, one_line
from mappo.recipes import fields_of_recipes, nearest_recipe
from mappo.runs.checkpoint import MAX_MANIFEST_BYTES, parse_manifest, verify
from mappo.runs.checkpoint_ref import CheckpointRef, newest_first
from mappo.runs.locations import joined, open_store
from mappo.runs.owned_file import write_whole
from mappo.runs.store import Entry, Store
from mappo.runs.tags import MAX_BYTES, TAGS, Tags, parse_tags
from mappo.strict_json import json_hash, parse_report, to_dict

T = TypeVar("T")
_CHECKPOINT = re.compile(r"(?:(.*)/)?(checkpoints/[^/]+/[^/]+\.json)", re.DOTALL)  # names may have any character
_MARK = re.compile(r"(?:(.*)/)?(?:attempts/[0-9]{4,9}\.json|checkpoint\.json)", re.DOTALL)  # the latter: format 2
_EVALUATION = "evaluation.json"
_MAX_EVALUATION_BYTES = 20_000_000
_THREADS = 10  # that read files of a bucket
_SETTLED_SECONDS = 2.0  # a younger file may change again within the resolution of its time
_UNSHOWN = ("environment.scenario", "seed", "threads", "device")  # fields that a summary shows elsewhere, or not
_HEADLINE = ConfigDict(strict=True, extra="ignore")
_Number = Annotated[float, Field(allow_inf_nan=False)]


@strict_dataclass(frozen=True, config=_HEADLINE)
class Interval:
    """A mean with its interval, as an evaluation reports it."""

    value: _Number
    low: _Number | None = None
    high: _Number | None = None

    def __str__(self) -> str:
        """Return the value with its interval, as in `0.98 [0.96, 1]`."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


@strict_dataclass(frozen=True, config=_HEADLINE)
class _Measured:
    mean: Interval | None


@strict_dataclass(frozen=True, config=_HEADLINE)
class _Policy:
    mean: Interval
    measurements: dict[str, _Measured] = Field(default_factory=dict)


@strict_dataclass(frozen=True, config=_HEADLINE)
class _Evaluation:
    """The part of an `EvaluationReport` that a summary shows; to read the whole report takes torch."""

    training_frames: int
    trained: _Policy
    random: _Policy


@strict_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class Training:
    """The training of a run, as its newest manifest describes it.

    recipe: the one with the fewest other fields. changes: the fields that differ from it, by dotted name, but
    those in `_UNSHOWN`. highest_return: that of the best checkpoint, in evaluations during training. config: the
    complete configuration.
    """

    task: str
    algorithm: str
    recipe: str
    changes: dict[str, Any]
    seed: int
    frames: int
    final_frames: int
    is_finished: bool
    highest_return: float | None
    started_from: str
    device: str
    config: dict[str, Any]


@strict_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class RunSummary:
    """A run of an overview.

    name: relative to the store. problem: why the run, or a file of it, cannot be read. training and what follows
    are empty if they cannot be read, or are not there yet. evaluated_frames: the frames of the judged checkpoint.
    modified: when the newest checkpoint was saved, in seconds since 1970. page: the key of the run's page.
    """

    name: str
    location: str
    problem: str = ""
    training: Training | None = None
    evaluation: Interval | None = None
    random: Interval | None = None
    evaluated_frames: int | None = None
    measurements: dict[str, Interval] = Field(default_factory=dict)
    modified: float = 0.0
    tags: tuple[str, ...] = ()
    comment: str = ""
    page: str = ""


@strict_dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid"))
class _Cached:
    """The cache of one store: manifests by SHA-256, other files by key, size and time.

    maker: the version of mappo that made the summaries, and a hash of the recipes that they name.
    """

    maker: str
    trainings: dict[str, Training] = Field(default_factory=dict)
    evaluations: dict[str, _Evaluation] = Field(default_factory=dict)
    tags: dict[str, Tags] = Field(default_factory=dict)


_CACHED, _REPORT, _SUMMARIES = TypeAdapter(_Cached), TypeAdapter(_Evaluation), TypeAdapter(list[RunSummary])


def overview(location: str, page: str = "") -> list[RunSummary]:
    """Return a summary of each run in a store, sorted by name. `page`: the name of the files of runs' own pages.

    Raises:
        ConfigError: the directory does not exist.
        StoreError: the store does not answer, or the text is not a location.
    """
    store = open_store(location)
    if "://" not in location and not Path(location).is_dir():
        raise ConfigError(f"{location}: there is no such directory; give the store of your runs")
    entries = {entry.key: entry for entry in store.entries_outside("blobs")}
    cache_file = _cache_file(store.location)
    cached = _read_cache(cache_file)
    runs = _runs_of(entries)
    reader = _Reader(store, cached)
    with ThreadPoolExecutor(_THREADS) as threads:
        summaries = list(threads.map(lambda run: reader.summary(run, runs[run], entries, page), sorted(runs)))
    if reader.kept != cached:
        _write_cache(cache_file, reader.kept)
    return summaries


def as_json(summaries: list[RunSummary]) -> list[dict[str, Any]]:
    """Return summaries as JSON objects, which scripts read."""
    records: list[dict[str, Any]] = _SUMMARIES.dump_python(summaries, mode="json")
    return records


class _Reader:
    """The reader of the runs of one store, which remembers what it has read. Any thread may call it."""

    def __init__(self, store: Store, cached: _Cached):
        self._store, self._cached = store, cached
        self._now = time.time()
        self.kept = _Cached(cached.maker)

    def summary(self, run: str, refs: list[CheckpointRef], entries: Mapping[str, Entry], page: str) -> RunSummary:
        """Return the summary of one run; a problem with a file of it is a part of the summary.

        Raises:
            StoreUnavailable: the store does not answer.
        """
        folder = f"{run}/" if run else ""
        location = joined(self._store.location, run) if run else self._store.location
        name = one_line(run or self._store.location.rstrip("/").rpartition("/")[2], 200)
        summary = RunSummary(name, location, page=folder + page if folder + page in entries else "")
        if not refs:
            is_old = f"{folder}checkpoint.json" in entries
            return replace(summary, problem="a run of format 2, this version reads 3") if is_old else summary
        try:
            newest = entries[folder + refs[0].key]
            summary = replace(summary, modified=newest.modified, training=self._training(newest, refs[0].sha256))
            if entry := entries.get(folder + TAGS):
                tags = self._read(entry, self._cached.tags, self.kept.tags, MAX_BYTES, parse_tags)
                summary = replace(summary, tags=tags.tags, comment=one_line(tags.comment, 2000))
            if entry := entries.get(folder + _EVALUATION):
                stored, kept = self._cached.evaluations, self.kept.evaluations
                evaluation = self._read(entry, stored, kept, _MAX_EVALUATION_BYTES, _parse_evaluation)
                summary = replace(summary, **_headline(evaluation))
        except StoreUnavailable:
            raise
        except MappoError as error:
            return replace(summary, problem=one_line(error))
        return summary

    def _training(self, entry: Entry, sha256: str) -> Training:
        training = self._cached.trainings.get(sha256)
        if training is None:
            location = f"{self._store.location}/{entry.key}"
            content = verify(self._store.read(entry.key, MAX_MANIFEST_BYTES), sha256, location)
            training = _training_of(content, location)
        self.kept.trainings[sha256] = training
        return training

    def _read(
        self,
        entry: Entry,
        cached: Mapping[str, T],
        kept: dict[str, T],
        max_bytes: int,
        parse: Callable[[str, bytes], T],
    ) -> T:
        """Return the parsed content of a file that may change, from the cache if it has not changed since."""
        signature = f"{entry.key} {entry.size_bytes} {entry.modified!r}"
        value = cached.get(signature)
        if value is None:
            value = parse(f"{self._store.location}/{entry.key}", self._store.read(entry.key, max_bytes))
        if self._now - entry.modified > _SETTLED_SECONDS:
            kept[signature] = value
        return value


def _runs_of(entries: Iterable[str]) -> dict[str, list[CheckpointRef]]:
    """Return the checkpoints of each run, the newest first, by the run's folder. Leave out runs inside of runs."""
    runs: dict[str, list[CheckpointRef | None]] = {
        match[1] or "": [] for key in entries if (match := _MARK.fullmatch(key))
    }
    for key in entries:
        if (match := _CHECKPOINT.fullmatch(key)) and (match[1] or "") in runs:
            runs[match[1] or ""].append(CheckpointRef.from_key(match[2]))
    return {run: newest_first(refs) for run, refs in runs.items() if not _is_inside(run, runs)}


def _is_inside(run: str, runs: Mapping[str, object]) -> bool:
    parts = run.split("/") if run else []
    return any("/".join(parts[:length]) in runs for length in range(len(parts)))


def _training_of(content: bytes, location: str) -> Training:
    """Read a manifest.

    Raises:
        CheckpointError: it is not one of this version's.
    """
    manifest = parse_manifest(content, location)
    try:
        config = from_dict(manifest.config)
    except ConfigError as error:
        raise CheckpointError(f"{location}: {one_line(error)}") from None
    recipe, changes = nearest_recipe(config)
    return Training(
        task=config.environment.scenario,
        algorithm="MAPPO" if config.networks.critic == "central" else "IPPO",
        recipe=recipe,
        changes={name: value for name, value in changes.items() if name not in _UNSHOWN},
        seed=config.seed,
        frames=manifest.frames,
        final_frames=config.collection.final_frames,
        is_finished=manifest.iteration >= config.collection.num_iterations,
        highest_return=manifest.highest_return,
        started_from=one_line(manifest.started_from),
        device=one_line(manifest.platform.device),
        config=to_dict(config),
    )


def _parse_evaluation(location: str, content: bytes) -> _Evaluation:
    return parse_report(_REPORT, location, content, "an evaluation report")


def _headline(evaluation: _Evaluation) -> dict[str, Any]:
    measurements = {
        one_line(name, 100): measured.mean
        for name, measured in evaluation.trained.measurements.items()
        if measured.mean
    }
    return {
        "evaluation": evaluation.trained.mean,
        "random": evaluation.random.mean,
        "evaluated_frames": evaluation.training_frames,
        "measurements": measurements,
    }


def _cache_file(location: str) -> Path | None:
    """Return the file of the cache for a store; None for a user without a home directory."""
    try:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "mappo"
    except RuntimeError:
        return None
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "") if "://" in location else ""
    place = location if "://" in location else str(Path(location).absolute())
    name = hashlib.sha256(f"{endpoint} {place}".encode(errors="replace")).hexdigest()
    return directory / "runs" / f"{name}.json"


def _read_cache(path: Path | None) -> _Cached:
    """Return the cache; an empty one if there is none, or if it is damaged or another version made it."""
    empty = _Cached(f"{mappo.__version__} {json_hash(fields_of_recipes())[:16]}")
    try:
        cached = _CACHED.validate_json(path.read_bytes()) if path else empty
    except (OSError, ValidationError):
        return empty
    return cached if cached.maker == empty.maker else empty


def _write_cache(path: Path | None, cached: _Cached) -> None:
    """Write the cache, which is only faster than to read all again: a disk that refuses it does no harm."""
    try:
        if path:
            write_whole(path, _CACHED.dump_json(cached).decode())
    except OSError:
        return
