"""What the API server of Kubeflow Pipelines 2.17 checks, and how Argo runs a pipeline there; no HTTP.

Wording and status codes follow the Go sources. Most mistakes in a request are answered with 400, but those found
while the server converts the request or reads the pipeline are "Internal Server Error" there, and so here.
"""

import calendar
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import kfp_server_api
import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

HTTP = {3: 400, 5: 404, 6: 409, 7: 403, 9: 400, 10: 409, 13: 500, 14: 503, 16: 401}  # of the codes of gRPC
MAX_PARAMETERS = 10_000  # bytes of JSON
UNFINISHED = -62135596800  # Go's zero time, which unfinished tasks have as their end


class Refused(Exception):
    """An answer other than 200: a gRPC code, the chain of messages, and what a user is told."""

    def __init__(self, code: int, message: str, external: str = ""):
        super().__init__(message)
        self.code = code
        self.external = external or message

    def within(self, *context: str) -> "Refused":
        """The same, as the callers further up report it."""
        return Refused(self.code, ": ".join([*context, str(self)]), self.external)


def invalid(message: str) -> Refused:
    return Refused(3, f"Invalid input error: {message}", message)


def internal(context: str, cause: Exception) -> Refused:
    """Hides a mistake of the user's behind a 500, as the server does for some of them."""
    return Refused(13, f"InternalServerError: {context}: {cause}", "Internal Server Error")


def not_found(kind: str, name: str) -> Refused:
    return Refused(5, f"ResourceNotFoundError: {kind} {name} not found", f"{kind} {name} not found")


def exists(message: str) -> Refused:
    return Refused(6, f"Already exist error: {message}", message)


def rfc3339(seconds: float) -> str:
    """As protobuf writes whole seconds; strftime has no year 1."""
    return "0001-01-01T00:00:00Z" if seconds <= UNFINISHED else time.strftime("%Y-%m-%dT%XZ", time.gmtime(seconds))


# --- requests ---


def read_model(value: Any, kind: str, where: str = "") -> Any:
    """A request's JSON as grpc-gateway reads it: no unknown fields, no wrong types; camel case is allowed."""
    wrong = Refused(3, f"proto: (line 1:1): invalid value for {kind} field {where}: {json.dumps(value)}")
    if value is None or kind == "object":
        return value
    if match := re.fullmatch(r"list\[(.*)\]|dict\(str, (.*)\)", kind):
        if not isinstance(value, list if match[1] else dict):
            raise wrong
        if match[1]:
            return [read_model(item, match[1], where) for item in value]
        return {key: read_model(item, match[2], where) for key, item in value.items()}
    if kind in _SCALARS:
        if not _SCALARS[kind](value, where):
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


_LONGS = {"max_concurrency", "interval_second", "long_value"}  # 64-bit integers, which JSON has as strings
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
        if len(given := [field for field in read if field in group and read[field] is not None]) > 1:
            raise Refused(3, f'proto: (line 1:2): error parsing "{given[1]}", oneof is already set')
    return {field: item for field, item in read.items() if item is not None}


# --- pipelines ---


