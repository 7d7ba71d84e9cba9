"""The runs of an overview as a table: its fields, by which people filter and sort, and its cells."""

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from mappo.config import ExperimentConfig, fields_of, from_dict
from mappo.errors import ConfigError, one_line
from mappo.reporting.texts import age, aligned
from mappo.runs.overview import RunSummary
from mappo.strict_json import parse_json

Fields = Mapping[str, Any]
_CONDITION = re.compile(r"([A-Za-z0-9_.-]+)(!=|>=|<=|=|<|>)(.*)", re.DOTALL)
_ORDERS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "<": operator.lt,
    ">": operator.gt,
}
_TEXT_FIELDS = ("run", "task", "tag", "comment")  # that a condition without an operator looks at
_OWN_FIELDS = (
    *_TEXT_FIELDS,
    *("algorithm", "recipe", "seed", "frames", "state", "return", "evaluation", "age", "modified", "device"),
)
TEXT_COLUMNS = ("run", "task", "state", "changes", "tags")  # the other columns have numbers
_MAX_MEASUREMENTS = 4  # columns of a table for people; --output json has all


@dataclass(frozen=True)
class Row:
    """A run of a table. fields: its values, by which it is filtered and sorted; None where one is unknown."""

    summary: RunSummary
    fields: Fields


def rows_of(
    summaries: Sequence[RunSummary],
    now: float,
    conditions: Sequence[str] = (),
    sort: str = "",
    reverse: bool = False,
) -> list[Row]:
    """Return the rows of the runs that meet all conditions, sorted by a field, or else the newest first.

    A condition is a field, an operator (= != < <= > >=) and a value, such as evaluation>0.9, or a text that the
    name, the task, a tag or the comment contains. Numbers are sorted from the highest, texts from A; `reverse`
    turns this. Runs without the field are last.

    Raises:
        ConfigError: a field is unknown.
    """
    rows = [Row(summary, _fields(summary, now)) for summary in summaries]
    known = {*_OWN_FIELDS, *fields_of(ExperimentConfig()), *(name for row in rows for name in row.fields)}
    tests = [_condition(text, known) for text in conditions]
    chosen = [row for row in rows if all(test(row.fields) for test in tests)]
    field = _known(sort, known) if sort else "modified"
    return _sorted(chosen, field, reverse)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Return the names of the columns that a table of these rows needs."""
    measurements = sorted({name for row in rows for name in row.summary.measurements})[:_MAX_MEASUREMENTS]
    tags = ["tags"] if any(row.summary.tags or row.summary.comment for row in rows) else []
    names = ["run", "task", "changes", "seed", "frames", "state", "return", "evaluation", "age"]
    return [*names, *tags, *measurements]


def cells(row: Row, columns: Sequence[str]) -> list[str]:
    """Return the texts of a row. A run that cannot be read has the reason in place of its changes."""
    summary, training = row.summary, row.summary.training
    texts = {
        "run": summary.name,
        "task": training.task if training else "",
        "changes": changes_text(summary) if training else summary.problem,
        "seed": str(training.seed) if training else "",
        "frames": _frames(summary),
        "state": row.fields["state"],
        "return": "" if training is None or training.highest_return is None else f"{training.highest_return:.3g}",
        "evaluation": str(summary.evaluation or ""),
        "age": age(3600 * row.fields["age"]) if row.fields["age"] is not None else "",
        "tags": " ".join([*summary.tags, *([f'"{summary.comment}"'] if summary.comment else [])]),
    }
    return [texts[name] if name in texts else str(summary.measurements.get(name, "")) for name in columns]


def lines(rows: Sequence[Row], max_width: int = 60) -> list[str]:
    """Return a table for a terminal; changes and tags are cut after `max_width` characters."""
    columns = columns_of(rows)
    table = [columns, *([one_line(cell, max_width) for cell in cells(row, columns)] for row in rows)]
    return aligned(table, left=[index for index, name in enumerate(columns) if name in TEXT_COLUMNS])


def changes_text(summary: RunSummary) -> str:
    """Return the recipe of a run and its changes, with short names of fields."""
    training = summary.training
    assert training
    changes = (f"{name.rpartition('.')[2]} {json.dumps(value)}" for name, value in training.changes.items())
    start = [f"from {training.started_from}"] if training.started_from else []
    return one_line(", ".join([training.recipe, *changes, *start]), 2000)


def _frames(summary: RunSummary) -> str:
    training = summary.training
    if training is None:
        return ""
    return f"{training.frames:,}" + ("" if training.is_finished else f" of {training.final_frames:,}")


def _fields(summary: RunSummary, now: float) -> Fields:
    """Return the values by which a run is filtered and sorted; later ones have priority if names are equal."""
    training = summary.training
    fields: dict[str, Any] = {name: interval.value for name, interval in summary.measurements.items()}
    if training:
        fields |= fields_of(from_dict(training.config))
        fields |= {
            "task": training.task,
            "algorithm": training.algorithm,
            "recipe": training.recipe,
            "frames": training.frames,
            "return": training.highest_return,
            "device": training.device,
        }
    return fields | {
        "run": summary.name,
        "state": _state(summary),
        "evaluation": summary.evaluation.value if summary.evaluation else None,
        "modified": summary.modified or None,
        "age": (now - summary.modified) / 3600 if summary.modified else None,
        "tag": summary.tags,
        "comment": summary.comment,
    }


def _state(summary: RunSummary) -> str:
    if summary.training is None:
        return "unreadable" if summary.problem else "started"
    if summary.problem:
        return "damaged"
    return "finished" if summary.training.is_finished else "unfinished"


def _condition(text: str, known: set[str]) -> Callable[[Fields], bool]:
    match = _CONDITION.fullmatch(text)
    if match is None:
        return lambda fields: any(text in _words(fields.get(name)) for name in _TEXT_FIELDS)
    name, sign, wanted = _known(match[1], known), match[2], match[3]
    if sign in _ORDERS:
        limit = _number(wanted)
        if limit is None:
            raise ConfigError(f"--filter {text}: {wanted!r} is not a number, which {sign} compares with")
        return lambda fields: _is_number(fields.get(name)) and bool(_ORDERS[sign](fields[name], limit))
    return lambda fields: _equals(fields.get(name), wanted) == (sign == "=")


def _known(name: str, known: set[str]) -> str:
    if name in known:
        return name
    near = get_close_matches(name, known, 1) or [field for field in sorted(known) if field.endswith(f".{name}")]
    hint = f"did you mean {near[0]}?" if near else f"fields of runs: {', '.join(_OWN_FIELDS)}, measurements"
    raise ConfigError(f"{name!r} is no field of a run; {hint} (fields of the configuration have dotted names)")


def _equals(value: Any, wanted: str) -> bool:
    if isinstance(value, tuple):
        return wanted in value
    number = _number(wanted)
    if _is_number(value) and number is not None:
        return bool(value == number)
    try:
        return bool(value == wanted or value == parse_json(wanted))
    except ValueError:
        return False


def _words(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value or "")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sorted(rows: list[Row], field: str, reverse: bool) -> list[Row]:
    known = [row for row in rows if _has(row, field)]
    numbers = all(_is_number(row.fields[field]) for row in known)

    def key(row: Row) -> Any:
        value = row.fields[field]
        return value if numbers else _words(value) if isinstance(value, str | tuple) else json.dumps(value)

    known.sort(key=lambda row: row.summary.name)
    known.sort(key=key, reverse=numbers != reverse)
    return known + [row for row in rows if not _has(row, field)]


def _has(row: Row, field: str) -> bool:
    return row.fields.get(field) not in (None, (), "")
