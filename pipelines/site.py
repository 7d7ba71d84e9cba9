"""What a site decides about the pods of its pipelines: one YAML file that it keeps, checked strictly."""

import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, JsonValue
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from mappo.config import ConfigError, checked, merged, to_dict

_LONGEST_WAIT_SECONDS = 86_400
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_IMAGE = re.compile(r"[^\s@:]+(:\d+)?(/[^\s@:]+)*(:[\w][\w.-]{0,127}|@sha256:[0-9a-f]{64})")
_CPU = re.compile(r"(?!0*\.?0*$)([1-9][0-9]*m|[0-9]+(\.[0-9]+)?)")
_MEMORY = re.compile(r"[1-9][0-9]*(\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"({_NAME.pattern}/)?{_WORD}")
_GPU_TYPE = re.compile(rf"{_NAME.pattern}/{_WORD}")
_LABEL_VALUE = re.compile(rf"({_WORD})?")


def require_image(image: str) -> str:
    """The image, if it says which one it is.

    Raises:
        ConfigError: it has neither a tag nor a digest, or is no image's name.
    """
    if not _IMAGE.fullmatch(image):
        raise ConfigError(f"image {image!r}: must be NAME:TAG or NAME@sha256:DIGEST")
    return image


def _bytes(amount: str) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)(\w+)", amount).groups()  # type: ignore[union-attr]
    power = "kMGT".index(unit[0].replace("K", "k")) + 1
    return float(float(number) * (1024 if unit.endswith("i") else 1000) ** power)


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _matching(pattern: re.Pattern[str], words: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f"must be {words}")
        return text

    return AfterValidator(check)


Cpu = Annotated[str, BeforeValidator(_as_text), _matching(_CPU, "a number of cores, such as 2, 0.5 or 500m")]
Memory = Annotated[str, _matching(_MEMORY, "an amount of memory, such as 512Mi or 8Gi")]
Name = Annotated[str, _matching(_NAME, "a Kubernetes name: lower-case letters, digits, hyphens and dots")]
LabelKey = Annotated[str, _matching(_LABEL_KEY, "a Kubernetes label's key, such as example.org/team")]
LabelValue = Annotated[str, _matching(_LABEL_VALUE, "a Kubernetes label's value, up to 63 characters")]
GpuType = Annotated[str, _matching(_GPU_TYPE, "a resource name, such as nvidia.com/gpu")]
Labels = dict[LabelKey, LabelValue]


class Toleration(TypedDict, total=False):
    """A toleration as in a pod's specification."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    key: str
    operator: Literal["Equal", "Exists"]
    value: str
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]
    tolerationSeconds: int


class NodeAffinity(TypedDict, total=False):
    """A node affinity as in a pod's specification."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    requiredDuringSchedulingIgnoredDuringExecution: dict[str, JsonValue]
    preferredDuringSchedulingIgnoredDuringExecution: list[JsonValue]


