"""Read what a site decides about the pods of its pipelines: one YAML file that it keeps, checked strictly."""

import re
from collections.abc import Mapping
from dataclasses import field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from mappo.config import merged
from mappo.errors import ConfigError
from mappo.strict_json import checked, to_dict

_LONGEST_WAIT_SECONDS = 86_400
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_LARGEST_ID = 2**31 - 1  # of users and groups, as Kubernetes takes them
_LARGEST_DEPTH, _LARGEST_NODES = 50, 10_000  # of a site's YAML, with aliases written out
_SHOWN = 60  # characters of a value in a message

# Images as containers' runtimes read them: only the host may have capitals, and a path has no empty part.
_HOST = r"([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:]+\])"
_PATH = r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = r"(sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128})"
_IMAGE = re.compile(rf"(?P<name>({_HOST}(:[0-9]+)?/)?{_PATH}(/{_PATH})*)(:{_TAG}(@{_DIGEST})?|@{_DIGEST})")
_LONGEST_IMAGE_NAME = 255

_QUANTITY = re.compile(
    r"\+?(?P<number>[0-9]+\.?[0-9]*|\.[0-9]+)(?P<suffix>[KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,3})?"
)
_DECIMAL_POWERS = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_SMALLEST_MEMORY, _LARGEST_QUANTITY = 2**20, 2**63 - 1
_LARGEST_CPU = 10_000

_DNS_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"(?=.{{1,253}}(/|$)){_DNS_LABEL}(\.{_DNS_LABEL})*"
_NAME = re.compile(_SUBDOMAIN)
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"({_SUBDOMAIN}/)?{_WORD}")
_ANNOTATION_KEY = re.compile(_LABEL_KEY.pattern, re.IGNORECASE)
_GPU_TYPE = re.compile(rf"{_SUBDOMAIN}/{_WORD}")
_LABEL_VALUE = re.compile(rf"({_WORD})?")
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def require_image(image: str) -> str:
    """Return the image if Kubernetes can pull it and it says which one it is.

    Raises:
        ConfigError: it has neither a tag nor a digest, or it is not the name of an image.
    """
    match = _IMAGE.fullmatch(image)
    if not match or len(match["name"]) > _LONGEST_IMAGE_NAME:
        hint = "; after the host, a name has small letters only" if image != image.lower() else ""
        raise ConfigError(f"image {_cut(image)!r}: must be NAME:TAG, NAME@sha256:DIGEST or both{hint}")
    return image


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _amount(text: str) -> Decimal | None:
    """Return the number that a quantity of Kubernetes stands for; None if it is not one."""
    match = _QUANTITY.fullmatch(text)
    if not match:
        return None
    number, suffix = Decimal(match["number"]), match["suffix"] or ""
    if suffix.endswith("i"):
        return number * Decimal(1024 ** ("KMGTPE".index(suffix[0]) + 1))
    power = _DECIMAL_POWERS[suffix] if suffix in _DECIMAL_POWERS else int(suffix[1:])
    return number.scaleb(power)


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _within(lowest: Decimal | int, highest: int, words: str) -> AfterValidator:
    def check(text: str) -> str:
        amount = _amount(text)
        if amount is None or not lowest <= amount <= highest:
            raise ValueError(f"must be {words}")
        return text

    return AfterValidator(check)


def _matching(pattern: re.Pattern[str], words: str) -> AfterValidator:
    def check(text: str) -> str:
        if not pattern.fullmatch(text):
            raise ValueError(f"must be {words}")
        return text

    return AfterValidator(check)


def _require_endpoint(url: str) -> str:
    parts = urlsplit(url)
    is_plain = not (parts.query or parts.fragment or re.search(r"[^!-~]", url))
    if "@" in url:
        raise ConfigError("minio_endpoint: must hold no user and no password; they belong into a secret")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0 or not is_plain:
        raise ValueError("must be a URL, such as http://seaweedfs.kubeflow:9000")
    return url


