"""Plan the changes that make the schedules of a server those of a file, and carry them out.

The schedules of a file carry the mark of its owner. Schedules without this mark are never changed or deleted.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mappo.errors import ConfigError
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.schedules import (
    Schedule,
    Wait,
    apply_schedule,
    cron_of,
    is_up_to_date,
    owner_of,
    remove_schedule,
    require_owner,
    schedules,
)
from pipelines.kubeflow.submission import Submission, find_experiment
from pipelines.kubernetes_types import shortened
from pipelines.specification import defaults_of

CREATE, REPLACE, KEEP, REMOVE, LEAVE = "create", "replace", "keep", "remove", "leave"
_SHOWN_CHARACTERS = 60  # of a value in a difference


@dataclass(frozen=True)
class Change:
    """A step of a plan: what happens to the schedules of one name.

    action: `CREATE`; `REPLACE`, for a schedule that differs; `KEEP`, for one that does not; `REMOVE` or `LEAVE`,
    for a schedule that the file no longer describes. wanted: what the file describes, or None. listed: the
    schedules of the server, oldest first. differences: how they differ from what the file describes.
    """

    name: str
    action: str
    wanted: tuple[Schedule, Submission] | None
    listed: tuple[Any, ...]
    differences: tuple[str, ...] = ()


def plan_changes(
    kubeflow: Api, owner: str, wanted: Sequence[tuple[Schedule, Submission]], *, is_pruned: bool
) -> list[Change]:
    """Return the changes that make the owner's schedules those that are wanted; the last ones remove others.

    `is_pruned`: remove the owner's schedules that are not wanted, instead of leaving them.

    Raises:
        ConfigError: a schedule of a wanted name has another owner; the message has one line for each.
    """
    by_name: dict[str, list[Any]] = {}
    for listed in schedules(kubeflow):
        by_name.setdefault(listed.display_name, []).append(listed)
    _require_owners(by_name, owner, [schedule.name for schedule, _ in wanted])
    changes = [_change(kubeflow, one, by_name.get(one[0].name, [])) for one in wanted]
    names = {schedule.name for schedule, _ in wanted}
    for name in sorted(by_name.keys() - names):
        if owned := tuple(listed for listed in by_name[name] if owner_of(listed) == owner):
            changes.append(Change(name, REMOVE if is_pruned else LEAVE, None, owned))
    return changes


def carry_out(kubeflow: Api, change: Change, wait: Wait) -> None:
    """Apply one change of a plan.

    Raises:
        ConfigError: somebody else took the name in the meantime.
        ApiError: the server refused a request or did not answer; the next plan continues from there.
    """
    if change.wanted and change.action != KEEP:
        apply_schedule(kubeflow, *change.wanted, wait)
    for listed in change.listed if change.action == REMOVE else ():
        remove_schedule(kubeflow, listed)


def _require_owners(by_name: Mapping[str, Sequence[Any]], owner: str, names: Sequence[str]) -> None:
    problems = []
    for listed in (listed for name in names for listed in by_name.get(name, [])):
        try:
            require_owner(listed, owner)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _change(kubeflow: Api, wanted: tuple[Schedule, Submission], listed: Sequence[Any]) -> Change:
    schedule, submission = wanted
    if not listed:
        return Change(schedule.name, CREATE, wanted, ())
    if any(is_up_to_date(one, schedule, submission) for one in listed):
        extra = () if len(listed) == 1 else ("a second schedule of this name, which an interrupted change left",)
        return Change(schedule.name, REPLACE if extra else KEEP, wanted, tuple(listed), extra)
    return Change(
        schedule.name, REPLACE, wanted, tuple(listed), _differences(kubeflow, schedule, submission, listed[-1])
    )


def _differences(kubeflow: Api, schedule: Schedule, submission: Submission, listed: Any) -> tuple[str, ...]:
    """Return how a schedule of the server differs from what is wanted, in the words of the flags."""
    config = listed.runtime_config
    pairs = [
        ("cron", cron_of(listed), schedule.cron.expression),
        ("max-concurrency", str(listed.max_concurrency), str(schedule.max_concurrency)),
        ("pipeline-root", (config.pipeline_root if config else "") or "", submission.pipeline_root),
    ]
    if submission.service_account:  # without one, the server chooses an account
        pairs.append(("service-account", listed.service_account or "", submission.service_account))
    differences = [_difference(name, before, after) for name, before, after in pairs if before != after]
    experiment = find_experiment(kubeflow, submission.experiment)
    if experiment is None or experiment.experiment_id != listed.experiment_id:
        differences.append(f"experiment: now {submission.experiment}")
    parameters = (config.parameters if config else None) or {}
    differences += _value_differences("parameter", parameters, submission.parameters)
    differences += _pipeline_differences(listed, submission)
    return tuple(differences or ["the pipeline"])


def _pipeline_differences(listed: Any, submission: Submission) -> Iterator[str]:
    """Yield how the pipeline differs: the defaults of its parameters, and the rest in one phrase."""
    if submission.version is not None or not isinstance(listed.pipeline_spec, Mapping):
        return
    body = submission.compiled.body
    stored = (
        listed.pipeline_spec
        if "pipeline_spec" in listed.pipeline_spec
        else {"pipeline_spec": listed.pipeline_spec}
    )
    before, after = defaults_of(stored["pipeline_spec"]), defaults_of(body["pipeline_spec"])
    yield from _value_differences("default of", before, after)
    if _without_defaults(stored) != _without_defaults(body):
        yield "the compiled pipeline"


def _without_defaults(body: Mapping[str, Any]) -> Any:
    """Return a copy of a pipeline without the defaults of its parameters; whole numbers equal their floats."""
    copy = json.loads(json.dumps(body))
    for definition in copy["pipeline_spec"]["root"].get("inputDefinitions", {}).get("parameters", {}).values():
        definition.pop("defaultValue", None)
    return copy


def _value_differences(word: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    old, new = _fields(before), _fields(after)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield _difference(f"{word} {name}", old.get(name), new.get(name))


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by name; the fields of a JSON object, such as a configuration, by dotted names."""
    fields: dict[str, Any] = {}
    for name, value in values.items():
        inner = _object(value)
        if inner is None:
            fields[name] = value
        else:
            fields |= {f"{name}.{key}": field for key, field in _fields(inner).items()}
    return fields


def _object(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str) and value.startswith("{"):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) and value else None


def _difference(name: str, before: Any, after: Any) -> str:
    return f"{name}: {_shown(before)} -> {_shown(after)}"


def _shown(value: Any) -> str:
    if value in (None, ""):
        return "nothing"
    return shortened(value if isinstance(value, str) else json.dumps(value), _SHOWN_CHARACTERS)
