"""A matrix: tasks x algorithms x seeds, read from one YAML file.

    name: benchmark
    seeds: [0, 1, 2, 3, 4]
    changes: {collection: {total_frames: 300_000}}      # of every cell
    algorithms:
      mappo: {}
      ippo: {networks: {critic: own}}
    tasks:
      balance: {success: terminated}                    # starts from the recipe balance
      wheel:
        recipe: navigation
        changes: {environment: {scenario: wheel}}

A cell is one training: a task, an algorithm and a seed. Its configuration is the recipe with the changes of the
file, then of the task, then of the algorithm, then the seed. Everything is checked before anything is trained.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mappo.config import ExperimentConfig, config_hash, fields_of, override, require_run_name
from mappo.environment.known_scenarios import require_known_scenario
from mappo.environment.reductions import MAX_NAME_LENGTH, is_measurement_name
from mappo.errors import ConfigError, hint_for, one_line
from mappo.recipes import recipe
from mappo.strict_json import json_hash, parse_json_object, to_dict
from mappo.strict_yaml import Lines, read_with_lines

_KEYS = ("name", "seeds", "changes", "algorithms", "tasks")
_TASK_KEYS = ("recipe", "changes", "algorithms", "success", "collisions")
_MAX_CELLS = 10_000
_MAX_SEED = 2**32
_FREE_IN_EPISODES = ("groups", "actions")  # of the environment: they are the learner's choice


@dataclass(frozen=True)
class Cell:
    """A training of a matrix: an ordinary run, with the name of its task, algorithm and seed."""

    task: str
    algorithm: str
    seed: int
    config: ExperimentConfig
    config_hash: str

    @property
    def name(self) -> str:
        """The name of the cell's run."""
        return f"{self.task}-{self.algorithm}-{self.seed}"


@dataclass(frozen=True)
class Task:
    """A task of a matrix. success, collisions: the measurements in these columns of the table, or empty."""

    name: str
    algorithms: tuple[str, ...]
    success: str
    collisions: str


@dataclass(frozen=True)
class Matrix:
    """The tasks, algorithms, seeds and cells of a matrix, in the order of its file."""

    name: str
    seeds: tuple[int, ...]
    algorithms: tuple[str, ...]
    tasks: tuple[Task, ...]
    cells: tuple[Cell, ...]

    def task(self, name: str) -> Task:
        """Return the task with this name, which exists."""
        return next(task for task in self.tasks if task.name == name)

    def cell(self, name: str) -> Cell:
        """Return the cell whose run has this name.

        Raises:
            ConfigError: the matrix has no such cell.
        """
        cells = {cell.name: cell for cell in self.cells}
        if name not in cells:
            hint = hint_for(name, cells, f"the first of its {len(cells)} cells is {self.cells[0].name}")
            raise ConfigError(f"{one_line(name, 80)!r}: not a cell of the matrix {self.name}; {hint}")
        return cells[name]


def read_matrix(path: Path) -> Matrix:
    """Read the file of a matrix.

    Raises:
        ConfigError: the file is not YAML, a key is unknown, a value is not allowed, or two cells are the same; the
            message names the file and the line.
    """
    try:
        return read_with_lines(path, _matrix)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def matrix_json(path: Path) -> str:
    """Return the values in the file of a matrix as compact JSON.

    The order is that of the file, because the first algorithm of a task is its reference.

    Raises:
        ConfigError: as `read_matrix`.
    """

    def to_json(values: dict[str, Any], lines: Lines) -> str:
        _matrix(values, lines)
        return json.dumps(values, separators=(",", ":"))

    try:
        return read_with_lines(path, to_json)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def matrix_from_json(text: str) -> Matrix:
    """Read a matrix from the JSON that `matrix_json` returns, as strictly as its file.

    Raises:
        ConfigError: the text is not the JSON of a matrix.
    """
    no_lines = Lines(yaml.MappingNode("tag:yaml.org,2002:map", []))  # JSON has one line
    return _matrix(parse_json_object(text, "the matrix"), no_lines)


def episodes_hash(config: ExperimentConfig) -> str:
    """Return a hash of all that decides which episodes an evaluation plays: the task, the seeds, their number.

    Results with equal hashes were judged on the same episodes.
    """
    values = to_dict(config)
    environment = {name: value for name, value in values["environment"].items() if name not in _FREE_IN_EPISODES}
    settings = {name: values["evaluation"][name] for name in ("seeds", "episodes_per_seed")}
    return json_hash({"environment": environment, "evaluation": settings})


