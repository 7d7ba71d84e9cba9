"""Read and check a site's file: the YAML with its settings for the pods of pipelines."""

import re
from collections.abc import Mapping
from dataclasses import field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from mappo.config import merged
from mappo.errors import ConfigError, StoreError
from mappo.runs.locations import bucket_of
from mappo.strict_json import STRICT, checked, to_dict
from mappo.strict_yaml import read_values
from pipelines.kubernetes_types import (
    AnnotationKey,
    Cpu,
    GpuType,
    Labels,
    Memory,
    Name,
    NodeAffinity,
    Toleration,
    UserId,
    amount_of,
    require_image,
)

_LONGEST_WAIT_SECONDS = 86_400


def _require_endpoint(url: str) -> str:
    return _require_url("minio_endpoint", url, "http://seaweedfs.kubeflow:9000")


def _require_ui(url: str) -> str:
    return _require_url("kubeflow_url", url, "https://kubeflow.example.org/pipeline")


def _require_url(name: str, url: str, example: str) -> str:
    """Return the URL if it is one; no message shows it, since it may hold a password."""
    if "@" in url:
        raise ConfigError(f"{name}: must hold no user and no password; they belong into a secret")
    try:
        parts = urlsplit(url)
        is_plain = not (parts.query or parts.fragment or re.search(r"[^!-~]", url))
        is_usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and is_plain
    except ValueError:
        is_usable = False
    if not is_usable:
        raise ConfigError(f"{name}: must be a URL, such as {example}")
    return url


@dataclass(frozen=True, config=STRICT)
class StagePod:
    """The settings of one stage's pods. A run's parameters can change the fields up to `node_affinity`."""

    cpu: Annotated[Cpu, Field(description="CPU cores: both request and limit")] = "2"
    memory: Annotated[Memory, Field(description="memory: both request and limit")] = "4Gi"
    gpu_type: Annotated[GpuType, Field(description="resource name of the GPU")] = "nvidia.com/gpu"
    gpu_count: Annotated[int, Field(ge=0, le=64, description="number of GPUs; 0 to run on the CPU")] = 0
    node_selector: Annotated[Labels, Field(description="labels a node must have")] = field(default_factory=dict)
    tolerations: Annotated[list[Toleration], Field(description="taints of nodes that the pod tolerates")] = field(
        default_factory=list
    )
    node_affinity: Annotated[NodeAffinity, Field(description="required and preferred nodes")] = field(
        default_factory=NodeAffinity
    )
    shm: Annotated[Memory | None, Field(description="size of /dev/shm; null for the node's default")] = None
    timeout_seconds: Annotated[int, Field(ge=0, lt=2**31, description="time limit of a pod; 0 for none")] = 0
    retries: Annotated[int, Field(ge=0, le=100, description="retries in total, of processes and of pods")] = 0
    backoff_seconds: Annotated[
        int, Field(ge=1, le=_LONGEST_WAIT_SECONDS, description="seconds before the first retry")
    ] = 30
    backoff_factor: Annotated[int, Field(ge=1, le=10, description="growth of that time with each retry")] = 2

    def __post_init__(self) -> None:
        """Refuse a /dev/shm larger than the memory, which would get the pod killed, and absurdly long waits.

        Raises:
            ConfigError: /dev/shm does not fit in memory, or the wait before the last retry is longer than a day.
        """
        if self.shm and _in_bytes(self.shm) > _in_bytes(self.memory):
            raise ConfigError(
                f"shm = {self.shm}, memory = {self.memory}: /dev/shm counts as memory, and must fit in it"
            )
        longest = self.backoff_seconds * self.backoff_factor ** max(0, self.retries - 1)
        if longest > _LONGEST_WAIT_SECONDS:
            raise ConfigError(
                f"retries = {self.retries}, backoff_seconds = {self.backoff_seconds}, backoff_factor = "
                f"{self.backoff_factor}: the last wait would be {longest:.0e} s; at most {_LONGEST_WAIT_SECONDS} s"
            )


