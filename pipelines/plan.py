"""The stages of a compiled pipeline before it runs: which, how often, in which order."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]  # the steps that lead to a stage, as Argo names them: root, for-loop-1, train


@dataclass(frozen=True)
class PlannedStage:
    """One stage that will run: its path, its task and its component in the specification, its known inputs."""

    path: Path
    task: Mapping[str, Any]
    component: Mapping[str, Any]
    inputs: Mapping[str, Any]


def planned_stages(
    specification: Mapping[str, Any], parameters: Mapping[str, Any], unknown_items: int = 0
) -> list[PlannedStage]:
    """Return a pipeline's stages with a run's parameters, in an order in which they can run.

    unknown_items: how many items a loop over a task's output is taken to have; 0 gives its stages once, without
    the steps of an iteration.
    """
    pipeline = specification.get("pipeline_spec", specification)
    root = pipeline.get("root", {})
    defined = root.get("inputDefinitions", {}).get("parameters", {})
    values = {name: value["defaultValue"] for name, value in defined.items() if "defaultValue" in value}
    return list(
        _Plan(pipeline.get("components", {}), unknown_items).stages(("root",), root, {**values, **parameters})
    )


def repeated_names(specification: Mapping[str, Any]) -> frozenset[str]:
    """Return the names that stages of several nested pipelines share."""
    pipeline = specification.get("pipeline_spec", specification)
    components = pipeline.get("components", {})
    names = [
        name
        for name, task in tasks_of(pipeline)
        if "executorLabel" in components.get(task["componentRef"]["name"], {})
    ]
    return frozenset(name for name in names if names.count(name) > 1)


def tasks_of(pipeline: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the tasks of a pipeline and of those nested in it, with their names."""
    for component in (pipeline.get("root", {}), *pipeline.get("components", {}).values()):
        yield from component.get("dag", {}).get("tasks", {}).items()


@dataclass(frozen=True)
class _Plan:
    components: Mapping[str, Any]
    unknown_items: int

    def stages(
        self, path: Path, component: Mapping[str, Any], values: Mapping[str, Any]
    ) -> Iterator[PlannedStage]:
        """Yield the stages below a component whose parameters have these values, as far as they are known."""
        tasks = dict(component.get("dag", {}).get("tasks", {}))
        while tasks:
            ready = [name for name, task in tasks.items() if not set(task.get("dependentTasks", [])) & set(tasks)]
            for name in ready or list(tasks):
                task = tasks.pop(name)
                inner = self.components.get(task["componentRef"]["name"], {})
                given = _inputs(task, values)
                for place in self._iterations((*path, name), task, given):
                    if "dag" in inner:
                        yield from self.stages(place, inner, given)
                    else:
                        yield PlannedStage(place, task, inner, given)

    def _iterations(self, path: Path, task: Mapping[str, Any], values: Mapping[str, Any]) -> list[Path]:
        """Return the paths of a loop's iterations; the path alone if it is no loop, or one of unknown items."""
        if "parameterIterator" not in task:
            return [path]
        items = task["parameterIterator"]["items"]
        each = json.loads(items["raw"]) if "raw" in items else values.get(items["inputParameter"])
        if each is None and not self.unknown_items:
            return [path]
        count = self.unknown_items if each is None else len(each)
        return [(*path, f"iteration-iterations({i}:{i})", "iteration-item") for i in range(count)]


def _inputs(task: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of a task's inputs: those from the parameters of what it is in."""
    given = task.get("inputs", {}).get("parameters", {})
    sources = {name: value.get("componentInputParameter") for name, value in given.items()}
    return {name: values[source] for name, source in sources.items() if source in values}