def _matrix(values: dict[str, Any], lines: Lines) -> Matrix:
    _require_keys(values, (), _KEYS, lines, "the file")
    if missing := [key for key in ("name", "seeds", "algorithms", "tasks") if key not in values]:
        raise ConfigError(f"{missing[0]}: missing; the keys of the file are {', '.join(_KEYS)}")
    with _at(lines, "name"):
        name = require_run_name(_text(values["name"]), "matrix")
    seeds = _seeds(values["seeds"], lines)
    algorithms = _named(values["algorithms"], "algorithms", "algorithm", lines)
    tasks = _named(values["tasks"], "tasks", "task", lines)
    shared = _changes(values.get("changes"), ("changes",), lines)
    changes = {key: _changes(value, ("algorithms", key), lines) for key, value in algorithms.items()}
    of_tasks = {key: _task(key, value, tuple(algorithms), lines) for key, value in tasks.items()}
    num_cells = len(seeds) * sum(len(task.algorithms) for task in of_tasks.values())
    if num_cells > _MAX_CELLS:
        raise ConfigError(f"{num_cells} cells: a matrix has at most {_MAX_CELLS}; split it into several files")
    configs = _configs(tasks, of_tasks, shared, changes, seeds[0], lines)
    _require_distinct(configs, lines)
    cells = [
        _cell(task, algorithm, seed, config) for (task, algorithm), config in configs.items() for seed in seeds
    ]
    _require_distinct_runs(cells, lines)
    return Matrix(name, seeds, tuple(algorithms), tuple(of_tasks.values()), tuple(cells))


def _cell(task: str, algorithm: str, seed: int, config: ExperimentConfig) -> Cell:
    config = replace(config, seed=seed)
    return Cell(task, algorithm, seed, config, config_hash(config))


def _task(name: str, values: Mapping[str, Any], algorithms: Sequence[str], lines: Lines) -> Task:
    keys = ("tasks", name)
    _require_keys(values, keys, _TASK_KEYS, lines, f"task {name}")
    chosen = values.get("algorithms", list(algorithms))
    with _at(lines, *keys, "algorithms"):
        if not isinstance(chosen, list) or not chosen or not all(isinstance(each, str) for each in chosen):
            raise ConfigError("must be a list of names of algorithms")
        for algorithm in chosen:
            if algorithm not in algorithms:
                hint = hint_for(algorithm, algorithms, f"the algorithms are {', '.join(algorithms)}")
                raise ConfigError(f"{one_line(algorithm, 80)}: unknown; {hint}")
        if len(set(chosen)) < len(chosen):
            raise ConfigError("every algorithm may appear only once")
    measured = {}
    for key in ("success", "collisions"):
        measured[key] = values.get(key, "")
        with _at(lines, *keys, key):
            if key in values and not is_measurement_name(measured[key]):
                raise ConfigError(
                    f"must be the name of a measurement, a text of at most {MAX_NAME_LENGTH} characters"
                )
    return Task(name, tuple(chosen), **measured)


def _configs(
    tasks: Mapping[str, Mapping[str, Any]],
    of_tasks: Mapping[str, Task],
    shared: Mapping[str, Any],
    changes: Mapping[str, Mapping[str, Any]],
    seed: int,
    lines: Lines,
) -> dict[tuple[str, str], ExperimentConfig]:
    """Return the configuration of each task and algorithm with this seed; collect the problems of all of them."""
    configs: dict[tuple[str, str], ExperimentConfig] = {}
    problems: dict[str, None] = {}
    for name, values in tasks.items():
        try:
            with _at(lines, "tasks", name, "recipe"):
                start = recipe(_text(values.get("recipe", name)))
            own = _changes(values.get("changes"), ("tasks", name, "changes"), lines)
        except ConfigError as error:
            problems[str(error)] = None
            continue
        for algorithm in of_tasks[name].algorithms:
            layers = (("changes",), ("tasks", name, "changes"), ("algorithms", algorithm))
            try:
                config = override(start, shared, own, changes[algorithm], {"seed": seed})
                require_known_scenario(config.environment)
                _require_same_episodes(override(start, shared, own), config, algorithm)
                configs[name, algorithm] = config
            except ConfigError as error:
                for problem in str(error).splitlines():
                    problems[f"{_place(problem, layers, lines)}task {name}, {algorithm}: {problem}"] = None
    if problems:
        raise ConfigError("\n".join(problems))
    return configs