@dataclass(frozen=True, config=_STRICT)
class Stage:
    """The pods of one stage. Fields up to `node_affinity` are what a run's parameters can change."""

    cpu: Annotated[Cpu, Field(description="CPU cores, as requested and as limit")] = "2"
    memory: Annotated[Memory, Field(description="memory, as requested and as limit")] = "4Gi"
    gpu_type: Annotated[GpuType, Field(description="resource name of the GPU")] = "nvidia.com/gpu"
    gpu_count: Annotated[int, Field(ge=0, le=64, description="how many GPUs; 0 to run on the CPU")] = 0
    node_selector: Annotated[Labels, Field(description="labels a node must have")] = field(default_factory=dict)
    tolerations: Annotated[list[Toleration], Field(description="taints of nodes that do not keep it away")] = (
        field(default_factory=list)
    )
    node_affinity: Annotated[NodeAffinity, Field(description="required and preferred nodes")] = field(
        default_factory=NodeAffinity
    )
    shm: Annotated[Memory | None, Field(description="size of /dev/shm; null for the node's default")] = None
    timeout_seconds: Annotated[int, Field(ge=0, description="a pod is ended after this time; 0 for never")] = 0
    retries: Annotated[int, Field(ge=0, le=100, description="how often a failed pod is tried again")] = 0
    backoff_seconds: Annotated[int, Field(ge=1, description="before the first retry")] = 30
    backoff_factor: Annotated[int, Field(ge=1, le=10, description="each wait is so many times the last")] = 2

    def __post_init__(self) -> None:
        """The last wait must not be absurd; what Kubernetes would refuse, or end a pod for, is found here."""
        if self.shm and _bytes(self.shm) > _bytes(self.memory):
            raise ConfigError(
                f"shm = {self.shm}, memory = {self.memory}: /dev/shm counts as memory, and must fit in it"
            )
        for toleration in self.tolerations:
            if toleration.get("operator") == "Exists" and toleration.get("value"):
                raise ConfigError("tolerations: operator Exists takes no value; leave it out, or use Equal")
        longest = self.backoff_seconds * self.backoff_factor ** max(0, self.retries - 1)
        if longest > _LONGEST_WAIT_SECONDS:
            raise ConfigError(
                f"retries = {self.retries}, backoff_seconds = {self.backoff_seconds}, backoff_factor = "
                f"{self.backoff_factor}: the last wait would be {longest:.0e} s; at most {_LONGEST_WAIT_SECONDS} s"
            )


def _small() -> Stage:
    return Stage(cpu="1", memory="2Gi", timeout_seconds=600, retries=2)


@dataclass(frozen=True, config=_STRICT)
class Stages:
    """Every stage's pods."""

    validate: Stage = field(default_factory=lambda: Stage(timeout_seconds=1800, retries=1))
    train: Stage = field(default_factory=lambda: Stage(cpu="4", memory="8Gi", shm="1Gi", retries=3))
    evaluate: Stage = field(default_factory=lambda: Stage(timeout_seconds=3600, retries=2))
    compare: Stage = field(default_factory=_small)
    prepare: Stage = field(default_factory=_small)
    tune: Stage = field(default_factory=lambda: Stage(cpu="4", memory="8Gi", shm="1Gi", retries=3))
    choose: Stage = field(default_factory=_small)
    promote: Stage = field(default_factory=lambda: Stage(timeout_seconds=3600, retries=2))
    report: Stage = field(default_factory=_small)


@dataclass(frozen=True, config=_STRICT)
class Site:
    """Everything a site decides; its defaults need no GPU, no secret and no label."""

    image: Annotated[str, AfterValidator(require_image)] | None = None
    image_pull_secret: Name = "mappo-registry"  # noqa: S105  (names of secrets)
    s3_secret: Name = "mappo-s3"  # noqa: S105
    database_secret: Name = "mappo-database"  # noqa: S105
    pod_labels: Labels = field(default_factory=dict)
    pod_annotations: dict[str, str] = field(default_factory=dict)
    run_as_user: Annotated[int, Field(ge=0)] | None = None
    run_as_group: Annotated[int, Field(ge=0)] | None = None
    run_as_non_root: bool | None = True  # as the restricted Pod Security Standard asks for
    stages: Stages = field(default_factory=Stages)


def check_site(values: Mapping[str, Any]) -> Site:
    """A site with these choices, and defaults for the rest.

    Raises:
        ConfigError: one line for each key that is unknown and each value that is not allowed.
    """
    return checked(Site, merged(to_dict(Site()), values))


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no key may appear twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"line {node.start_mark.line + 1}: {', '.join(twice)}: given more than once")
        return super().construct_mapping(node, deep)


def read_site(path: Path) -> Site:
    """The site's file; what it leaves out keeps its default.

    Raises:
        ConfigError: not YAML, a key twice or unknown, or a value that is not allowed; names file and field.
        OSError: it cannot be read.
    """
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)  # noqa: S506  (a safe loader)
        if not isinstance(values, dict):
            raise ConfigError("must hold keys and values")
        return check_site(values)
    except TypeError as error:  # a date, or keys that are no text
        raise ConfigError(f"{path}: write it in quotes: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
