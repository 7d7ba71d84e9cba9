"""The types of fields that Kubernetes checks: images, quantities, names, labels, tolerations, affinity."""

import re
from decimal import Decimal
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, BeforeValidator, Field
from typing_extensions import TypedDict

from mappo.errors import ConfigError
from mappo.strict_json import STRICT

_LARGEST_ID = 2**31 - 1  # the largest user or group ID that Kubernetes accepts
SHOWN_CHARACTERS = 60  # the longest value that a message shows in full

# The names of images, as container runtimes parse them: only the host may have capitals; no path part is empty.
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
    """Return the image's name unchanged if Kubernetes can pull it.

    Raises:
        ConfigError: the name has neither a tag nor a digest, or is not the name of an image.
    """
    match = _IMAGE.fullmatch(image)
    if not match or len(match["name"]) > _LONGEST_IMAGE_NAME:
        hint = "; after the host, a name has small letters only" if image != image.lower() else ""
        raise ConfigError(f"image {shortened(image)!r}: must be NAME:TAG, NAME@sha256:DIGEST or both{hint}")
    return image


def shortened(text: str, length: int = SHOWN_CHARACTERS) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def amount_of(text: str) -> Decimal | None:
    """Return the number that a Kubernetes quantity such as 500m or 8Gi stands for; None for other text."""
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
        amount = amount_of(text)
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
    """A toleration, as a pod's specification holds it."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
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
_NUM_VALUES: dict[str, tuple[int, float]] = {  # the smallest and largest number of values that an operator takes
    "In": (1, float("inf")),
    "NotIn": (1, float("inf")),
    "Exists": (0, 0),
    "DoesNotExist": (0, 0),
    "Gt": (1, 1),
    "Lt": (1, 1),
}


class _Expression(TypedDict):
    """A requirement on a label of a node."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    key: LabelKey
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    values: NotRequired[list[LabelValue]]


def _check_expression(expression: _Expression) -> _Expression:
    operator, values = expression["operator"], expression.get("values", [])
    lowest, highest = _NUM_VALUES[operator]
    if not lowest <= len(values) <= highest:
        bound = "no values" if highest == 0 else "one value" if highest == 1 else "at least one value"
        raise ValueError(f"operator {operator} takes {bound}")
    if operator in ("Gt", "Lt") and not _INTEGER.fullmatch(values[0]):
        raise ValueError(f"operator {operator} takes a whole number, as text")
    return expression


class _NodeField(TypedDict):
    """A requirement on the name of a node."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    key: Literal["metadata.name"]
    operator: Literal["In", "NotIn"]
    values: Annotated[list[Name], Field(min_length=1, max_length=1)]


class _NodeTerm(TypedDict, total=False):
    """A list of requirements, all of which a node must meet."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    matchExpressions: list[Annotated[_Expression, AfterValidator(_check_expression)]]
    matchFields: list[_NodeField]


class _NodeSelector(TypedDict):
    """A list of terms, at least one of which a node must meet."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    nodeSelectorTerms: Annotated[list[_NodeTerm], Field(min_length=1)]


class _Preference(TypedDict):
    """A term that makes the scheduler prefer a node, by its weight."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    weight: Annotated[int, Field(ge=1, le=100)]
    preference: _NodeTerm


class NodeAffinity(TypedDict, total=False):
    """A node affinity, as a pod's specification holds it."""

    __pydantic_config__ = STRICT  # type: ignore[misc]
    requiredDuringSchedulingIgnoredDuringExecution: _NodeSelector
    preferredDuringSchedulingIgnoredDuringExecution: list[_Preference]
