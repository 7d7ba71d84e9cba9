"""The checks that the API server of Kubeflow Pipelines 2.17 makes of requests, without HTTP.

Wording and status codes follow the Go sources. The server answers most mistakes in a request with 400. It answers
mistakes that it finds while it converts the request or reads the pipeline with "Internal Server Error".
"""

import calendar
import json
import re
import time
from collections.abc import Callable
from typing import Any

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

HTTP = {3: 400, 5: 404, 6: 409, 7: 403, 9: 400, 10: 409, 13: 500, 14: 503, 16: 401}  # HTTP status by gRPC code
MAX_PARAMETERS = 10_000  # maximum size in bytes of JSON
UNFINISHED = -62135596800  # Go's zero time, the end of unfinished tasks


class Refused(Exception):
    """An answer other than 200. code: the gRPC code. external: the message for users, without the call chain."""

    def __init__(self, code: int, message: str, external: str = ""):
        super().__init__(message)
        self.code = code
        self.external = external or message

    def within(self, *context: str) -> "Refused":
        """Return the refusal with the context that callers of the server's functions put before the message."""
        return Refused(self.code, ": ".join([*context, str(self)]), self.external)


def invalid(message: str) -> Refused:
    return Refused(3, f"Invalid input error: {message}", message)


def internal(context: str, cause: Exception) -> Refused:
    """Return a refusal with status 500, behind which the server hides some mistakes of users."""
    return Refused(13, f"InternalServerError: {context}: {cause}", "Internal Server Error")


def not_found(kind: str, name: str) -> Refused:
    return Refused(5, f"ResourceNotFoundError: {kind} {name} not found", f"{kind} {name} not found")


def exists(message: str) -> Refused:
    return Refused(6, f"Already exist error: {message}", message)


def rfc3339(seconds: float) -> str:
    """Write whole seconds as protobuf does; strftime has no year 1."""
    return "0001-01-01T00:00:00Z" if seconds <= UNFINISHED else time.strftime("%Y-%m-%dT%XZ", time.gmtime(seconds))


# --- requests ---


def read_model(value: Any, kind: str, field: str = "") -> Any:
    """Read a request's JSON as grpc-gateway does: refuse unknown fields and wrong types; allow camel case.

    kind: the type's name in `kfp_server_api`. field: name of the field that holds the value.
    """
    wrong = Refused(3, f"proto: (line 1:1): invalid value for {kind} field {field}: {json.dumps(value)}")
    if value is None or kind == "object":
        return value
    if match := re.fullmatch(r"list\[(.*)\]|dict\(str, (.*)\)", kind):
        if not isinstance(value, list if match[1] else dict):
            raise wrong
        if match[1]:
            return [read_model(item, match[1], field) for item in value]
        return {key: read_model(item, match[2], field) for key, item in value.items()}
    if kind in _SCALARS:
        if not _SCALARS[kind](value, field):
            raise wrong
        return value
    model = getattr(kfp_server_api, kind)
    if hasattr(model, "allowable_values"):
        if value not in model.allowable_values and not isinstance(value, int):
            raise wrong
        return value
    if not isinstance(value, dict):
        raise wrong
    return _read_fields(value, model)


_LONGS = {"max_concurrency", "interval_second", "long_value"}  # 64-bit integers are strings in JSON
_SCALARS: dict[str, Callable[[Any, str], bool]] = {
    "str": lambda value, field: (
        bool(re.fullmatch(r"-?\d+", str(value))) if field in _LONGS else isinstance(value, str)
    ),
    "int": lambda value, _: isinstance(value, int) and not isinstance(value, bool),
    "bool": lambda value, _: isinstance(value, bool),
    "datetime": lambda value, _: bool(
        re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", str(value))
    ),
}


def _read_fields(value: dict, model: Any) -> dict:
    read = {}
    for key, item in value.items():
        field = re.sub("[A-Z]", lambda match: "_" + match[0].lower(), key)
        if field not in model.openapi_types:
            raise Refused(3, f'proto: (line 1:2): unknown field "{key}"')
        read[field] = read_model(item, model.openapi_types[field], field)
    for group in ({"pipeline_spec", "pipeline_version_reference"}, {"cron_schedule", "periodic_schedule"}):
        if len(fields := [field for field in read if field in group and read[field] is not None]) > 1:
            raise Refused(3, f'proto: (line 1:2): error parsing "{fields[1]}", oneof is already set')
    return {field: item for field, item in read.items() if item is not None}


