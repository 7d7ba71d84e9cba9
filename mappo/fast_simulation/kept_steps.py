"""The cache of checked steps: a later process that makes the same environment neither traces nor checks again.

A step is kept beside the compiled libraries, under a hash of all that decides whether it is right: the task, what
Python can read of the new environment, the sources of VMAS and of mappo, and the versions of other packages. Only
steps of their own scenarios are kept: other code may change between two processes without a trace in a reading.
A step is taken only with the machine code with which it was checked, and if the environment holds the same
constants. It is trusted as a compiled library is; see `library_cache`.
"""

import hashlib
import logging
import platform
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._graph_pickler import GraphPickler

from mappo.compute.compiler import PICKLING, Compiled, compile_graph
from mappo.compute.library_cache import add_library, building, find_library, remove_library
from mappo.fast_simulation.pure_step import PureStep
from mappo.fast_simulation.python_state import PythonState
from mappo.fast_simulation.resets import Resets
from mappo.fast_simulation.watch import constant_tensors, differing_tensor

_log = logging.getLogger(__name__)
_SOURCES = "mappo", "vmas"
_VERSIONS = "torchrl", "tensordict", "numpy"
_FILE = "step.pickle"


@dataclass(frozen=True)
class CheckedStep:
    """A step and its resets, which were checked in an environment, and the constants that the environment held."""

    step: PureStep
    resets: Resets
    tensors: dict[str, Tensor]

    def fits(self, reading: PythonState) -> bool:
        """Return whether a new environment, of which this is the reading, holds the same constants."""
        return differing_tensor(constant_tensors(reading, self.step.constants), self.tensors) is None


_Content = tuple[CheckedStep, list[Any], str]  # the signature of the inputs, and the hash of the machine code


def step_name(key: Any, reading: PythonState) -> str | None:
    """Return the name under which the step of a new environment is kept, or None if it is not kept.

    key: tells the task and all that Python can read. reading: of the environment.
    """
    if not reading.packages <= {*_SOURCES}:
        return None
    numerics = torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    return hashlib.sha256(repr((key, numerics, _versions())).encode()).hexdigest()


@cache
def _versions() -> tuple[str, ...]:
    sources = hashlib.sha256()
    for package in _SOURCES:
        root = Path(str(files(package)))
        for file in sorted(root.rglob("*.py")):
            sources.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    return (
        *(sources.hexdigest(), torch.__version__, platform.python_version()),
        *(version(package) for package in _VERSIONS),
    )


def find_step(name: str, reading: PythonState) -> CheckedStep | None:
    """Return the compiled step of this name, if the cache has it and it fits the environment of this reading."""
    directory = find_library(name)
    if directory is None:
        return None
    try:
        content = (directory / _FILE).read_bytes()
        checked, signature, digest = cast(_Content, GraphPickler.loads(content, FakeTensorMode()))
        for graph in (checked.step.graph, *checked.resets.side_effect.graphs):
            graph.recompile()
    except Exception as error:  # a damaged file may raise anything
        _log.warning("a checked step in the cache is damaged, and the step is checked again: %s", error)
        return None
    if not checked.fits(reading):
        return None
    run = compile_graph(
        checked.step.graph, [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in signature]
    )
    if run.digest() != digest:
        _log.info("the step is checked again, because it was checked with other machine code")
        return None
    return replace(checked, step=replace(checked.step, run=run, is_compiled=True))


def keep_step(name: str, checked: CheckedStep) -> None:
    """Add a compiled step to the cache, in place of one of the same name; leave out one for a GPU."""
    run = checked.step.run
    assert isinstance(run, Compiled)
    if (digest := run.digest()) is None:
        return
    content: _Content = replace(checked, step=checked.step.as_graph()), run.signature, digest
    try:
        with building(name) as directory:
            (directory / _FILE).write_bytes(GraphPickler.dumps(content, PICKLING))
            remove_library(name)
            add_library(name, [directory / _FILE])
    except OSError as error:
        _log.warning("the checked step is not kept: %s", error)
