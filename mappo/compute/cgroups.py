"""The cgroups of this process: limits that a container sets, and what the kernel counts there."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def own_cgroups(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Yield the directories of this process's cgroup and of those above it, in both versions, where visible."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [root / controller] if controllers else [root / "unified", root]
        for mount in mounts:
            own = mount / path.lstrip("/")
            for directory in (own, *own.parents):
                if directory.is_dir():
                    yield directory
                if directory == mount:
                    break


def num_oom_kills(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Return how many processes of this cgroup the kernel has killed for memory; 0 where nothing counts."""
    for directory in own_cgroups(root, membership, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            try:
                pairs = dict(line.split() for line in (directory / name).read_text().splitlines())
            except OSError:
                continue
            return int(pairs.get("oom_kill", 0))
    return 0
