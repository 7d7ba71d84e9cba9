"""The containers on this machine: build the image on a base of Debian packages, and run it with podman."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.services import missing

ROOT = Path(__file__).parents[2]
_CAPABILITIES = {"CAP_SETUID": 7, "CAP_SYS_CHROOT": 18, "CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27}
_CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]
cgroupns = "host"
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class Containers:
    """A builder and runner of containers with its own storage."""

    def __init__(self, directory: Path):
        self._directory = directory
        storage = directory / "storage.conf"
        storage.write_text(
            f'[storage]\ndriver = "overlay"\nrunroot = "{directory}/run"\ngraphroot = "{directory}/graph"\n'
        )
        settings = directory / "containers.conf"
        settings.write_text(_CONTAINERS_CONF)
        self._environment = os.environ | {
            "CONTAINERS_STORAGE_CONF": str(storage),
            "CONTAINERS_CONF": str(settings),
            "BUILDAH_ISOLATION": "chroot",
        }

    def call(self, *command: str | Path, seconds: float = 300, status: int = 0) -> str:
        """Run a command and return its output; fail the test if the command ends with another status."""
        result = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert result.returncode == status, f"{command}: status {result.returncode}\n{result.stdout[-4000:]}"
        return result.stdout

    def make_base(self, name: str) -> None:
        """Make a base image of Debian with only Python and its venv module."""
        archive = self._directory / "base.tar"
        packages = "--include=python3,python3-venv,ca-certificates"
        self.call("mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", archive)
        self.call("podman", "import", archive, name)
        archive.unlink()

    def build(self, name: str, base: str) -> None:
        """Run `make image` on a base image, with this machine's sources of Python packages."""
        settings, mounted = _pip()
        conf = self._directory / "pip.conf"
        conf.write_text(settings)
        volumes = " ".join(f"--volume {path}:{path}:ro" for path in mounted)
        self.call(
            "make",
            "image",
            "BUILDER=buildah",
            f"IMAGE={name}",
            f"BASE_IMAGE={base}",
            "TORCH_INDEX=https://pypi.org/simple",
            f"PIP_CONF={conf}",
            f"ARGS={volumes}",
            seconds=900,
        )

    def run(
        self,
        image: str,
        *command: str,
        env: Mapping[str, str] | None = None,
        status: int = 0,
        memory: str = "1g",
    ) -> str:
        """Run a command as Kubernetes does under the restricted standard; return its output.

        Only /tmp is writable. As an emptyDir, it may hold programs.
        """
        options = ["--rm", "--read-only", "--cap-drop=all", "--security-opt=no-new-privileges"]
        options += [
            "--read-only-tmpfs=false",
            "--tmpfs=/tmp:mode=1777,exec",
            "--network=host",
            f"--memory={memory}",
        ]
        options += [f"--env={name}={value}" for name, value in (env or {}).items()]
        return self.call("podman", "run", *options, image, *command, status=status)

    def look(self, image: str, *command: str) -> str:
        """Run another program of the image than its entrypoint; return the output."""
        program, *arguments = command
        return self.call("podman", "run", "--rm", "--network=none", "--entrypoint", program, image, *arguments)

    def remove(self) -> None:
        self.call("podman", "system", "reset", "--force")


def _pip() -> tuple[str, list[Path]]:
    """Return a pip.conf with this machine's configuration of pip, and the files that the configuration names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    values = {
        key.rsplit(".", 1)[1]: value
        for key, value in re.findall(r"^(\S+)='(.*)'$", listed.stdout, re.MULTILINE)
        if key.rsplit(".", 1)[1] in ("cert", "find-links", "index-url", "extra-index-url")
    }
    words = " ".join(values.values()).replace("file://", "").split()
    paths = [Path(word) for word in words if word.startswith("/")]
    paths = [
        path.parent if path.name == "simple" else path for path in paths
    ]  # the files of an index are beside it
    lines = ["[global]", *(f"{key} = {value}" for key, value in values.items())]
    return "\n".join(lines) + "\n", [path for path in paths if path.exists()]


@contextmanager
def containers() -> Iterator[Containers]:
    """Yield containers that are ready to build and run; skip the test if a program or capability is missing."""
    for program in ("buildah", "podman", "runc", "mmdebstrap"):
        if not shutil.which(program):
            missing(program, "sudo apt install --no-install-recommends buildah podman catatonit runc mmdebstrap")
    _require_capabilities()
    directory = Path(tempfile.mkdtemp(prefix="mappo-containers-"))
    runner = Containers(directory)
    try:
        yield runner
    finally:
        runner.remove()
        shutil.rmtree(directory, ignore_errors=True)


def _require_capabilities() -> None:
    """Skip the test if the kernel does not let this process create containers."""
    effective = int(re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)  # type: ignore[index]
    lacking = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        pytest.skip(f"containers need {', '.join(lacking)}: run as root, not in a container of lesser rights")
    with tempfile.TemporaryDirectory() as directory:
        for name in ("lower", "upper", "work", "merged"):
            (Path(directory) / name).mkdir()
        overlay = "lowerdir=lower,upperdir=upper,workdir=work"
        probe = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork"]
        probe += ["mount", "-t", "overlay", "overlay", "-o", overlay, "merged"]
        result = subprocess.run(probe, cwd=directory, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"containers need CAP_SYS_ADMIN for namespaces and overlay mounts: {result.stderr.strip()}")