def _require_same_episodes(task: ExperimentConfig, config: ExperimentConfig, algorithm: str) -> None:
    """Refuse an algorithm that changes the task or the episodes: its results could not be compared with others."""
    if episodes_hash(task) != episodes_hash(config):
        before, after = fields_of(task), fields_of(config)
        changed = [
            field
            for field in before
            if before[field] != after[field]
            and field.startswith(("environment.", "evaluation."))
            and field.partition(".")[2] not in _FREE_IN_EPISODES
        ]
        raise ConfigError(
            f"{changed[0]}: the algorithm {algorithm} changes it, so that its results could not be compared with "
            "those of the others; give it in the changes of the task"
        )


def _place(problem: str, layers: Sequence[tuple[str, ...]], lines: Lines) -> str:
    """Return the line of the field that an error begins with, in the last layer of changes that has the field."""
    field = problem.partition(" ")[0].partition(":")[0].split(".")
    for length in range(len(field), 0, -1):
        for layer in reversed(layers):
            if lines.has(*layer, *field[:length]):
                return f"line {lines(*layer, *field[:length])}: "
    return f"line {lines(*layers[1])}: "


def _require_distinct(configs: Mapping[tuple[str, str], ExperimentConfig], lines: Lines) -> None:
    """Refuse two cells that would train the same: a result must not count twice."""
    first: dict[str, tuple[str, str]] = {}
    for (task, algorithm), config in configs.items():
        other = first.setdefault(config_hash(config), (task, algorithm))
        if other != (task, algorithm):
            raise ConfigError(
                f"line {lines('tasks', task)}: task {task}, {algorithm}: the same configuration as "
                f"task {other[0]}, {other[1]}; change one of them, or leave one out"
            )


def _require_distinct_runs(cells: Iterable[Cell], lines: Lines) -> None:
    names: dict[str, Cell] = {}
    for cell in cells:
        with _at(lines, "tasks", cell.task):
            require_run_name(cell.name, "the run of a cell,")
        other = names.setdefault(cell.name, cell)
        if other is not cell:
            raise ConfigError(
                f"line {lines('tasks', cell.task)}: task {cell.task}, {cell.algorithm}: its run would be named "
                f"{cell.name}, as that of task {other.task}, {other.algorithm}; rename one of them"
            )


def _named(value: Any, key: str, kind: str, lines: Lines) -> dict[str, dict[str, Any]]:
    """Return a mapping from names to mappings; `name:` without a value stands for an empty mapping."""
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"line {lines(key)}: {key}: must hold at least one name with its settings")
    result = {}
    for name, inner in value.items():
        with _at(lines, key, name):
            require_run_name(name, kind)
            result[name] = {} if inner is None else inner
            if not isinstance(result[name], dict):
                raise ConfigError("must hold keys and values; {} for none")
    return result


def _changes(value: Any, keys: tuple[str, ...], lines: Lines) -> dict[str, Any]:
    """Return changes of a configuration; `override` checks them."""
    with _at(lines, *keys):
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise ConfigError("must hold sections of a configuration, such as learner: {epochs: 5}")
        if "seed" in value:
            raise ConfigError("seed: the seeds of a matrix stand under its key `seeds`")
        return value


def _seeds(value: Any, lines: Lines) -> tuple[int, ...]:
    with _at(lines, "seeds"):
        if not isinstance(value, list) or not value:
            raise ConfigError("must be a list of whole numbers, such as [0, 1, 2, 3, 4]")
        for seed in value:
            if type(seed) is not int or not 0 <= seed < _MAX_SEED:
                raise ConfigError(f"{one_line(seed, 80)}: a seed is a whole number from 0 to {_MAX_SEED - 1}")
        if len(set(value)) < len(value):
            raise ConfigError("every seed may appear only once")
        return tuple(value)


@contextmanager
def _at(lines: Lines, *keys: str) -> Iterator[None]:
    """Let the errors of a block name the line and the keys of a value."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"line {lines(*keys)}: {'.'.join(keys)}: {error}") from None


def _require_keys(
    values: Mapping[str, Any], keys: tuple[str, ...], known: Sequence[str], lines: Lines, owner: str
) -> None:
    for key in values:
        if key not in known:
            hint = hint_for(key, known, f"the keys are {', '.join(known)}")
            raise ConfigError(f"line {lines(*keys, key)}: {owner}: {one_line(key, 80)}: unknown key; {hint}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{one_line(value, 80)}: must be a text; write it in quotes")
    return value