def as_struct(value: Any) -> Any:
    """As a value comes back from the server, which knows one kind of number: 2.0 as 2."""
    if isinstance(value, dict):
        return {key: as_struct(each) for key, each in value.items()}
    if isinstance(value, list):
        return [as_struct(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def platform_of(source: dict[str, Any]) -> dict[str, Any]:
    """What concerns Kubernetes in a source of pipelines that was read."""
    platform = source.get("platform_spec", {}).get("platforms", {}).get("kubernetes", {})
    return platform.get("deploymentSpec", {})


def read_source(text: str) -> dict[str, Any]:
    """A pipeline as the server keeps it: alone, or wrapped together with what concerns the platform."""
    pipeline = read_pipeline(text)
    documents = [document for document in yaml.safe_load_all(text) if document]
    if len(documents) == 1 and "pipeline_spec" in documents[0]:
        return documents[0]
    platforms = [document for document in documents if "platforms" in document]
    return {"pipeline_spec": pipeline, "platform_spec": platforms[0]} if platforms else pipeline


def read_pipeline(text: str) -> dict[str, Any]:
    """The pipeline's document of a file or a request; a platform's document may stand beside it."""
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


def check_parameters(pipeline: dict[str, Any], given: dict[str, Any]) -> None:
    """Every parameter known, of its JSON kind, and none missing; in the server's order, which is by group."""
    defined = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
    for name, parameter in defined.items():
        if name not in given:
            if not parameter.get("isOptional") and parameter.get("defaultValue") is None:
                raise invalid(
                    f"parameter {name} is not optional, yet has neither default value nor user provided value"
                )
        else:
            fits, wanted = _KINDS.get(parameter["parameterType"], _NUMBER)
            if not fits(given[name]):
                raise invalid(f"input parameter {name} requires type {wanted}")
    if extra := [name for name in given if name not in defined]:
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
    """robfig/cron 1.2: seconds first, the day of the week may be left out, so five fields are something else."""
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
    """One kind of resource's lists: what can be sorted by and asked for, and pages of it."""

    def __init__(self, plural: str, key: str, *fields: str):
        self.plural, self.key = plural, key
        self.fields = {"name": "display_name", "id": key, key: key, **dict.fromkeys(fields)}
        self.fields = {name: field or name for name, field in self.fields.items()}

    def page(self, items: list[dict], query: dict[str, str]) -> dict[str, Any]:
        """A response: empty fields are left out, as protobuf's JSON does here."""
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
        found = [item for item in items if self._matches(item, predicates)]
        found.sort(key=lambda item: _place(item, field, self.key), reverse=descending)
        left = [
            item
            for item in found
            if not token
            or (
                _place(item, field, self.key) <= token["at"]
                if descending
                else _place(item, field, self.key) >= token["at"]
            )
        ]
        size = min(size or 20, 200)
        following = (
            {"sort": sort, "filter": predicates, "at": _place(left[size], field, self.key)}
            if left[size:]
            else None
        )
        answer = {self.plural: left[:size], "total_size": len(found), "next_page_token": _write_token(following)}
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


def _place(item: dict, field: str, key: str) -> list[str]:
    return [str(item.get(field, "")), item[key]]


def _write_token(token: dict | None) -> str:
    return json.dumps(token).encode().hex() if token else ""


def _read_token(text: str) -> Any:
    try:
        return json.loads(bytes.fromhex(text)) if text else None
    except ValueError:
        raise invalid("Invalid package token").within("Failed to create list options") from None


# --- Argo ---


class Workflow:
    """The nodes that Argo makes of a pipeline, step by step, and the task details made of them."""

    def __init__(self, name: str, run_id: str, source: dict[str, Any], parameters: dict[str, Any]):
        pipeline = source.get("pipeline_spec", source)
        self.name, self.run_id, self.pipeline, self.platform = name, run_id, pipeline, platform_of(source)
        self.created = int(time.time())
        self.nodes: dict[str, dict[str, Any]] = {}  # by path
        defined = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
        values = {key: parameter.get("defaultValue") for key, parameter in defined.items()} | parameters
        self.root = _Task(self, "root", f"{name}.root", {}, pipeline["root"], values)

    def node(self, path: str, display: str, template: str, phase: str, parents: list[str] = []) -> str:  # noqa: B006
        """A new node below others, or the old one again after a retry of the run; its path."""
        digest = _fnv32a(path)
        self.nodes[path] = {
            "id": self.name if path == self.name else f"{self.name}-{digest}",
            "pod": self.name if path == self.name else f"{self.name}-{template}-{digest}",
            "display": display,
            "started": int(time.time()),
            "finished": UNFINISHED,
            "children": [],
            "history": self.nodes.get(path, {}).get("history", []),
        }
        self.phase(path, phase)
        for parent in parents:
            if self.nodes[path]["id"] not in self.nodes[parent]["children"]:
                self.nodes[parent]["children"].append(self.nodes[path]["id"])
        return path

    def phase(self, path: str, phase: str) -> None:
        """Change a node's state; "" is Argo's Omitted, for which the server has no state."""
        node = self.nodes[path]
        node["state"] = phase
        node["finished"] = UNFINISHED if phase in ("PENDING", "RUNNING") else int(time.time())
        if [status["state"] for status in node["history"][-1:]] != [phase]:
            node["history"] = [*node["history"], {"update_time": rfc3339(time.time()), "state": phase}]

    def advance(self) -> str:
        """Finish the stage that runs longest, or start all that can; the state of the whole."""
        if not self.nodes:
            self.node(self.name, self.name, "entrypoint", "RUNNING")
        if running := next(self._stages("running"), None):
            running.succeed()
        else:
            self.root.start([self.name])
        return self.settle()

    def settle(self) -> str:
        self.root.settle()
        if self.root.state in ("failed", "done"):
            self.phase(self.name, {"failed": "FAILED", "done": "SUCCEEDED"}[self.root.state])
        return str(self.nodes[self.name]["state"])

    def stage(self, key: str) -> "_Task":
        """The running stage of this name, the first of them in a loop; others before it are finished."""
        while True:
            for task in self._stages("running"):
                if task.key == key:
                    return task
            if self.root.state in ("done", "failed"):
                raise ValueError(f"no stage {key} left to run in {self.name}")
            self.advance()

    def stop(self) -> None:
        """As Argo does at activeDeadlineSeconds 0: what runs has failed."""
        if not self.nodes:
            self.node(self.name, self.name, "entrypoint", "RUNNING")
        for path, node in self.nodes.items():
            if node["state"] in ("PENDING", "RUNNING"):
                self.phase(path, "FAILED")
        self.root.stop()

    def retry(self) -> None:
        """As the server prepares it: DAGs go on, failed pods and what depended on them are forgotten."""
        for path in [path for path, node in self.nodes.items() if node["state"] == "FAILED"]:
            if path in self.root.dags() or path == self.name:
                self.phase(path, "RUNNING")
        self.root.reset()

    def details(self) -> list[dict[str, Any]]:
        """In the order of ids, which is none; no outputs, no errors and no pod_name, as the server has it."""
        tasks = []
        for node in sorted(self.nodes.values(), key=lambda node: node["id"]):
            task = {
                "run_id": self.run_id,
                "task_id": str(uuid.uuid5(uuid.NAMESPACE_OID, self.run_id + node["id"])),
                "display_name": node["display"],
                "create_time": rfc3339(self.created),
                "start_time": rfc3339(node["started"]),
                "end_time": rfc3339(node["finished"]),
                "state": node["state"],
                "state_history": [
                    {key: value for key, value in status.items() if value} for status in node["history"]
                ],
                "child_tasks": [{"pod_name": child} for child in node["children"]],
            }
            tasks.append({key: value for key, value in task.items() if value})
        return tasks

    def _stages(self, state: str) -> Iterator["_Task"]:
        return (task for task in self.root.stages() if task.state == state)


class _Task:
    """A task of a pipeline: a container with its driver, or a DAG of tasks, or a loop over one."""

    def __init__(self, flow: Workflow, key: str, path: str, task: dict, component: dict, values: dict[str, Any]):
        self.flow, self.key, self.path, self.spec, self.component = flow, key, path, task, component
        self.values, self.state = values, "waiting"  # then running, done, failed, omitted
        self.attempt = 0
        self.parts: list[_Task] = []
        self.retries = int(task.get("retryPolicy", {}).get("maxRetryCount", 0))
        if "parameterIterator" in task:
            self.parts = self._iterations()
        elif "dag" in component:
            for name, part in sorted(component["dag"]["tasks"].items()):
                self.parts.append(
                    _Task(flow, name, f"{path}.{name}", part, self._component(part), self._inputs(part))
                )

    @property
    def pod(self) -> str:
        """The name of the executor's pod, the latest of several attempts."""
        return str(self.flow.nodes[self._executor()]["pod"])

    def start(self, parents: list[str]) -> None:
        """This task's nodes, and those of all tasks below that can start now."""
        if self.state == "waiting":
            self.state = "running"
            self._open(parents)
        for part in self.parts:
            if part.state == "waiting" and all(other.state == "done" for other in self._before(part)):
                before = [leaf for other in self._before(part) for leaf in other.leaves()]
                part.start(before or [self._inside()])
            elif part.parts and part.state == "running":
                part.start([])

    def succeed(self) -> None:
        self._close("SUCCEEDED")
        self.state = "done"

    def fail(self) -> None:
        self._close("FAILED")
        self.state = "failed"

    def again(self) -> None:
        """One attempt has failed, the next one runs."""
        self._fail_attempt()
        self.attempt += 1
        self._pod([self.path + ".executor"])

    def settle(self) -> None:
        """Finish what is finished below, and omit what waits for something that failed."""
        for part in self.parts:
            part.settle()
        for part in self.parts:
            if part.state == "waiting" and any(
                other.state in ("failed", "omitted") for other in self._before(part)
            ):
                part.state = "omitted"
                parents = [leaf for other in self._before(part) for leaf in other.leaves()]
                driver = self.flow.node(f"{part.path}-driver", f"{part.key}-driver", "", "", parents)
                self.flow.node(part.path, part.key, "", "", [driver])
        states = {part.state for part in self.parts}
        if self.state == "running" and self.parts and not states & {"waiting", "running"}:
            self.fail() if states & {"failed", "omitted"} else self.succeed()

    def stop(self) -> None:
        self.state = "failed" if self.state == "running" else self.state
        for part in self.parts:
            part.stop()

    def reset(self) -> None:
        """For a retry: whatever did not succeed waits again, and DAGs go on."""
        for part in self.parts:
            part.reset()
        if self.state in ("failed", "omitted"):
            begun = self.path in self.flow.nodes and self.flow.nodes[self.path]["state"] == "RUNNING"
            self.state = "running" if self.parts and begun else "waiting"
            self.attempt = 0

    def stages(self) -> Iterator["_Task"]:
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.stages()

    def dags(self) -> set[str]:
        """The paths of all DAG nodes."""
        own = {self.path, self._inside(), *([self.path + ".iteration-iterations"] if self._loops else [])}
        return own.union(*(part.dags() for part in self.parts)) if self.parts else {self.path}

    def leaves(self) -> list[str]:
        """The nodes that what depends on this task hangs from."""
        if self.state == "omitted":
            return [self.path]
        if not self.parts:
            return [self._executor()]
        needed = {name for part in self.parts for name in part.spec.get("dependentTasks", [])}
        return [leaf for part in self.parts if part.key not in needed for leaf in part.leaves()]

    @property
    def _loops(self) -> bool:
        return "parameterIterator" in self.spec

    def _before(self, part: "_Task") -> list["_Task"]:
        return [other for other in self.parts if other.key in part.spec.get("dependentTasks", [])]

    def _inside(self) -> str:
        return self.path + ".iteration-iterations" if self._loops else self.path

    def _executor(self) -> str:
        return f"{self.path}.executor({self.attempt})" if self.retries else f"{self.path}.executor"

    def _open(self, parents: list[str]) -> None:
        flow, template = self.flow, self.spec.get("componentRef", {}).get("name", "root")
        if self._loops:
            flow.node(self.path, self.key, f"{template}-{self.key}-iterator", "RUNNING", parents)
            driver = flow.node(
                f"{self.path}.iteration-driver", "iteration-driver", "system-dag-driver", "SUCCEEDED", [self.path]
            )
            flow.node(self._inside(), "iteration-iterations", f"{template}-iteration", "RUNNING", [driver])
            return
        if (outer := self.spec.get("_iteration")) is not None:
            flow.node(outer, outer.rpartition(".")[2], f"{template}-iteration", "RUNNING", parents)
            parents = [outer]
        kind = "system-dag-driver" if self.parts else "system-container-driver"
        driver_path = f"{self.path}-driver"
        driver = flow.node(driver_path, driver_path.rpartition(".")[2], kind, "SUCCEEDED", parents)
        retry = "retry-" if self.retries else ""
        node = flow.node(
            self.path,
            self.path.rpartition(".")[2],
            template if self.parts else f"{retry}system-container-executor",
            "RUNNING",
            [driver],
        )
        if not self.parts:
            if self.retries:
                node = flow.node(
                    f"{self.path}.executor", "executor", "retry-system-container-impl", "RUNNING", [node]
                )
            self._pod([node])

    def _pod(self, parents: list[str]) -> None:
        """Its template counts annotations and labels, where there are any."""
        name = self._executor()
        template = "retry-system-container-impl" if self.retries else "system-container-impl"
        executors = self.flow.platform.get("executors", {})
        metadata = executors.get(self.component.get("executorLabel"), {}).get("podMetadata")
        if metadata:
            counts = f"{len(metadata.get('annotations', {}))}-{len(metadata.get('labels', {}))}"
            template = f"metadata-{counts}-{template}"
        self.flow.node(name, name.rpartition(".")[2], template, "RUNNING", parents)

    def _close(self, phase: str) -> None:
        """The state of a task's own nodes at its end."""
        if not self.parts:
            if phase == "FAILED":
                self._fail_attempt()
            self.flow.phase(self._executor(), phase)
            if self.retries:
                self.flow.phase(f"{self.path}.executor", phase)
        self.flow.phase(self.path, phase)
        if self._loops:
            self.flow.phase(self._inside(), phase)
        if outer := self.spec.get("_iteration"):
            self.flow.phase(outer, phase)

    def _fail_attempt(self) -> None:
        self.flow.phase(self._executor(), "FAILED")

    def _component(self, task: dict) -> dict:
        return self.flow.pipeline["components"][task["componentRef"]["name"]]

    def _inputs(self, task: dict) -> dict[str, Any]:
        """Parameters of a task that are known without running anything."""
        values = {}
        for name, source in task.get("inputs", {}).get("parameters", {}).items():
            if "componentInputParameter" in source:
                values[name] = self.values.get(source["componentInputParameter"])
            elif "runtimeValue" in source:
                values[name] = source["runtimeValue"].get("constant")
        return values

    def _iterations(self) -> list["_Task"]:
        """One task an item; a loop over what a task puts out has one item here."""
        items = self.spec["parameterIterator"]["items"]
        found = json.loads(items["raw"]) if "raw" in items else self.values.get(items["inputParameter"])
        found = json.loads(found) if isinstance(found, str) else [None] if found is None else found
        tasks = []
        for index, item in enumerate(found):
            outer = f"{self.path}.iteration-iterations({index}:{index})"
            task = {"componentRef": self.spec["componentRef"], "_iteration": outer}
            task |= {"retryPolicy": self.spec["retryPolicy"]} if "retryPolicy" in self.spec else {}
            values = self.values | {self.spec["parameterIterator"].get("itemInput", ""): item}
            tasks.append(_Task(self.flow, self.key, f"{outer}.iteration-item", task, self.component, values))
        return tasks


def _fnv32a(text: str) -> int:
    digest = 0x811C9DC5
    for byte in text.encode():
        digest = (digest ^ byte) * 0x01000193 % 2**32
    return digest