# --- pipelines ---


def as_struct(value: Any) -> Any:
    """Return a value as the server returns it: protobuf's Struct has one type of number, so 2.0 becomes 2."""
    if isinstance(value, dict):
        return {key: as_struct(item) for key, item in value.items()}
    if isinstance(value, list):
        return [as_struct(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def platform_of(source: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a pipeline's source that concerns Kubernetes."""
    platform = source.get("platform_spec", {}).get("platforms", {}).get("kubernetes", {})
    return platform.get("deploymentSpec", {})


def read_source(text: str) -> dict[str, Any]:
    """Return a pipeline as the server stores it: alone, or in one object with the platform's document."""
    pipeline = read_pipeline(text)
    documents = [document for document in yaml.safe_load_all(text) if document]
    if len(documents) == 1 and "pipeline_spec" in documents[0]:
        return documents[0]
    platforms = [document for document in documents if "platforms" in document]
    return {"pipeline_spec": pipeline, "platform_spec": platforms[0]} if platforms else pipeline


def read_pipeline(text: str) -> dict[str, Any]:
    """Return the pipeline's document in a file or a request, which may hold a platform's document too."""
    broken = "Failed to create a pipeline and a pipeline version due to template creation error"
    try:
        documents = [document for document in yaml.safe_load_all(text) if document]
    except yaml.YAMLError as error:
        raise invalid(f"unable to decode yaml document: {error}").within(broken) from None
    if len(documents) == 1 and isinstance(documents[0], dict) and "pipeline_spec" in documents[0]:
        documents = list(documents[0].values())
    pipelines = [document for document in documents if isinstance(document, dict) and "pipelineInfo" in document]
    if len(pipelines) != 1:
        raise invalid("multiple pipeline specs provided" if pipelines else "no pipeline spec is provided")
    pipeline = pipelines[0]
    for document in documents:
        kind = "PipelineSpec" if document is pipeline else "PlatformSpec"
        try:
            json_format.ParseDict(document, getattr(pipeline_spec_pb2, kind)())
        except json_format.ParseError as error:
            raise invalid(f"invalid v2 pipeline spec: {error}") from None
    if pipeline.get("schemaVersion") != "2.1.0":
        version = pipeline.get("schemaVersion", "")
        raise invalid(f"KFP only supports schema version 2.1.0, but the pipeline spec has version {version}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,127}", pipeline["pipelineInfo"].get("name", "")):
        raise invalid(
            f"pipeline's name must contain only lowercase alphanumeric characters or '-' and must start with "
            f"alphanumeric characters, received: {pipeline['pipelineInfo'].get('name')}"
        )
    if not pipeline.get("root"):
        raise invalid("invalid v2 pipeline spec: root component is empty")
    return pipeline


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "STRING": (lambda v: isinstance(v, str), "string, but the input parameter is not of string value type"),
    "BOOLEAN": (lambda v: isinstance(v, bool), "bool, but the input parameter is not of bool value type"),
    "LIST": (lambda v: isinstance(v, list), "list, but the input parameter is not of list value type"),
    "STRUCT": (lambda v: isinstance(v, dict), "struct, but the input parameter is not of struct value type"),
}
_NUMBER = (
    lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "double or integer, but the parameter value is not of number value type",
)


def check_parameters(pipeline: dict[str, Any], parameters: dict[str, Any]) -> None:
    """Check that every parameter is known and has its JSON type, and none is missing, in the server's order."""
    defined = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
    for name, parameter in defined.items():
        if name not in parameters:
            if not parameter.get("isOptional") and parameter.get("defaultValue") is None:
                raise invalid(
                    f"parameter {name} is not optional, yet has neither default value nor user provided value"
                )
        else:
            fits, description = _KINDS.get(parameter["parameterType"], _NUMBER)
            if not fits(parameters[name]):
                raise invalid(f"input parameter {name} requires type {description}")
    if extra := [name for name in parameters if name not in defined]:
        raise invalid(f"parameter(s) provided are not required by pipeline: {', '.join(extra)}")


def check_length(parameters: dict[str, Any]) -> None:
    if len(json.dumps(parameters, separators=(",", ":")).encode()) > MAX_PARAMETERS:
        cause = invalid(f"The input parameter length exceed maximum size of {MAX_PARAMETERS}")
        context = "Failed to convert API runtime config to its internal representation"
        raise internal(f"{context} due to parameters conversion error", cause)


# --- cron ---

_MONTHS = {name.lower(): number for number, name in enumerate(calendar.month_abbr) if name}
_DAYS = {"sun": 0, "mon": 1, "tue": 2, "wed": 3, "thu": 4, "fri": 5, "sat": 6}
_CRON: list[tuple[int, int, dict[str, int]]] = [
    (0, 59, {}),
    (0, 59, {}),
    (0, 23, {}),
    (1, 31, {}),
    (1, 12, _MONTHS),
    (0, 6, _DAYS),
]
_DESCRIPTORS = {"@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"}


def check_cron(cron: str) -> None:
    """Check a cron expression as robfig/cron 1.2 does: seconds come first, and the day of the week is optional.

    Five fields therefore mean seconds to month, unlike in crontab.
    """
    try:
        _parse_cron(cron)
    except ValueError as error:
        raise invalid(
            f"Schedule cron is not a supported format(https://godoc.org/github.com/robfig/cron). Error: {error}"
        ) from None


def _parse_cron(cron: str) -> None:
    if not cron:
        raise ValueError("Empty spec string")
    if cron.startswith("@every "):
        if not re.fullmatch(r"[-+]?((\d+\.?\d*|\.\d+)(ns|us|µs|ms|s|m|h))+|0", cron[7:]):
            raise ValueError(f'Failed to parse duration {cron}: time: invalid duration "{cron[7:]}"')
    elif cron.startswith("@"):
        if cron not in _DESCRIPTORS:
            raise ValueError(f"Unrecognized descriptor: {cron}")
    else:
        fields = cron.split()
        if not 5 <= len(fields) <= 6:
            raise ValueError(f"Expected 5 to 6 fields, found {len(fields)}: {cron}")
        for field, (low, high, names) in zip(fields, _CRON, strict=False):
            for expression in filter(None, field.split(",")):
                _parse_range(expression, low, high, names)


def _parse_range(expression: str, low: int, high: int, names: dict[str, int]) -> None:
    span, *steps = expression.split("/")
    ends = span.split("-")
    if ends[0] in ("*", "?"):
        begin, end = low, high
    else:
        numbers = [names.get(text.lower(), -1) if text.lower() in names else _number(text) for text in ends]
        if len(numbers) > 2:
            raise ValueError(f"Too many hyphens: {expression}")
        begin, end = numbers[0], numbers[-1]
        end = high if steps and len(numbers) == 1 else end
    if len(steps) > 1:
        raise ValueError(f"Too many slashes: {expression}")
    if begin < low:
        raise ValueError(f"Beginning of range ({begin}) below minimum ({low}): {expression}")
    if end > high:
        raise ValueError(f"End of range ({end}) above maximum ({high}): {expression}")
    if begin > end:
        raise ValueError(f"Beginning of range ({begin}) beyond end of range ({end}): {expression}")
    if steps and _number(steps[0]) == 0:
        raise ValueError(f"Step of range should be a positive number: {expression}")


def _number(text: str) -> int:
    if not re.fullmatch(r"[-+]?\d+", text):
        raise ValueError(f'Failed to parse int from {text}: strconv.Atoi: parsing "{text}": invalid syntax')
    if int(text) < 0:
        raise ValueError(f"Negative number ({text}) not allowed: {text}")
    return int(text)


# --- lists ---


class Listing:
    """The lists of one kind of resource: fields to sort and filter by, and pages."""

    def __init__(self, plural: str, key: str, *fields: str):
        self.plural, self.key = plural, key
        self.fields = {"name": "display_name", "id": key, key: key, **dict.fromkeys(fields)}
        self.fields = {name: field or name for name, field in self.fields.items()}

    def page(self, items: list[dict], query: dict[str, str]) -> dict[str, Any]:
        """Return the answer with one page, without empty fields, as protobuf's JSON is written here."""
        size = int(query.get("page_size") or 0)
        if size < 0:
            raise invalid(f"The page size should be greater than 0. Got {size}")
        token = _read_token(query.get("page_token", ""))
        sort, predicates = query.get("sort_by", ""), query.get("filter", "")
        if token and ((sort and sort != token["sort"]) or (predicates and predicates != token["filter"])):
            raise invalid(
                "page token does not match the supplied sort by and/or filtering criteria. Either specify the "
                "same criteria or leave the latter empty if page token is specified"
            )
        sort, predicates = (token["sort"], token["filter"]) if token else (sort, predicates)
        field, descending = self._order(sort)
        matching = [item for item in items if self._matches(item, predicates)]
        matching.sort(key=lambda item: _sort_key(item, field, self.key), reverse=descending)
        remaining = [
            item
            for item in matching
            if not token
            or (
                _sort_key(item, field, self.key) <= token["at"]
                if descending
                else _sort_key(item, field, self.key) >= token["at"]
            )
        ]
        size = min(size or 20, 200)
        next_page = (
            {"sort": sort, "filter": predicates, "at": _sort_key(remaining[size], field, self.key)}
            if remaining[size:]
            else None
        )
        answer = {
            self.plural: remaining[:size],
            "total_size": len(matching),
            "next_page_token": _write_token(next_page),
        }
        return {name: value for name, value in answer.items() if value}

    def _order(self, sort: str) -> tuple[str, bool]:
        words = sort.lower().split()
        if len(words) > 2 or (len(words) == 2 and words[1] not in ("asc", "desc")):
            raise invalid(
                f'Received invalid sort by format "{sort}". Supported format: "field_name", "field_name desc", or '
                '"field_name asc"'
            )
        field = words[0] if words else "created_at"
        if field not in self.fields:
            raise invalid(f'Invalid sorting field: "{field}" on listable type')
        return self.fields[field], words[1:] == ["desc"]

    def _matches(self, item: dict, predicates: str) -> bool:
        if not predicates:
            return True
        try:
            read = read_model(json.loads(predicates), "V2beta1Filter")
        except (ValueError, Refused) as error:
            raise invalid(f"failed to parse valid filter from {json.dumps(predicates)}: {error}") from None
        return all(self._holds(item, predicate) for predicate in read.get("predicates", []))

    def _holds(self, item: dict, predicate: dict) -> bool:
        operations = kfp_server_api.V2beta1PredicateOperation.allowable_values
        operation = predicate.get("operation", "OPERATION_UNSPECIFIED")
        operation = _OPERATIONS.get(operation, operation)
        if predicate.get("key") not in self.fields:
            raise invalid(f'no support for filtering on unrecognized field "{predicate.get("key")}"')
        values = [value for name, value in predicate.items() if name.endswith(("_value", "_values"))]
        if operation not in operations[1:] or len(values) != 1:
            raise invalid(f"invalid predicate: {json.dumps(predicate)}")
        actual, value = item.get(self.fields[predicate["key"]], ""), values[0]
        compare: dict[str, Callable[[], bool]] = {
            "EQUALS": lambda: actual == value,
            "NOT_EQUALS": lambda: actual != value,
            "GREATER_THAN": lambda: actual > value,
            "GREATER_THAN_EQUALS": lambda: actual >= value,
            "LESS_THAN": lambda: actual < value,
            "LESS_THAN_EQUALS": lambda: actual <= value,
            "IN": lambda: actual in value["values"],
            "IS_SUBSTRING": lambda: value.lower() in actual.lower(),
        }
        return compare[operation]()


_OPERATIONS = {
    1: "EQUALS",
    2: "NOT_EQUALS",
    3: "GREATER_THAN",
    5: "GREATER_THAN_EQUALS",
    6: "LESS_THAN",
    7: "LESS_THAN_EQUALS",
    8: "IN",
    9: "IS_SUBSTRING",
}


def _sort_key(item: dict, field: str, key: str) -> list[str]:
    return [str(item.get(field, "")), item[key]]


def _write_token(token: dict | None) -> str:
    return json.dumps(token).encode().hex() if token else ""


def _read_token(text: str) -> Any:
    try:
        return json.loads(bytes.fromhex(text)) if text else None
    except ValueError:
        raise invalid("Invalid package token").within("Failed to create list options") from None