Cpu = Annotated[
    str,
    BeforeValidator(_as_text),
    _within(Decimal("0.001"), _LARGEST_CPU, f"a number of cores up to {_LARGEST_CPU}, such as 2, 0.5 or 500m"),
]
Memory = Annotated[
    str,
    BeforeValidator(_as_text),
    _within(_SMALLEST_MEMORY, _LARGEST_QUANTITY, "an amount of memory of 1Mi or more, such as 512Mi or 8Gi"),
]
Name = Annotated[str, _matching(_NAME, "a Kubernetes name: lower-case letters, digits, hyphens and dots")]
LabelKey = Annotated[str, _matching(_LABEL_KEY, "a Kubernetes label's key, such as example.org/team")]
AnnotationKey = Annotated[str, _matching(_ANNOTATION_KEY, "an annotation's key, such as example.org/team")]
LabelValue = Annotated[str, _matching(_LABEL_VALUE, "a Kubernetes label's value, up to 63 characters")]
GpuType = Annotated[str, _matching(_GPU_TYPE, "a resource name, such as nvidia.com/gpu")]
UserId = Annotated[int, Field(ge=0, le=_LARGEST_ID)]
Labels = dict[LabelKey, LabelValue]


class _Toleration(TypedDict, total=False):
    """A toleration as in a pod's specification."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    key: Annotated[str, _matching(re.compile(f"({_LABEL_KEY.pattern})?"), "a Kubernetes label's key")]
    operator: Literal["Equal", "Exists", ""]
    value: LabelValue
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute", ""]
    tolerationSeconds: Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _check_toleration(toleration: _Toleration) -> _Toleration:
    is_exists = toleration.get("operator") == "Exists"
    if is_exists and toleration.get("value"):
        raise ValueError("operator Exists takes no value; leave it out, or use Equal")
    if not is_exists and not toleration.get("key"):
        raise ValueError("operator Equal needs a key; give one, or use operator Exists to tolerate every taint")
    if "tolerationSeconds" in toleration and toleration.get("effect") != "NoExecute":
        raise ValueError("tolerationSeconds needs effect NoExecute; give that effect, or leave it out")
    return toleration


Toleration = Annotated[_Toleration, AfterValidator(_check_toleration)]
_NUM_VALUES: dict[str, tuple[int, float]] = {  # how many values an operator takes
    "In": (1, float("inf")),
    "NotIn": (1, float("inf")),
    "Exists": (0, 0),
    "DoesNotExist": (0, 0),
    "Gt": (1, 1),
    "Lt": (1, 1),
}


class _Expression(TypedDict):
    """A requirement on a label of a node."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    values: NotRequired[list[LabelValue]]


def _check_expression(expression: _Expression) -> _Expression:
    operator, values = expression["operator"], expression.get("values", [])
    lowest, highest = _NUM_VALUES[operator]
    if not lowest <= len(values) <= highest:
        wanted = "no values" if highest == 0 else "one value" if highest == 1 else "at least one value"
        raise ValueError(f"operator {operator} takes {wanted}")
    if operator in ("Gt", "Lt") and not _INTEGER.fullmatch(values[0]):
        raise ValueError(f"operator {operator} takes a whole number, as text")
    return expression


class _NodeField(TypedDict):
    """A requirement on the name of a node."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    key: Literal["metadata.name"]
    operator: Literal["In", "NotIn"]
    values: Annotated[list[Name], Field(min_length=1, max_length=1)]


class _NodeTerm(TypedDict, total=False):
    """Requirements that a node meets all of."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    matchExpressions: list[Annotated[_Expression, AfterValidator(_check_expression)]]
    matchFields: list[_NodeField]


class _NodeSelector(TypedDict):
    """Terms of which a node meets one."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    nodeSelectorTerms: Annotated[list[_NodeTerm], Field(min_length=1)]


class _Preference(TypedDict):
    """A term that counts in favour of a node."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    weight: Annotated[int, Field(ge=1, le=100)]
    preference: _NodeTerm


