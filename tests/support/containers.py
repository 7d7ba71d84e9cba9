"""Containers on this machine: an image built from a base made of Debian packages, and run with podman."""

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
    """Builds and runs with storage of its own."""

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
        """What a command printed; it must end with this status."""
        done = subprocess.run(
            [str(each) for each in command],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == status, f"{command}: status {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout

    def make_base(self, name: str) -> None:
        """Debian with Python and its venv module, no more."""
        archive = self._directory / "base.tar"
        packages = "--include=python3,python3-venv,ca-certificates"
        self.call("mmdebstrap", "--quiet", "--variant=minbase", packages, "bookworm", archive)
        self.call("podman", "import", archive, name)
        archive.unlink()

    def build(self, name: str, base: str) -> None:
        """`make image` from that base, with this machine's own sources of packages."""
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

    def run(self, image: str, *command: str, env: Mapping[str, str] | None = None, status: int = 0) -> str:
        """Run as Kubernetes would under the restricted standard, with nothing writable but /tmp and 1 GiB."""
        options = ["--rm", "--read-only", "--cap-drop=all", "--security-opt=no-new-privileges", "--memory=1g"]
        options += ["--read-only-tmpfs=false", "--tmpfs=/tmp:mode=1777", "--network=host"]
        options += [f"--env={name}={value}" for name, value in (env or {}).items()]
        return self.call("podman", "run", *options, image, *command, status=status)

    def look(self, image: str, *command: str) -> str:
        """What a command other than the image's own prints in it."""
        program, *arguments = command
        return self.call("podman", "run", "--rm", "--network=none", "--entrypoint", program, image, *arguments)

    def remove(self) -> None:
        self.call("podman", "system", "reset", "--force")


def _pip() -> tuple[str, list[Path]]:
    """A pip.conf that says what pip is told here, and the files of this machine that it names."""
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
    paths = [path.parent if path.name == "simple" else path for path in paths]  # an index; its files are beside it
    lines = ["[global]", *(f"{key} = {value}" for key, value in values.items())]
    return "\n".join(lines) + "\n", [path for path in paths if path.exists()]


@contextmanager
def containers() -> Iterator[Containers]:
    """Ready to build and run, or the test is skipped and says which program or which capability is missing."""
    for program in ("buildah", "podman", "runc", "mmdebstrap"):
        if not shutil.which(program):
            missing(program, "sudo apt install --no-install-recommends buildah podman catatonit runc mmdebstrap")
    _require_capabilities()
    directory = Path(tempfile.mkdtemp(prefix="mappo-containers-"))
    made = Containers(directory)
    try:
        yield made
    finally:
        made.remove()
        shutil.rmtree(directory, ignore_errors=True)


def _require_capabilities() -> None:
    """Skip the test where the kernel does not let this process make containers."""
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
        done = subprocess.run(probe, cwd=directory, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"containers need CAP_SYS_ADMIN to make namespaces and overlay mounts: {done.stderr.strip()}")
