"""Refuse wrong parameters of a run before they reach Kubeflow."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from components.placeholders import SCHEDULED_TIME, fill
from mappo.config import from_json
from mappo.errors import ConfigError, StoreError
from mappo.runs.locations import bucket_of, run_location
from mappo.strict_json import parse_json, parse_json_object
from mappo.tuning.search_space import extended_space
from mappo.tuning.study_config import study_name
from pipelines.placement import GENERAL_PARAMETERS, GPU_STAGES, SHM_PATH, STAGES
from pipelines.site import check_site
from pipelines.specification import (
    JSON_PARAMETERS,
    KIND_WORDS,
    KINDS,
    TIMED_PARAMETERS,
    defaults_of,
    parameters_of,
    placeholder_problems,
)

MAX_PARAMETERS_BYTES = 10_000  # that the server takes for a run
_COUNT = re.compile(r"[0-9]{1,10}")
_SAMPLE_TIME = "2006-01-02T15:04:05Z"
_SAMPLE_NAME = "id-of-the-run"  # in the place of a run's name, if it has none
_BOUNDS = {"num_trials": (1, math.inf), "retrain_seeds": (2, math.inf), "hours": (0, 9999)}
_SEED = re.compile(r"0|[1-9][0-9]{0,9}")


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
    problems = problems or list(_problems_together({**defaults_of(specification), **given}))
    if problems:
        raise ConfigError("\n".join(problems))


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
        raise ConfigError(f"parameter {name} = {text!r}: must be {KIND_WORDS[kind]}: {error}") from None


def _unknown(name: str, declared: Mapping[str, Any]) -> str:
    close = get_close_matches(name, declared, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there is: {', '.join(sorted(declared))}"
    return f"parameter {name}: unknown; {hint}"


def _value_problems(name: str, value: Any, kind: str, documents: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    is_boolean = isinstance(value, bool)
    if not isinstance(value, KINDS[kind]) or (is_boolean and kind != "BOOLEAN"):
        yield f"parameter {name} = {json.dumps(value)}: must be {KIND_WORDS[kind]}"
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
    elif name in JSON_PARAMETERS:
        JSON_PARAMETERS[name](parse_json_object(value))
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


def _problems_together(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the values of a run as the stages will see them."""
    if wrong := list(placeholder_problems(values)):
        yield from wrong
        return
    filled = {name: fill(values[name], _SAMPLE_TIME) for name in TIMED_PARAMETERS if name in values}
    sample = fill(SCHEDULED_TIME, _SAMPLE_TIME)
    for find in (_place_problems, _name_problems, _space_problems, _device_problems):
        yield from (problem.replace(sample, SCHEDULED_TIME) for problem in find({**values, **filled}))


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
