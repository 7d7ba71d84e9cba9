"""Plan a compiled pipeline before it runs: list its stages, with every iteration of its loops, in order."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.specification import defaults_of

Path = tuple[str, ...]  # the nested steps down to a stage, in Argo's names: root, for-loop-1, train


@dataclass(frozen=True)
class PlannedStage:
    """A stage that will run: its path, its task and component in the specification, and its known inputs."""

    path: Path
    task: Mapping[str, Any]
    component: Mapping[str, Any]
    inputs: Mapping[str, Any]


def planned_stages(
    specification: Mapping[str, Any], parameters: Mapping[str, Any], unknown_items: int = 0
) -> list[PlannedStage]:
    """Return the stages of a pipeline in an order in which they can run, given the parameters of a run.

    `unknown_items` is the assumed number of items of a loop over a task's output, which is unknown before the run;
    0 returns the loop's stages once, without the steps of an iteration in their paths.
    """
    pipeline = specification.get("pipeline_spec", specification)
    root = pipeline.get("root", {})
    values = {**defaults_of({"root": root}), **parameters}
    return list(_Plan(pipeline.get("components", {}), unknown_items).stages(("root",), root, values))


def repeated_names(specification: Mapping[str, Any]) -> frozenset[str]:
    """Return the stage names that appear more than once, in several nested pipelines."""
    pipeline = specification.get("pipeline_spec", specification)
    components = pipeline.get("components", {})
    names = [
        name
        for name, task in tasks_of(pipeline)
        if "executorLabel" in components.get(task["componentRef"]["name"], {})
    ]
    return frozenset(name for name in names if names.count(name) > 1)


def tasks_of(pipeline: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and task of every task in a pipeline and in its nested pipelines."""
    for component in (pipeline.get("root", {}), *pipeline.get("components", {}).values()):
        yield from component.get("dag", {}).get("tasks", {}).items()


@dataclass(frozen=True)
class _Plan:
    components: Mapping[str, Any]
    unknown_items: int

    def stages(
        self, path: Path, component: Mapping[str, Any], values: Mapping[str, Any]
    ) -> Iterator[PlannedStage]:
        """Yield the stages of a component; `values` holds those of its parameters that are known."""
        tasks = dict(component.get("dag", {}).get("tasks", {}))
        while tasks:
            ready = [name for name, task in tasks.items() if not set(task.get("dependentTasks", [])) & set(tasks)]
            for name in ready or list(tasks):
                task = tasks.pop(name)
                inner = self.components.get(task["componentRef"]["name"], {})
                inputs = _known_inputs(task, values)
                for task_path in self._iterations((*path, name), task, inputs):
                    if "dag" in inner:
                        yield from self.stages(task_path, inner, inputs)
                    else:
                        yield PlannedStage(task_path, task, inner, inputs)

    def _iterations(self, path: Path, task: Mapping[str, Any], values: Mapping[str, Any]) -> list[Path]:
        """Return the paths of a loop's iterations; only `path` for another task, or if the items stay unknown."""
        if "parameterIterator" not in task:
            return [path]
        source = task["parameterIterator"]["items"]
        items = json.loads(source["raw"]) if "raw" in source else values.get(source["inputParameter"])
        if items is None and not self.unknown_items:
            return [path]
        count = self.unknown_items if items is None else len(items)
        return [(*path, f"iteration-iterations({i}:{i})", "iteration-item") for i in range(count)]


def _known_inputs(task: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of a task that come from known parameters of the component around it."""
    parameters = task.get("inputs", {}).get("parameters", {})
    sources = {name: value.get("componentInputParameter") for name, value in parameters.items()}
    return {name: values[source] for name, source in sources.items() if source in values}
