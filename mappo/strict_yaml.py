"""Read YAML files strictly: within limits, with every key given once, and with errors that name file and line."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mappo.errors import ConfigError

_LARGEST_DEPTH, _LARGEST_NODES = 50, 10_000  # limits of a file, counted with aliases written out
_LARGEST_CHARACTERS = 100_000  # of a file
_SHOWN_LINES, _LONGEST_LINE, _LONGEST_VALUE = 20, 300, 60  # of the messages about a file
_EXPONENT = re.compile(r"[-+]?([0-9]+|[0-9]*\.[0-9]+|[0-9]+\.)[eE][-+]?[0-9]+")  # as in YAML 1.2
_Value = TypeVar("_Value")


def read_values(path: Path, check: Callable[[dict[str, Any]], _Value]) -> _Value:
    """Read a file's keys and values, and return what `check` makes of them.

    Raises:
        ConfigError: the file is not YAML, a key appears twice, a limit is exceeded, or `check` raised this error;
            the message names the file.
        OSError: the file cannot be read.
    """

    def values(loader: "_Loader", node: yaml.MappingNode) -> _Value:
        try:
            return check(loader.construct_document(node))
        except TypeError as error:  # a value that JSON lacks, such as a date
            raise ConfigError(f"write it in quotes: {error}") from None

    return _read(path, values)


def read_nodes(path: Path, check: Callable[[yaml.MappingNode], _Value]) -> _Value:
    """Read a file as nodes, which hold the text and the line of every value; return what `check` makes of them.

    Raises:
        ConfigError: as `read_values`, but `check` itself must refuse keys that appear twice.
        OSError: the file cannot be read.
    """
    return _read(path, lambda _, node: check(node))


class Lines:
    """The lines of a file's keys, by the keys that lead to them: `("tasks", "balance", "changes")`."""

    def __init__(self, root: yaml.MappingNode):
        self._lines = dict(_lines_of(root, ()))

    def has(self, *keys: str) -> bool:
        """Return whether the file writes this key out."""
        return keys in self._lines

    def __call__(self, *keys: str) -> int:
        """Return the line of a key; of one that the file does not write out, that of the nearest key above it."""
        while keys and keys not in self._lines:
            keys = keys[:-1]
        return self._lines.get(keys, 1)


def read_with_lines(path: Path, check: Callable[[dict[str, Any], Lines], _Value]) -> _Value:
    """Read a file whose values are those of JSON, and return what `check` makes of them and of their lines.

    A number may have an exponent without a point, as in 1e-3, which YAML 1.1 takes for a text.

    Raises:
        ConfigError: as `read_values`; or a value is a date or a number that is not finite.
        OSError: the file cannot be read.
    """

    def values(loader: "_Loader", node: yaml.MappingNode) -> _Value:
        lines, content = Lines(node), loader.construct_document(node)
        _require_json(content, (), lines)
        return check(content, lines)

    return _read(path, values, _NumberLoader)


def _read(
    path: Path, use: Callable[["_Loader", yaml.MappingNode], _Value], kind: type["_Loader"] | None = None
) -> _Value:
    try:
        with path.open(encoding="utf-8") as file:
            return _load(file.read(_LARGEST_CHARACTERS + 1), use, kind or _Loader)
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {_problem_of(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested more than {_LARGEST_DEPTH} deep") from None
    except ConfigError as error:
        lines = [f"{path}: {_shortened(line, _LONGEST_LINE)}" for line in str(error).splitlines()]
        more = [f"{path}: and {len(lines) - _SHOWN_LINES} more"] if len(lines) > _SHOWN_LINES else []
        raise ConfigError("\n".join([*lines[:_SHOWN_LINES], *more])) from None


def _load(text: str, use: Callable[["_Loader", yaml.MappingNode], _Value], kind: type["_Loader"]) -> _Value:
    """Return what `use` makes of the YAML in a text; measure the YAML before any alias is written out."""
    if len(text) > _LARGEST_CHARACTERS:
        raise ConfigError(f"has more than {_LARGEST_CHARACTERS} characters")
    loader = kind(text)
    try:
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError("must hold keys and values")
        _measure(node, {})
        return use(loader, node)
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses a key that appears twice or is no text, and numbers that cannot be written."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if isinstance(value, int):
                str(value)  # raises ValueError if the number has thousands of digits
            return value
        except (ConfigError, yaml.YAMLError):
            raise
        except (ValueError, LookupError, AttributeError, ArithmeticError):  # all of them raised by PyYAML
            location = f"line {node.start_mark.line + 1}: {_shortened(str(node.value))!r}"
            reason = "reads like a number or a date and is none; write it in quotes"
            raise ConfigError(f"{location}: {reason}") from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key, line = self.construct_object(key_node, deep=True), f"line {key_node.start_mark.line + 1}"
            if not isinstance(key, str) or not key.isprintable():
                raise ConfigError(f"{line}: a key must be text without control characters; write it in quotes")
            if key in keys:
                raise ConfigError(f"{line}: {_shortened(key)}: given more than once")
            keys.add(key)
        return super().construct_mapping(node, deep)


class _NumberLoader(_Loader):
    """A strict loader that also reads numbers such as 1e-3 as numbers."""


_NumberLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _lines_of(node: yaml.Node, keys: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the keys of a node with their lines; `_measure` has limited the depth and the number of values."""
    for key_node, value in node.value if isinstance(node, yaml.MappingNode) else ():
        path = (*keys, str(key_node.value))
        yield path, key_node.start_mark.line + 1
        yield from _lines_of(value, path)


def _require_json(value: Any, keys: tuple[str, ...], lines: Lines) -> None:
    """Check that a value is one of JSON: PyYAML makes dates, sets and bytes of some texts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _require_json(inner, (*keys, key), lines)
    elif isinstance(value, list):
        for inner in value:
            _require_json(inner, keys, lines)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"line {lines(*keys)}: {'.'.join(keys)}: {value}: numbers must be finite")
    elif not isinstance(value, str | int | float | None):
        kind = type(value).__name__
        raise ConfigError(f"line {lines(*keys)}: {'.'.join(keys)}: read as a {kind}; write it in quotes")


def _measure(node: yaml.Node, sizes: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values in a node and their depth, with aliases written out, if neither is too large."""
    if node not in sizes:
        sizes[node] = 0, _LARGEST_DEPTH  # too deep, for an alias that holds itself
        pairs = node.value if isinstance(node, yaml.MappingNode) else [node.value]
        children = [child for pair in pairs for child in pair if isinstance(child, yaml.Node)]
        measured = [_measure(child, sizes) for child in children]
        sizes[node] = 1 + sum(count for count, _ in measured), 1 + max((depth for _, depth in measured), default=0)
    count, depth = sizes[node]
    if depth > _LARGEST_DEPTH:
        raise ConfigError(f"nested more than {_LARGEST_DEPTH} deep, or an alias holds itself")
    if count > _LARGEST_NODES:
        raise ConfigError(f"more than {_LARGEST_NODES} values, with aliases written out")
    return count, depth


def _problem_of(error: yaml.YAMLError) -> str:
    """Return line and reason of an error; the error's own text also quotes the line, which may hold a password."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    line = f"line {mark.line + 1}: " if mark else ""
    return f"{line}{problem or 'it holds a character that YAML does not allow'}"


def _shortened(text: str, length: int = _LONGEST_VALUE) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
