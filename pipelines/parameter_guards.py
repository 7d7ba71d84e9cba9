"""Refuse wrong parameters of a run before the run is sent to Kubeflow."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from components.placeholders import SCHEDULED_TIME, fill
from mappo.config import from_json
from mappo.errors import ConfigError, StoreError, hint_for
from mappo.matrix.matrix import matrix_from_json
from mappo.runs.locations import bucket_of, run_location
from mappo.strict_json import parse_json
from mappo.tuning.search_space import extended_space
from mappo.tuning.study_config import study_config_from_json, study_name
from pipelines.placement import GENERAL_PARAMETERS, GPU_STAGES, SHM_PATH, STAGES
from pipelines.site import check_site
from pipelines.specification import (
    KIND_WORDS,
    KINDS,
    TIMED_PARAMETERS,
    defaults_of,
    parameters_of,
    placeholder_problems,
)

MAX_PARAMETERS_BYTES = 10_000  # the most that the server accepts for a run
_COUNT = re.compile(r"[0-9]{1,10}")
_SAMPLE_TIME = "2006-01-02T15:04:05Z"
_SAMPLE_NAME = "id-of-the-run"  # stands for the ID that names a run without a name
_SEED = re.compile(r"0|[1-9][0-9]{0,9}")


def check_parameters(documents: Sequence[Mapping[str, Any]], parameters: Mapping[str, Any]) -> None:
    """Refuse parameters of a run that the server or a stage would refuse.

    `documents` are those of the compiled pipeline: its specification, then its settings for Kubernetes.

    Raises:
        ConfigError: a parameter is unknown, missing, of another type or not allowed, alone or in combination with
            other parameters and the pipeline's defaults; the message has one line for each.
    """
    specification = documents[0]
    declared = parameters_of(specification)
    problems = [_unknown(name, declared) for name in parameters if name not in declared]
    problems += [
        f"parameter {name}: missing; it has no default"
        for name, definition in declared.items()
        if name not in parameters and "defaultValue" not in definition and not definition.get("isOptional")
    ]
    for name, value in parameters.items():
        if name in declared:
            problems += _value_problems(name, value, declared[name]["parameterType"], documents)
    size = len(json.dumps(dict(parameters)).encode())
    if size > MAX_PARAMETERS_BYTES:
        problems.append(f"parameters: {size} bytes of JSON; the server takes {MAX_PARAMETERS_BYTES}")
    problems = problems or list(_combined_problems({**defaults_of(specification), **parameters}))
    if problems:
        raise ConfigError("\n".join(problems))


def parse_parameter(specification: Mapping[str, Any], assignment: str) -> tuple[str, Any]:
    """Read NAME=VALUE from the command line: a text parameter as it is, any other as JSON.

    Raises:
        ConfigError: the pipeline has no such parameter, or the value is not JSON.
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
    hint = hint_for(name, declared, f"there is: {', '.join(sorted(declared))}")
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
    """Raise a ValueError for a value that a stage or Kubernetes would refuse later."""
    if name == "config":
        from_json(value)
    elif name == "seeds":
        if not value or not all(_is_seed(seed) for seed in value) or len(set(value)) < len(value):
            raise ConfigError(f'{json.dumps(value)}: must be different seeds, each as text, such as ["0", "1"]')
    elif name == "workers":
        if not value or not all(isinstance(worker, str) for worker in value) or len(set(value)) < len(value):
            raise ConfigError(f'{json.dumps(value)}: must be different names, each as text, such as ["1", "2"]')
    elif name == "cells":
        if not value or not all(isinstance(cell, str) for cell in value) or len(set(value)) < len(value):
            raise ConfigError(f'{json.dumps(value)}: must be different names of cells, as ["balance-mappo-0"]')
    elif name == "matrix":
        matrix_from_json(value)
    elif name == "study_config":
        study_config_from_json(value)
    elif name in GENERAL_PARAMETERS:
        check_site({name: value})
    else:
        stage, _, field = name.partition("_")
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
    """Return the size of /dev/shm that the pipeline fixes for a stage, or None; a run cannot change it."""
    platform = {} if len(documents) < 2 else documents[1]["platforms"]["kubernetes"]["deploymentSpec"]
    for label, executor in platform.get("executors", {}).items():
        if re.fullmatch(rf"exec-{stage}(-\d+)?", label):
            for mount in executor.get("emptyDirMounts", []):
                if mount["mountPath"] == SHM_PATH:
                    return str(mount["sizeLimit"])
    return None


def _combined_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield problems of a run's parameters in combination, with defaults and with [[ScheduledTime]] filled in.

    A sample time stands for the time of the run. Messages show the placeholder again.
    """
    if problems := list(placeholder_problems(values)):
        yield from problems
        return
    filled = {name: fill(values[name], _SAMPLE_TIME) for name in TIMED_PARAMETERS if name in values}
    sample = fill(SCHEDULED_TIME, _SAMPLE_TIME)
    for check in (_location_problems, _name_problems, _space_problems, _device_problems, _matrix_problems):
        yield from (problem.replace(sample, SCHEDULED_TIME) for problem in check({**values, **filled}))


def _location_problems(values: Mapping[str, Any]) -> Iterator[str]:
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
    """Yield problems of a study's search space, given the configuration that it starts from."""
    if "study_config" in values and "config" in values:
        try:
            extended_space(study_config_from_json(values["study_config"]).space, from_json(values["config"]))
        except ConfigError as error:
            yield from (f"parameter study_config: {line}" for line in str(error).splitlines())


def _device_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the stages that request GPUs although the configuration makes them compute on the CPU."""
    counts = {stage: str(values.get(f"{stage}_gpu_count", "0")) for stage in GPU_STAGES}
    requested = {stage: count for stage, count in counts.items() if _is_count(count) and int(count)}
    if not requested or "config" not in values:
        return
    try:
        device = from_json(values["config"]).device
    except ConfigError as error:
        yield from (f"parameter config: {line}" for line in str(error).splitlines())
        return
    if device == "cpu":
        yield from (_unused_gpus(stage, count) for stage, count in requested.items())


def _matrix_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the store, the cells and the GPUs of a matrix."""
    if "matrix" not in values:
        return
    try:
        matrix = matrix_from_json(values["matrix"])
        cells = [matrix.cell(name) for name in values["cells"]]
    except ConfigError as error:
        yield from (f"parameter cells: {line}" for line in str(error).splitlines())
        return
    if not values["store"]:
        yield "parameter store: empty; the cells of a matrix are kept in a store, and found again there: give one"
    count = str(values["cell_gpu_count"])
    on_cpu = next((cell for cell in cells if cell.config.device == "cpu"), None)
    if on_cpu and _is_count(count) and int(count):
        yield f"task {on_cpu.task}, {on_cpu.algorithm}: {_unused_gpus('cell', count)}"


def _unused_gpus(stage: str, count: str) -> str:
    return (
        f"parameter {stage}_gpu_count = {count}: config.device = cpu leaves the GPUs of stage {stage} unused; "
        f"set device to auto or cuda, or {stage}_gpu_count to 0"
    )
