"""The strict JSON of this package: parsing, canonical text, hashes, and checks against dataclasses."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mappo.errors import ConfigError, hint_for, one_line

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_SHOWN_CHARACTERS = 200  # of a value in a message


_Checked = TypeVar("_Checked")


def checked(kind: type[_Checked], values: Mapping[str, Any]) -> _Checked:
    """Return a pydantic dataclass of this kind, read from a JSON object; fields left out keep their defaults.

    Raises:
        ConfigError: a key is unknown, a value has the wrong type or is out of range, or values contradict each
            other. The message names every problem with field, value and bound.
    """
    try:
        return TypeAdapter(kind).validate_json(canonical_json(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, problem) for problem in error.errors())) from None
    except RecursionError:
        raise ConfigError("the configuration is nested too deeply") from None


def parse_report(adapter: TypeAdapter[_Checked], location: str, content: bytes, expected: str) -> _Checked:
    """Read a report that a stage wrote as JSON. Errors name `location` and `expected`, such as "an evaluation".

    Raises:
        ConfigError: the content is not such a report; the message names the first field that is wrong.
    """
    try:
        return adapter.validate_json(content)
    except ValidationError as error:
        raise ConfigError(f"{location}: not {expected}: {first_problem(error)}") from None


def first_problem(error: ValidationError) -> str:
    """Return the first field that is wrong and what is wrong with it, in one line."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    return one_line(f"{field}: {problem['msg']}")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as a JSON object: dictionaries, lists, strings, numbers and booleans only."""
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    assert isinstance(values, dict)
    return values


def json_hash(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a JSON object's canonical text, in hexadecimal."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def parse_json(text: str) -> Any:
    """Parse a JSON value strictly.

    Raises:
        ConfigError: an object has a key twice, or a number is not finite.
        ValueError: the text is not JSON, is nested too deeply, or has a number with too many digits.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_number, parse_float=_finite_number
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_json_object(text: str, source: str = "the configuration") -> dict[str, Any]:
    """Parse a JSON object, as strictly as `parse_json`. Errors name its `source`, such as a file or a flag.

    Raises:
        ConfigError: the text is not such an object; the message says where the text stops being JSON.
    """
    try:
        values = parse_json(text)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{source} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must be a JSON object, not {type(values).__name__}")
    return values


def canonical_json(values: Any) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise ConfigError(f"{', '.join(repeated)}: given more than once")
    return values


def _finite_number(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse_number(text)


def _refuse_number(text: str) -> float:
    raise ConfigError(f"{text}: numbers must be finite")


def _explain(kind: Any, problem: Any) -> str:
    path, value = [str(part) for part in problem["loc"]], problem["input"]
    if problem["type"] == "json_invalid":
        return f"the configuration is not JSON: {problem['msg']}"
    field = _shortened(".".join(path))
    if problem["type"] == "unexpected_keyword_argument":
        known = _known_keys(kind, path[:-1])
        hint = hint_for(path[-1], known, f"known keys: {', '.join(known)}")
        return f"{field} = {_shortened(json.dumps(value))}: unknown key; {hint}"
    reason = problem.get("ctx", {}).get("error", problem["msg"][0].lower() + problem["msg"][1:])
    if isinstance(reason, ConfigError):
        return str(reason)
    value_text = json.dumps(value) if not dataclasses.is_dataclass(value) else str(value)
    return f"{field} = {_shortened(value_text)}: {reason}"


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def _known_keys(kind: Any, path: list[str]) -> list[str]:
    for part in path:
        kind = _without_annotation(kind)
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        else:
            kind = next(field.type for field in dataclasses.fields(kind) if field.name == part)
    return [field.name for field in dataclasses.fields(_without_annotation(kind))]


def _without_annotation(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind
