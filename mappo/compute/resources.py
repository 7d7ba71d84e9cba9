"""The CPUs and the memory that this process may use, and the memory that it has used.

Only functions of a GPU import torch, which takes seconds, so that look-ups can use the others.
"""

import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mappo.compute.cgroups import MEMBERSHIP, ROOT, own_cgroups
from mappo.errors import ConfigError

if TYPE_CHECKING:
    import torch


def cpu_limit(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Return the number of whole CPUs that this process may use at once, at least 1.

    The limit is the smallest of the scheduler's affinity mask and the CPU quotas of the process's cgroup and
    its parents (versions 1 and 2). A quota of 1.5 CPUs counts as one CPU: a second thread would be stopped
    half of the time.
    """
    quotas = [_cpu_quota(directory) for directory in own_cgroups(root, membership, "cpu")]
    return max(1, int(min([_affinity(), *(quota for quota in quotas if quota is not None)])))


def free_memory_bytes(device: "torch.device", root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Return the bytes that this process can still allocate on a device: on the GPU, or in main memory.

    The limits of the process's cgroups bound main memory.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    free = [_available_memory()]
    for directory in own_cgroups(root, membership, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            if (bound := _number(directory / limit)) is not None:
                free.append(bound - (_number(directory / used) or 0) + _reclaimable(directory))
    return max(0, min(free))


def require_gpu(gpu_count: str, device: str) -> None:
    """Raise if the pod requested a GPU and this process cannot compute on it, so that no GPU stays idle.

    gpu_count: the number of GPUs that the pod requested, as text. device: the configuration's `device`.

    Raises:
        ConfigError: the pod requested GPUs, but the stage would run on the CPU; the message names the cause.
    """
    if gpu_count in ("", "0"):
        return
    problem = f"gpu_count = {gpu_count}, and the stage would run on the CPU"
    if device == "cpu":
        raise ConfigError(f"{problem}: device = cpu: set device to auto or cuda, or gpu_count to 0")
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        raise ConfigError(
            f"{problem}: torch {torch.__version__} of this image is built without CUDA: use an image built by "
            "`make image VARIANT=cuda`, or set gpu_count to 0"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{problem}: torch {torch.__version__} finds no GPU ({_cuda_error()}): check the driver and the "
            "device plugin of the pod's node, or set gpu_count to 0"
        )


def _cuda_error() -> str:
    """Initialise CUDA and return its error message."""
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "CUDA starts, but it lists no device"


def peak_memory_bytes() -> int:
    """Return the largest amount of main memory that this process has held at once so far."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux reports KiB, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_gpu_memory_bytes(device: "torch.device") -> int:
    """Return the largest amount of memory that torch's tensors have held at once on a GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    import torch

    return torch.cuda.max_memory_allocated(device)


def gibibytes(number: int) -> str:
    """Format a number of bytes for people, for example `1.50 GiB`."""
    return f"{number / 2**30:,.2f} GiB"


def _cpu_quota(directory: Path) -> float | None:
    """Return a cgroup's CPU quota in CPUs, or None without a quota."""
    try:  # version 2
        quota, period = (directory / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except OSError:
        pass
    quota_us, period_us = _number(directory / "cpu.cfs_quota_us"), _number(directory / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us and period_us and quota_us > 0 else None


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available_memory() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: the machine's whole memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _reclaimable(directory: Path) -> int:
    """Return the bytes of page cache that count as used, but that the kernel frees when memory is needed."""
    try:
        pairs = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    return int(pairs.get("total_inactive_file", pairs.get("inactive_file", 0)))


def _number(file: Path) -> int | None:
    """Return the number in a file, or None if the file is missing or contains `max`."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return None if text == "max" else int(text)


def resolve_device(name: str) -> "torch.device":
    """Return the device that `device: auto | cpu | cuda` names.

    Raises:
        ConfigError: `cuda` is configured, but no CUDA device is available.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        cause = "" if torch.version.cuda else " (this build of torch has no CUDA support)"
        raise ConfigError(f"device = 'cuda': no CUDA device is available on this machine{cause}; use cpu or auto")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)
