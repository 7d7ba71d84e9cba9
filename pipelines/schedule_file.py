"""Read a file of schedules. An entry holds the flags of `schedule create`, by the same names.

    owner: team-a
    defaults:
      site: site.yaml
    schedules:
      nightly:
        cron: "30 2 * * *"
        seeds: 0,1,2
        parameter: {store: s3://bucket/runs, run: "nightly-[[ScheduledTime]]"}

Values are the texts that a command line would hold, so YAML's own types play no part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from mappo.config import require_run_name
from mappo.errors import ConfigError, hint_for
from mappo.strict_yaml import read_nodes

_KEYS = ("owner", "defaults", "schedules")


@dataclass(frozen=True)
class Option:
    """A key of an entry: its text, or the texts of a mapping, and its line in the file."""

    line: int
    value: str | dict[str, str]


@dataclass(frozen=True)
class ScheduleEntry:
    """A schedule of the file. Its options include the file's defaults."""

    name: str
    line: int
    options: Mapping[str, Option]


@dataclass(frozen=True)
class ScheduleFile:
    """The schedules of one owner, in the order of the file."""

    owner: str
    entries: list[ScheduleEntry]


def read_schedule_file(path: Path, known: frozenset[str]) -> ScheduleFile:
    """Read a file of schedules; `known` are the names of the options that an entry may hold.

    Raises:
        ConfigError: the file is not YAML, or a key is unknown, missing or given twice; the message names the line.
        OSError: the file cannot be read.
    """
    return read_nodes(path, lambda node: _file(node, known))


def _file(root: yaml.MappingNode, known: frozenset[str]) -> ScheduleFile:
    sections = {key: (line, node) for key, line, node in _items(root, "the file", frozenset(_KEYS))}
    if missing := [key for key in ("owner", "schedules") if key not in sections]:
        raise ConfigError(f"{missing[0]}: missing; the keys of the file are {', '.join(_KEYS)}")
    line, node = sections["owner"]
    try:
        owner = require_run_name(_text(node), "owner")
    except ConfigError as error:
        raise ConfigError(f"line {line}: {error}") from None
    defaults = _options(sections["defaults"][1], "defaults", known) if "defaults" in sections else {}
    entries = []
    for name, line, node in _items(sections["schedules"][1], "schedules", None):
        entries.append(ScheduleEntry(name, line, _merged(defaults, _options(node, f"schedule {name}", known))))
    return ScheduleFile(owner, entries)


def _options(node: yaml.Node, owner: str, known: frozenset[str]) -> dict[str, Option]:
    return {key: Option(line, _value(value)) for key, line, value in _items(node, owner, known)}


def _merged(defaults: Mapping[str, Option], options: Mapping[str, Option]) -> dict[str, Option]:
    """Return the defaults with the options in their places; mappings of one key are merged."""
    merged = {**defaults, **options}
    for key, default in defaults.items():
        option = merged[key]
        if isinstance(default.value, dict) and isinstance(option.value, dict):
            merged[key] = Option(option.line, {**default.value, **option.value})
    return merged


def _items(node: yaml.Node, owner: str, known: frozenset[str] | None) -> Iterator[tuple[str, int, yaml.Node]]:
    """Yield key, line and value of a mapping; `known` holds the keys that it may have, or is None for any key."""
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"line {node.start_mark.line + 1}: {owner}: must hold keys and values")
    keys = set()
    for key_node, value in node.value:
        key, line = _text(key_node), key_node.start_mark.line + 1
        if known is not None:
            key = key.replace("_", "-")
            _require_known(key, known, f"line {line}: {owner}")
        if key in keys:
            raise ConfigError(f"line {line}: {owner}: {key}: given more than once")
        keys.add(key)
        yield key, line, value


def _require_known(key: str, known: frozenset[str], place: str) -> None:
    if key not in known:
        keys = ", ".join(_KEYS) if known == set(_KEYS) else "the flags of `schedule create`"
        hint = hint_for(key, known, f"the keys are {keys}")
        raise ConfigError(f"{place}: {key}: unknown key; {hint}")


def _value(node: yaml.Node) -> str | dict[str, str]:
    """Return a value as the text of a flag: a list becomes its items with commas between them."""
    if isinstance(node, yaml.MappingNode):
        return {key: _text(value) for key, _, value in _items(node, "this mapping", None)}
    if isinstance(node, yaml.SequenceNode):
        return ",".join(_text(item) for item in node.value)
    return _text(node)


def _text(node: yaml.Node) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"line {node.start_mark.line + 1}: must be a text or a number")
    return str(node.value)
