"""Refuse compiled pipelines with known defects, and wrong parameters, before they reach Kubeflow.

Some of these give wrong values in silence there, others an error after minutes, in words about protocol buffers.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from components.placeholders import SCHEDULED_TIME, fill, require_known
from mappo.config import from_json
from mappo.errors import ConfigError, StoreError
from mappo.promotion.gate import Gate
from mappo.runs.locations import bucket_of, run_location
from mappo.strict_json import checked, parse_json, parse_json_object
from mappo.tuning.search_space import TuningConfig, extended_space
from mappo.tuning.study_config import study_name
from pipelines.placement import GENERAL_PARAMETERS, GPU_STAGES, SHM_PATH, STAGES
from pipelines.plan import tasks_of
from pipelines.site import check_site, require_image

MAX_PARAMETERS_BYTES = 10_000  # that the server takes for a run
MAX_SPECIFICATION_BYTES = 1_000_000  # a workflow with it must fit into one object of Kubernetes
_SECRET_NAME = re.compile(r"(?i)secret|password|passwd|token|credential|access_?key|api_?key")
_SECRET_VALUE = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]+:[^/\s@]+@|eyJ[\w-]{20,}\.eyJ"
)
_PLACEHOLDER = re.compile(r"\{\{|pipelinechannel")
_PARAMETER_PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
_KINDS: dict[str, tuple[type, ...]] = {
    "STRING": (str,),
    "NUMBER_INTEGER": (int,),
    "NUMBER_DOUBLE": (int, float),
    "BOOLEAN": (bool,),
    "LIST": (list,),
    "STRUCT": (dict,),
}
_TIMED_PARAMETERS = ("run", "edition", "store")  # the stages put the time of the run into these
_COUNT = re.compile(r"[0-9]{1,10}")
_SAMPLE_TIME = "2006-01-02T15:04:05Z"
_SAMPLE_NAME = "id-of-the-run"  # in the place of a run's name, if it has none
_BOUNDS = {"num_trials": (1, math.inf), "retrain_seeds": (2, math.inf), "hours": (0, 9999)}
_SEED = re.compile(r"0|[1-9][0-9]{0,9}")
_JSON_PARAMETERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "space": lambda _: None,
    "tuning": lambda values: checked(TuningConfig, values),
    "gate": lambda values: checked(Gate, values),
}
_WORDS = {
    "STRING": "text",
    "NUMBER_INTEGER": "a whole number",
    "NUMBER_DOUBLE": "a number",
    "BOOLEAN": "true or false",
    "LIST": "a JSON list",
    "STRUCT": "a JSON object",
}


def check_specification(text: str, documents: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a compiled pipeline, given as the YAML's text and its documents, with any known defect.

    Raises:
        ConfigError: one line for each defect.
    """
    specification = documents[0]
    problems = [
        *_size_problems(text, specification),
        *_placeholder_problems(_defaults_of(specification)),
        *_image_problems(specification),
        *_environment_problems(specification),
        *_secret_problems(specification),
        *_task_problems(specification),
        *_reference_problems(specification),
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def check_parameters(documents: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> None:
    """Refuse parameters of a run that the server would refuse, or a stage later.

    `documents` are those of the compiled pipeline: its specification, then what concerns Kubernetes.

    Raises:
        ConfigError: one line for each parameter that is unknown, missing, of another type or not allowed, also
            together with others and with the pipeline's defaults.
    """
    specification = documents[0]
    declared = parameters_of(specification)
    problems = [_unknown(name, declared) for name in given if name not in declared]
    problems += [
        f"parameter {name}: missing; it has no default"
        for name, each in declared.items()
        if name not in given and "defaultValue" not in each and not each.get("isOptional")
    ]
    for name, value in given.items():
        if name in declared:
            problems += _value_problems(name, value, declared[name]["parameterType"], documents)
    size = len(json.dumps(dict(given)).encode())
    if size > MAX_PARAMETERS_BYTES:
        problems.append(f"parameters: {size} bytes of JSON; the server takes {MAX_PARAMETERS_BYTES}")
    problems = problems or list(_problems_together({**_defaults_of(specification), **given}))
    if problems:
        raise ConfigError("\n".join(problems))


def parameters_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    """The declared parameters of a compiled pipeline, by name."""
    parameters = specification["root"].get("inputDefinitions", {}).get("parameters", {})
    assert isinstance(parameters, dict)
    return parameters


def parse_parameter(specification: Mapping[str, Any], assignment: str) -> tuple[str, Any]:
    """Read NAME=VALUE as typed at a terminal: text as it is, everything else as JSON.

    Raises:
        ConfigError: there is no such parameter, or it is not JSON.
    """
    name, equals, text = assignment.partition("=")
    declared = parameters_of(specification)
    if not equals:
        raise ConfigError(f"--parameter {assignment!r}: must be NAME=VALUE")
    if name not in declared:
        raise ConfigError(_unknown(name, declared))
    kind = declared[name]["parameterType"]
    if kind == "STRING":
        return name, text
    try:
        return name, parse_json(text)
    except ValueError as error:
        raise ConfigError(f"parameter {name} = {text!r}: must be {_WORDS[kind]}: {error}") from None


def _unknown(name: str, declared: Mapping[str, Any]) -> str:
    close = get_close_matches(name, declared, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there is: {', '.join(sorted(declared))}"
    return f"parameter {name}: unknown; {hint}"


def _value_problems(name: str, value: Any, kind: str, documents: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    is_boolean = isinstance(value, bool)
    if not isinstance(value, _KINDS[kind]) or (is_boolean and kind != "BOOLEAN"):
        yield f"parameter {name} = {json.dumps(value)}: must be {_WORDS[kind]}"
        return
    try:
        _check_meaning(name, value, documents)
    except ValueError as error:
        lines = str(error).splitlines()
        yield from (f"parameter {name}: {line}" for line in lines)


def _check_meaning(name: str, value: Any, documents: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what a stage or Kubernetes would refuse later."""
    if name == "config":
        from_json(value)
    elif name == "seeds":
        if not value or not all(_is_seed(each) for each in value) or len(set(value)) < len(value):
            raise ConfigError(f'{json.dumps(value)}: must be different seeds, each as text, such as ["0", "1"]')
    elif name == "workers":
        if not value or not all(isinstance(each, str) for each in value) or len(set(value)) < len(value):
            raise ConfigError(f'{json.dumps(value)}: must be different names, each as text, such as ["1", "2"]')
    elif name in _BOUNDS:
        least, most = _BOUNDS[name]
        if not least <= value <= most:
            raise ConfigError(f"{value}: must be {least} or more{'' if math.isinf(most) else f', at most {most}'}")
    elif name in _JSON_PARAMETERS:
        _JSON_PARAMETERS[name](parse_json_object(value))
    elif name in GENERAL_PARAMETERS:
        check_site({name: value})
    elif stage_field := name.partition("_")[::2]:
        stage, field = stage_field
        if stage in STAGES:
            if field == "gpu_count":
                value = int(value) if _is_count(value) else value
            shm = {"shm": _compiled_shm(documents, stage)} if field == "memory" else {}
            check_site({"stages": {stage: {field: value, **shm}}})


def _is_seed(value: Any) -> bool:
    return isinstance(value, str) and bool(_SEED.fullmatch(value)) and int(value) < 2**32


def _is_count(text: str) -> bool:
    return bool(_COUNT.fullmatch(text))


def _compiled_shm(documents: Sequence[Mapping[str, Any]], stage: str) -> str | None:
    """Return the size of /dev/shm that was compiled into a stage; a run cannot change it."""
    of_kubernetes = {} if len(documents) < 2 else documents[1]["platforms"]["kubernetes"]["deploymentSpec"]
    for label, executor in of_kubernetes.get("executors", {}).items():
        if re.fullmatch(rf"exec-{stage}(-\d+)?", label):
            for mount in executor.get("emptyDirMounts", []):
                if mount["mountPath"] == SHM_PATH:
                    return str(mount["sizeLimit"])
    return None


def _defaults_of(specification: Mapping[str, Any]) -> dict[str, Any]:
    declared = parameters_of(specification)
    return {name: each["defaultValue"] for name, each in declared.items() if "defaultValue" in each}


def _problems_together(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the values of a run as the stages will see them."""
    if wrong := list(_placeholder_problems(values)):
        yield from wrong
        return
    filled = {name: fill(values[name], _SAMPLE_TIME) for name in _TIMED_PARAMETERS if name in values}
    sample = fill(SCHEDULED_TIME, _SAMPLE_TIME)
    for find in (_place_problems, _name_problems, _space_problems, _device_problems):
        yield from (problem.replace(sample, SCHEDULED_TIME) for problem in find({**values, **filled}))


def _placeholder_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        for text in _texts_within(name, value):
            try:
                require_known(text)
            except ConfigError as error:
                yield f"parameter {name}: {error}"
            else:
                if SCHEDULED_TIME in text and name not in _TIMED_PARAMETERS:
                    where = ", ".join(_TIMED_PARAMETERS)
                    yield f"parameter {name} = {text!r}: {SCHEDULED_TIME} is replaced in {where} only"


def _texts_within(name: str, value: Any) -> Iterator[str]:
    """Yield the texts of a parameter, also those within its JSON."""
    if name in ("config", *_JSON_PARAMETERS) and isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:  # reported as the value's own problem
            return
    yield from (text for _, text in _texts(value, name))


def _place_problems(values: Mapping[str, Any]) -> Iterator[str]:
    for name in ("store", "champions"):
        location = values.get(name)
        if location and ":/" not in location:
            yield (
                f"parameter {name} = {location!r}: a directory of a pod is lost with the pod; give "
                "s3://bucket/prefix or minio://bucket/prefix"
            )
        elif location:
            try:
                bucket_of(location)
            except StoreError as error:
                yield f"parameter {name}: {error}"


def _name_problems(values: Mapping[str, Any]) -> Iterator[str]:
    try:
        if "run" in values:
            for seed in values.get("seeds") or [""]:
                store = values.get("store", "")
                run_location(store, values["run"] or (_SAMPLE_NAME if store else ""), "", seed)
        if "study" in values:
            study_name(values["study"], values.get("edition", ""))
    except ConfigError as error:
        yield f"parameters: {error}"


def _space_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the ranges of a study, given the configuration that it begins with."""
    if "space" in values and "config" in values:
        try:
            extended_space(parse_json_object(values["space"]), from_json(values["config"]))
        except ConfigError as error:
            yield from (f"parameter space: {line}" for line in str(error).splitlines())


def _device_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the stages that would be given GPUs and compute on the CPU."""
    counts = {stage: str(values.get(f"{stage}_gpu_count", "0")) for stage in GPU_STAGES}
    wanted = {stage: count for stage, count in counts.items() if _is_count(count) and int(count)}
    if not wanted or "config" not in values:
        return
    try:
        device = from_json(values["config"]).device
    except ConfigError as error:
        yield from (f"parameter config: {line}" for line in str(error).splitlines())
        return
    if device == "cpu":
        yield from (_unused_gpus(stage, count) for stage, count in wanted.items())


def _unused_gpus(stage: str, count: str) -> str:
    return (
        f"parameter {stage}_gpu_count = {count}: config.device = cpu leaves the GPUs of stage {stage} unused; "
        f"set device to auto or cuda, or {stage}_gpu_count to 0"
    )


def _size_problems(text: str, specification: Mapping[str, Any]) -> Iterator[str]:
    size = len(text.encode())
    if size > MAX_SPECIFICATION_BYTES:
        yield f"specification: {size} bytes; at most {MAX_SPECIFICATION_BYTES} fit into Kubernetes"
    size = len(json.dumps(_defaults_of(specification)).encode())
    if size > MAX_PARAMETERS_BYTES:
        yield f"defaults of parameters: {size} bytes of JSON; the server takes {MAX_PARAMETERS_BYTES} for a run"


def _image_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    for name, container in _containers(specification):
        if not _PLACEHOLDER.search(container["image"]):
            try:
                require_image(container["image"])
            except ConfigError as error:
                yield f"{name}: {error}"
    default = parameters_of(specification).get("image", {}).get("defaultValue")
    if default is not None:
        try:
            require_image(default)
        except ConfigError as error:
            yield f"parameter image: {error}"


def _environment_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    """Kubeflow passes values of the environment on as they are: a placeholder in one stays one."""
    for name, container in _containers(specification):
        for each in container.get("env", []):
            if _PLACEHOLDER.search(str(each.get("value", ""))):
                value = each["value"]
                yield f"{name}: environment {each['name']} = {value!r}: a placeholder is not replaced there"


def _secret_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    for name, container in _containers(specification):
        for each in container.get("env", []):
            if _SECRET_NAME.search(each["name"]) and each.get("value"):
                yield f"{name}: environment {each['name']} is given in the specification: use a secret"
    for path, value in _texts(specification, "specification"):
        if _SECRET_VALUE.search(value):
            yield f"{path}: looks like a credential: use a secret"


def _task_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    for name, task in tasks_of(specification):
        if task.get("cachingOptions", {}).get("enableCache"):
            yield f"task {name}: is cached, but results depend on more than inputs: set_caching_options(False)"
        if "parameterIterator" in task or "artifactIterator" in task:
            items = task.get("parameterIterator", {}).get("items", {}).get("inputParameter")
            for parameter, source in task.get("inputs", {}).get("parameters", {}).items():
                if "taskOutputParameter" in source and parameter != items:
                    yield (
                        f"loop {name}: takes {parameter} from a task around it, which local runs replace by the "
                        "loop's item: put the loop into a pipeline of its own, with this as its parameter"
                    )


def _reference_problems(specification: Mapping[str, Any]) -> Iterator[str]:
    """A parameter that a task takes from the pipeline around it, which has none of that name, or not as text."""
    for owner, component in {"root": specification["root"], **specification["components"]}.items():
        declared = component.get("inputDefinitions", {}).get("parameters", {})
        for name, task in component.get("dag", {}).get("tasks", {}).items():
            for parameter, source in task.get("inputs", {}).get("parameters", {}).items():
                wanted = source.get("componentInputParameter")
                if wanted is not None and wanted not in declared:
                    yield f"task {name}: takes {parameter} from {wanted}, which {owner} does not have"
                elif wanted in declared and parameter in _in_resources(specification, task):
                    kind = declared[wanted]["parameterType"]
                    if kind != "STRING":
                        yield f"task {name}: resource from {wanted}, which is {_WORDS[kind]}, not text"


def _in_resources(specification: Mapping[str, Any], task: Mapping[str, Any]) -> list[str]:
    """Parameters that a task's resources are taken from."""
    component = specification["components"].get(task["componentRef"]["name"], {})
    executor = specification["deploymentSpec"]["executors"].get(component.get("executorLabel"), {})
    return _PARAMETER_PLACEHOLDER.findall(json.dumps(executor.get("container", {}).get("resources")))


def _containers(specification: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, executor in specification["deploymentSpec"]["executors"].items():
        if "container" in executor:
            yield name, executor["container"]


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _texts(each, f"{path}.{key}")
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _texts(each, f"{path}.{index}")
