"""Strict JSON: text in and out, hashes of it, and dataclasses that it is checked against."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mappo.errors import ConfigError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


_Checked = TypeVar("_Checked")


def checked(kind: type[_Checked], values: Mapping[str, Any]) -> _Checked:
    """A dataclass of pydantic's, from a JSON object: fields that it leaves out keep their defaults.

    Raises:
        ConfigError: as `from_json`.
    """
    try:
        return TypeAdapter(kind).validate_json(canonical_json(values))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, problem) for problem in error.errors())) from None
    except RecursionError:
        raise ConfigError("the configuration is nested too deeply") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as a JSON object: dictionaries, lists, strings, numbers and booleans only."""
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    assert isinstance(values, dict)
    return values


def json_hash(values: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object's canonical text, in hexadecimal."""
    return hashlib.sha256(canonical_json(values).encode()).hexdigest()


def parse_json(text: str) -> Any:
    """Read a JSON value strictly.

    Raises:
        ConfigError: a key twice in one object, or a number that is not finite.
        ValueError: not JSON, or nested or long beyond reason.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_number, parse_float=_finite_number
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_json_object(text: str) -> dict[str, Any]:
    """Read a JSON object, as strictly as `parse_json`.

    Raises:
        ConfigError: saying where the text stops being such an object.
    """
    try:
        values = parse_json(text)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"the configuration is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"the configuration must be a JSON object, not {type(values).__name__}")
    return values


def canonical_json(values: Any) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ConfigError(f"{', '.join(twice)}: given more than once")
    return values


def _finite_number(text: str) -> float:
    return float(text) if math.isfinite(float(text)) else _refuse_number(text)


def _refuse_number(text: str) -> float:
    raise ConfigError(f"{text}: numbers must be finite")


def _explain(kind: Any, problem: Any) -> str:
    path, value = [str(part) for part in problem["loc"]], problem["input"]
    if problem["type"] == "json_invalid":
        return f"the configuration is not JSON: {problem['msg']}"
    field = ".".join(path)
    if problem["type"] == "unexpected_keyword_argument":
        known = _known_keys(kind, path[:-1])
        close = get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(known)}"
        return f"{field} = {json.dumps(value)}: unknown key; {hint}"
    reason = problem.get("ctx", {}).get("error", problem["msg"][0].lower() + problem["msg"][1:])
    if isinstance(reason, ConfigError):
        return str(reason)
    shown = json.dumps(value) if not dataclasses.is_dataclass(value) else str(value)
    return f"{field} = {shown}: {reason}"


def _known_keys(owner: Any, path: list[str]) -> list[str]:
    for part in path:
        owner = next(field.type for field in dataclasses.fields(owner) if field.name == part)
    return [field.name for field in dataclasses.fields(owner)]
