"""The lines of VMAS or a scenario that the messages of refusals name."""

import linecache
import sys
from pathlib import Path
from types import FrameType

import torch
import vmas

SKIPPED_FILES = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent),
)  # code that is never reported as the caller


def caller() -> FrameType:
    """Return the frame of VMAS or a scenario that called a function of tensors."""
    frame: FrameType | None = sys._getframe()
    while frame and frame.f_code.co_filename.startswith(SKIPPED_FILES):
        frame = frame.f_back
    assert frame
    return frame


def location() -> str:
    """Return the line of VMAS or a scenario that called a function of tensors."""
    frame = caller()
    return format_location(frame.f_code.co_filename, frame.f_lineno)


def error_location(error: BaseException) -> str:
    """Return the innermost line outside of torch in an error's traceback."""
    location, step = "", error.__traceback__
    while step:
        path = step.tb_frame.f_code.co_filename
        if not path.startswith(SKIPPED_FILES):
            location = format_location(path, step.tb_lineno)
        step = step.tb_next
    return location


def format_location(path: str, line: int) -> str:
    """Return `path:line: source`, with the path relative to site-packages."""
    packages = Path(vmas.__file__).parent.parent
    short_path = Path(path).relative_to(packages) if path.startswith(str(packages)) else Path(path).name
    return f"{short_path}:{line}: {linecache.getline(path, line).strip()}"