class NodeAffinity(TypedDict, total=False):
    """A node affinity as in a pod's specification."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]
    requiredDuringSchedulingIgnoredDuringExecution: _NodeSelector
    preferredDuringSchedulingIgnoredDuringExecution: list[_Preference]


@dataclass(frozen=True, config=_STRICT)
class StagePod:
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
    retries: Annotated[int, Field(ge=0, le=100, description="further attempts in all, of processes and pods")] = 0
    backoff_seconds: Annotated[int, Field(ge=1, description="before the first retry")] = 30
    backoff_factor: Annotated[int, Field(ge=1, le=10, description="each wait is so many times the last")] = 2

    def __post_init__(self) -> None:
        """The last wait must not be absurd; what Kubernetes would refuse, or end a pod for, is found here."""
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
    amount = _amount(memory)
    assert amount is not None  # the type Memory has checked it
    return amount


def _small() -> StagePod:
    return StagePod(cpu="1", memory="2Gi", timeout_seconds=600, retries=2)


@dataclass(frozen=True, config=_STRICT)
class StagePods:
    """Every stage's pods."""

    validate: StagePod = field(default_factory=lambda: StagePod(timeout_seconds=1800, retries=1))
    train: StagePod = field(default_factory=lambda: StagePod(cpu="4", memory="8Gi", shm="1Gi", retries=3))
    evaluate: StagePod = field(default_factory=lambda: StagePod(timeout_seconds=3600, retries=2))
    compare: StagePod = field(default_factory=_small)
    prepare: StagePod = field(default_factory=_small)
    tune: StagePod = field(default_factory=lambda: StagePod(cpu="4", memory="8Gi", shm="1Gi", retries=3))
    choose: StagePod = field(default_factory=_small)
    promote: StagePod = field(default_factory=lambda: StagePod(timeout_seconds=3600, retries=2))
    report: StagePod = field(default_factory=_small)


@dataclass(frozen=True, config=_STRICT)
class Site:
    """The decisions of a site; their defaults need no GPU, no secret and no label."""

    image: Annotated[str, AfterValidator(require_image)] | None = None
    image_pull_secret: Name = "mappo-registry"  # noqa: S105  (names of secrets)
    s3_secret: Name = "mappo-s3"  # noqa: S105
    database_secret: Name = "mappo-database"  # noqa: S105
    minio_endpoint: Annotated[str, AfterValidator(_require_endpoint)] | None = None
    pod_labels: Labels = field(default_factory=dict)
    pod_annotations: dict[AnnotationKey, str] = field(default_factory=dict)
    run_as_user: UserId | None = None
    run_as_group: UserId | None = None
    run_as_non_root: bool | None = True  # as the restricted Pod Security Standard asks for
    stages: StagePods = field(default_factory=StagePods)

    def __post_init__(self) -> None:
        """Refuse what the node would: user 0 in a pod that must not run as root."""
        if self.run_as_user == 0 and self.run_as_non_root:
            raise ConfigError("run_as_user = 0: run_as_non_root = true forbids root; give another user")


def check_site(values: Mapping[str, Any]) -> Site:
    """A site with these choices, and defaults for the rest.

    Raises:
        ConfigError: one line for each key that is unknown and each value that is not allowed.
    """
    return checked(Site, merged(to_dict(Site()), values))


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which no key may appear twice."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ConfigError:
            raise
        except ValueError:
            where = f"line {node.start_mark.line + 1}: {_cut(str(node.value))!r}"
            raise ConfigError(f"{where}: reads like a number or a date and is none; write it in quotes") from None

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        keys = [self.construct_object(key, deep=True) for key in own]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"line {node.start_mark.line + 1}: {', '.join(twice)}: given more than once")
        return super().construct_mapping(node, deep)


def _require_small(values: Any) -> None:
    """Refuse what is nested or repeated beyond reason, as by aliases of aliases or one that holds itself."""
    waiting, num_nodes = [(values, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        num_nodes += 1
        if depth > _LARGEST_DEPTH:
            raise ConfigError(f"nested more than {_LARGEST_DEPTH} deep, or an alias holds itself")
        if num_nodes > _LARGEST_NODES:
            raise ConfigError(f"more than {_LARGEST_NODES} values, with aliases written out")
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(each, depth + 1) for each in inner]


def read_site(path: Path) -> Site:
    """Read the site's file; what it leaves out keeps its default.

    Raises:
        ConfigError: not YAML, a key twice or unknown, or a value that is not allowed; names file and field.
        OSError: it cannot be read.
    """
    try:
        values = yaml.load(path.read_text(), _UniqueKeys)  # noqa: S506  (a safe loader)
        if not isinstance(values, dict):
            raise ConfigError("must hold keys and values")
        _require_small(values)
        return check_site(values)
    except TypeError as error:  # a date, or keys that are no text
        raise ConfigError(f"{path}: write it in quotes: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not text") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested more than {_LARGEST_DEPTH} deep") from None
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