def _in_bytes(memory: str) -> Decimal:
    amount = amount_of(memory)
    assert amount is not None  # guaranteed by the type Memory
    return amount


def _small_pod() -> StagePod:
    return StagePod(cpu="1", memory="2Gi", timeout_seconds=600, retries=2)


def _require_bucket(location: str) -> str:
    """Return the location if it is a prefix in a bucket, which every pod can reach."""
    try:
        bucket_of(location)
    except StoreError as error:
        raise ConfigError(f"compiled_code: {error}") from None
    return location


@dataclass(frozen=True, config=STRICT)
class StagePods:
    """The settings of the pods of every stage."""

    validate: StagePod = field(default_factory=lambda: StagePod(timeout_seconds=1800, retries=1))
    train: StagePod = field(default_factory=lambda: StagePod(cpu="4", memory="8Gi", shm="1Gi", retries=3))
    evaluate: StagePod = field(default_factory=lambda: StagePod(timeout_seconds=3600, retries=2))
    compare: StagePod = field(default_factory=_small_pod)
    prepare: StagePod = field(default_factory=_small_pod)
    tune: StagePod = field(default_factory=lambda: StagePod(cpu="4", memory="8Gi", shm="1Gi", retries=3))
    choose: StagePod = field(default_factory=_small_pod)
    promote: StagePod = field(default_factory=lambda: StagePod(timeout_seconds=3600, retries=2))
    report: StagePod = field(default_factory=_small_pod)
    cell: StagePod = field(default_factory=lambda: StagePod(cpu="4", memory="8Gi", shm="1Gi", retries=3))
    summarise: StagePod = field(default_factory=_small_pod)
    notify: StagePod = field(default_factory=lambda: StagePod(cpu="1", memory="2Gi", timeout_seconds=600))


@dataclass(frozen=True, config=STRICT)
class Site:
    """The settings of a site. The defaults need no GPU, no secret and no label."""

    image: Annotated[str, AfterValidator(require_image)] | None = None
    image_pull_secret: Name = "mappo-registry"  # noqa: S105  (names of secrets)
    s3_secret: Name = "mappo-s3"  # noqa: S105
    database_secret: Name = "mappo-database"  # noqa: S105
    minio_endpoint: Annotated[str, AfterValidator(_require_endpoint)] | None = None
    notify_secret: Name | None = None
    kubeflow_url: Annotated[str, AfterValidator(_require_ui)] | None = None
    compiled_code: Annotated[str, AfterValidator(_require_bucket)] | None = None
    pod_labels: Labels = field(default_factory=dict)
    pod_annotations: dict[AnnotationKey, str] = field(default_factory=dict)
    run_as_user: UserId | None = None
    run_as_group: UserId | None = None
    run_as_non_root: bool | None = True  # required by the restricted Pod Security Standard
    stages: StagePods = field(default_factory=StagePods)

    def __post_init__(self) -> None:
        """Refuse user 0 in a pod that must not run as root, which a node would not start.

        Raises:
            ConfigError: `run_as_user` is 0 and `run_as_non_root` is true.
        """
        if self.run_as_user == 0 and self.run_as_non_root:
            raise ConfigError("run_as_user = 0: run_as_non_root = true forbids root; give another user")


def check_site(values: Mapping[str, Any]) -> Site:
    """Return a site with these settings, and with defaults for the others.

    Raises:
        ConfigError: a key is unknown or a value is not allowed; the message has one line for each.
    """
    return checked(Site, merged(to_dict(Site()), values))


def read_site(path: Path) -> Site:
    """Read a site's file; settings that it omits keep their defaults.

    Raises:
        ConfigError: the file is not YAML, a key is unknown or appears twice, or a value is not allowed; the
            message names the file and the field.
        OSError: the file cannot be read.
    """
    return read_values(path, check_site)
