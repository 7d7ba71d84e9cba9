import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mappo.compute.resources import cpu_limit, free_memory_bytes, gibibytes, peak_memory_bytes
from tests.conftest import CPU


def cgroup(tmp_path, lines, files):
    """Write a process's membership and the directories that it names; return both as arguments."""
    membership = tmp_path / "membership"
    membership.write_text("".join(f"{line}\n" for line in lines))
    for name, content in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return {"root": tmp_path / "root", "membership": membership}


@pytest.fixture
def _many_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))


@pytest.mark.usefixtures("_many_cpus")
@pytest.mark.parametrize(
    ("lines", "files", "limit"),
    [
        (["0::/"], {}, 64),
        (["0::/"], {"cpu.max": "max 100000\n"}, 64),
        (["0::/"], {"cpu.max": "400000 100000\n"}, 4),
        (["0::/pod/a"], {"pod/cpu.max": "300000 100000\n", "pod/a/cpu.max": "max 100000\n"}, 3),
        (["0::/pod"], {"pod/cpu.max": "150000 100000\n"}, 1),
        (["0::/pod"], {"pod/cpu.max": "50000 100000\n"}, 1),
        (["0::/elsewhere"], {"cpu.max": "200000 100000\n"}, 2),  # a container sees its own cgroup as the root
        (
            ["3:cpu,cpuacct:/pod"],
            {"cpu/pod/cpu.cfs_quota_us": "250000\n", "cpu/pod/cpu.cfs_period_us": "100000\n"},
            2,
        ),
        (["3:cpu:/pod"], {"cpu/pod/cpu.cfs_quota_us": "-1\n", "cpu/pod/cpu.cfs_period_us": "100000\n"}, 64),
        (["3:memory:/pod"], {"memory/pod/cpu.max": "100000 100000\n"}, 64),
    ],
)
def test_cpu_limit_is_the_smallest_quota_of_the_process_and_its_parents(tmp_path, lines, files, limit):
    assert cpu_limit(**cgroup(tmp_path, lines, files)) == limit


def test_cpu_limit_is_never_above_the_affinity_mask(tmp_path):
    groups = cgroup(tmp_path, ["0::/"], {"cpu.max": "6400000 100000\n"})
    assert cpu_limit(**groups) == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("lines", "files"),
    [
        (
            ["0::/pod"],
            {"pod/memory.max": "1000\n", "pod/memory.current": "600\n", "pod/memory.stat": "inactive_file 100\n"},
        ),
        (
            ["4:memory:/pod"],
            {
                "memory/pod/memory.limit_in_bytes": "1000\n",
                "memory/pod/memory.usage_in_bytes": "600\n",
                "memory/pod/memory.stat": "total_inactive_file 100\n",
            },
        ),
    ],
)
def test_free_memory_includes_page_cache_within_the_limit_of_the_cgroup(tmp_path, lines, files):
    assert free_memory_bytes(CPU, **cgroup(tmp_path, lines, files)) == 500


def test_free_memory_is_that_of_the_machine_when_there_is_no_limit(tmp_path):
    free = free_memory_bytes(CPU, **cgroup(tmp_path, ["0::/"], {"memory.max": "max\n"}))
    assert 0 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_peak_memory_includes_memory_that_is_freed():
    script = (
        "import torch; from mappo.compute.resources import peak_memory_bytes as peak; "
        "tensor = torch.ones(300_000_000); first = peak(); del tensor; print(first, peak())"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    with_tensor, without_tensor = map(int, process.stdout.split())
    assert 1.2e9 < with_tensor < 2.5e9
    assert without_tensor >= with_tensor
    assert peak_memory_bytes() >= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_gibibytes_are_formatted_with_two_decimals():
    assert gibibytes(3 * 2**29) == "1.50 GiB"


def make_cpu_cgroup():
    """Make a cgroup (version 1 or 2) with a CPU quota of one CPU, or return None if this process may not."""
    for parent, quota in ((Path("/sys/fs/cgroup/cpu"), "cfs"), (Path("/sys/fs/cgroup"), "max")):
        directory = parent / f"mappo-test-{os.getpid()}"
        try:
            directory.mkdir()
            if quota == "cfs":
                (directory / "cpu.cfs_quota_us").write_text("100000")
            else:
                (directory / "cpu.max").write_text("100000 100000")
        except OSError:
            if directory.is_dir():
                directory.rmdir()
            continue
        return directory
    return None


def test_cpu_limit_follows_a_real_cpu_quota(tiny, tmp_path):
    """In a cgroup with a quota of one CPU, the limit is one CPU."""
    directory = make_cpu_cgroup()
    if directory is None:
        pytest.skip(
            "this process may not make a cgroup with a CPU quota (needs root and a writable /sys/fs/cgroup)"
        )
    script = (
        f"import os; open('{directory}/cgroup.procs', 'w').write(str(os.getpid())); "
        "from mappo.compute.resources import cpu_limit; print(cpu_limit())"
    )
    try:
        process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    finally:
        directory.rmdir()
    assert process.stdout == "1\n"


def test_peak_gpu_memory_is_zero_on_a_cpu():
    from mappo.compute.resources import peak_gpu_memory_bytes

    assert peak_gpu_memory_bytes(torch.device("cpu")) == 0
