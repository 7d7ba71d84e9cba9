"""The cgroups of this process: the limits that a container sets, and the kernel's counters."""

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def own_cgroups(root: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Yield the directories of this process's cgroup and of its parents, innermost first.

    Both versions of cgroups are supported. Directories that this process cannot see are left out.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", maxsplit=2)
        if controllers and controller not in controllers.split(","):
            continue
        mounts = [root / controller] if controllers else [root / "unified", root]
        for mount in mounts:
            innermost = mount / path.lstrip("/")
            for directory in (innermost, *innermost.parents):
                if directory.is_dir():
                    yield directory
                if directory == mount:
                    break


def num_oom_kills(root: Path = ROOT, membership: Path = MEMBERSHIP) -> int:
    """Return how many processes of this cgroup the kernel has killed for memory; 0 if no counter is visible."""
    for directory in own_cgroups(root, membership, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            try:
                pairs = dict(line.split() for line in (directory / name).read_text().splitlines())
            except OSError:
                continue
            return int(pairs.get("oom_kill", 0))
    return 0
