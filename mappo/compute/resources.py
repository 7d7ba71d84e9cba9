"""What this process may use of the machine, and what it did use: CPUs, memory."""

import os
import resource
import sys
from pathlib import Path

import torch

from mappo.compute.cgroups import MEMBERSHIP, ROOT, own_cgroups
from mappo.errors import ConfigError


def cpu_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Whole CPUs that this process may use at once, at least 1.

    The least of the scheduler's affinity mask and of the quotas of the process's cgroup and of those above it
    (versions 1 and 2); a quota of 1.5 CPUs is one whole CPU, as a second thread would be stopped half of the time.
    """
    quotas = [_cpu_quota(directory) for directory in own_cgroups(root, membership, "cpu")]
    return max(1, int(min([_affinity(), *(quota for quota in quotas if quota is not None)])))


def free_memory_bytes(device: torch.device, root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Bytes that this process can still take: on the GPU, or in main memory within its cgroups' limits."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_available_memory()]
    for directory in own_cgroups(root, membership, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            if (bound := _number(directory / limit)) is not None:
                free.append(bound - (_number(directory / used) or 0) + _reclaimable(directory))
    return max(0, min(free))


def require_gpu(gpu_count: str, device: str) -> None:
    """Refuse to leave a GPU idle: if one was asked for, this process must be able to compute on it.

    gpu_count: how many the pod asked for, as text; device: the configuration's.

    Raises:
        ConfigError: GPUs were asked for, and the stage would run on the CPU; the message says why.
    """
    if gpu_count in ("", "0"):
        return
    asked = f"gpu_count = {gpu_count}, and the stage would run on the CPU"
    if device == "cpu":
        raise ConfigError(f"{asked}: device = cpu: set device to auto or cuda, or gpu_count to 0")
    if torch.version.cuda is None and torch.version.hip is None:
        raise ConfigError(
            f"{asked}: torch {torch.__version__} of this image is built without CUDA: give an image made by "
            "`make image VARIANT=cuda`, or set gpu_count to 0"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{asked}: torch {torch.__version__} finds no GPU ({_cuda_trouble()}): check driver and device plugin "
            "of the pod's node, or set gpu_count to 0"
        )


def _cuda_trouble() -> str:
    """Return what CUDA says when it is started."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "CUDA starts, but lists no device"


def peak_memory_bytes() -> int:
    """The most main memory that this process held at once so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_gpu_memory_bytes(device: torch.device) -> int:
    """The most memory that torch's tensors held at once so far on a GPU; 0 elsewhere."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def gibibytes(number: int) -> str:
    """Bytes for people, as in `1.5 GiB`."""
    return f"{number / 2**30:,.2f} GiB"


def _cpu_quota(directory: Path) -> float | None:
    """In CPUs; None without one."""
    try:  # version 2
        quota, period = (directory / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except OSError:
        pass
    version_1, length = _number(directory / "cpu.cfs_quota_us"), _number(directory / "cpu.cfs_period_us")
    return version_1 / length if version_1 and length and version_1 > 0 else None


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # no Linux: all there is
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _reclaimable(directory: Path) -> int:
    """Bytes of page cache that count as used but make room when they are needed."""
    try:
        pairs = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return int(pairs.get("total_inactive_file", pairs.get("inactive_file", 0)))


def _number(file: Path) -> int | None:
    """A file's number; None when there is no such file or it says `max`."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def resolve_device(name: str) -> torch.device:
    """The device meant by `device: auto | cpu | cuda`.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda else " (this build of torch has no CUDA support)"
        raise ConfigError(f"device = 'cuda': no CUDA device is available here{built}; use cpu or auto")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
