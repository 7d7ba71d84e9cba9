"""The guards around a plain step: they refuse what no trace can repeat, before the step is traced."""

import ast
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from mappo.errors import NotFaithful
from mappo.fast_simulation.source_lines import SKIPPED_FILES, format_location
from mappo.fast_simulation.tracing import MOST_OPERATIONS

_STANDARD_LIBRARY = str(Path(ast.__file__).parent) + "/"


@contextmanager
def few_operations() -> Iterator[None]:
    """Raise NotFaithful if there are too many operations on tensors in the block to trace them."""
    with _FewOperations():  # type: ignore[no-untyped-call]
        yield


class _FewOperations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count > MOST_OPERATIONS:
            raise NotFaithful(f"a step has more than {MOST_OPERATIONS} operations")
        return func(*args, **(kwargs or {}))


_OUTSIDE = {  # modules of C functions that read what no walk through a scenario finds, such as the clock
    *("time", "datetime", "_datetime", "posix", "nt", "io", "_io", "_socket", "_uuid"),
}


@contextmanager
def no_outside_reads() -> Iterator[None]:
    """Raise NotFaithful at the end of the block if Python has read the clock, a file or the system in it."""
    reads: list[str] = []

    def note(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and not reads:
            owner = getattr(function, "__self__", None)
            module = getattr(function, "__module__", None) or getattr(owner, "__module__", "")
            if module in _OUTSIDE and function.__name__ != "fspath" and not _is_from_torch(frame):
                reads.append(f"{module}.{function.__name__}, {_location_of(frame)}")

    previous, is_collecting = sys.getprofile(), gc.isenabled()
    gc.disable()  # a collection of garbage may call functions that have nothing to do with the scenario
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(previous)
        if is_collecting:
            gc.enable()
    if reads:
        raise NotFaithful(f"a step reads something outside of the simulation: {reads[0]}")


def _is_from_torch(frame: FrameType) -> bool:
    """Return whether torch's or the standard library's own work leads to this call."""
    found: FrameType | None = frame
    while found and _is_standard(found):
        found = found.f_back
    return found is None or found.f_code.co_filename.startswith((*SKIPPED_FILES, "<"))


def _is_standard(frame: FrameType) -> bool:
    """Return whether a frame belongs to Python's standard library."""
    path = frame.f_code.co_filename
    return path.startswith(_STANDARD_LIBRARY) and "-packages/" not in path.removeprefix(_STANDARD_LIBRARY)


def _location_of(frame: FrameType) -> str:
    found: FrameType | None = frame
    while found and found.f_back and _is_standard(found):
        found = found.f_back
    assert found
    return format_location(found.f_code.co_filename, found.f_lineno)
