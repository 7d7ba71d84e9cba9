"""The translation of Argo's and Kubernetes' messages about a pod into plain words, with the fix."""

import re
from collections.abc import Callable

_MEMORY = (
    "out of memory: the pod was killed at its memory limit{limit}; raise the limit by -p {task}_memory=..., or by "
    "stages.{task}.memory in the site's file"
)
_DEADLINE = "deadline exceeded: raise stages.{task}.timeout_seconds in the site's file"
_DELETED = "its pod was deleted: evicted, preempted, or its node was lost"
_GATED = "waits until its pod is admitted, perhaps for quota of Kueue: kubectl get workloads"
_CANCELLED = "ended, since the run was cancelled"
_UNINFORMATIVE = re.compile(r"omitted: |No more retries left|PodInitializing|ContainerCreating|$")
_EXIT = re.compile(r"(?:main: )?Error \(exit code \d+\)")
_CATEGORIES = (
    ("out of memory", "out_of_memory"),
    (_DELETED, "pod_lost"),
    ("deadline exceeded", "deadline"),
    ("driver: ", "driver"),
    (_CANCELLED, "cancelled"),
)
_EXPLANATIONS: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = [
    (re.compile(r"OOMKilled"), lambda _: _MEMORY),
    (re.compile(r"pod deleted"), lambda _: _DELETED),
    (re.compile(r"Evicted|evicted|The node was low on resource"), lambda match: f"{_DELETED}: {match.string}"),
    (
        re.compile(r"exceeded workflow deadline|exceeded its deadline|longer than the specified deadline"),
        lambda _: _DEADLINE,
    ),
    (
        re.compile(r"Unschedulable: (?P<why>.*?)(?:\. no new claims.*|\. preemption:.*|, preemption:.*)?\.?"),
        lambda match: f"waits for a node: {match['why']}",
    ),
    (
        re.compile(r"(?:ImagePullBackOff|ErrImage\w+|InvalidImageName): (?P<why>.*)", re.DOTALL),
        lambda match: f"waits for its image, which cannot be pulled: {_shortened(match['why'])}",
    ),
    (
        re.compile(r".*exceeded quota: (?P<why>.*)"),
        lambda match: f"waits for the namespace's quota: {match['why']}",
    ),
    (
        re.compile(r"(?:CreateContainerConfigError|CreateContainerError): (?P<why>.*)"),
        lambda match: f"waits, since its container cannot be created: {match['why']}",
    ),
    (re.compile(r"Backoff for (?P<why>.*)"), lambda match: f"the next attempt starts after {match['why']}"),
]


def explain(
    message: str, task: str, memory: str = "", *, is_cancelled: bool = False, is_gated: bool = False
) -> str:
    """Return what a node's message means for its stage; empty for a message without information.

    task: the stage's name in parameters and in the site's file. memory: the memory limit of the pod.
    is_cancelled: the run was cancelled, which Argo reports as a deadline. is_gated: the pod waits in a queue of
    Kueue, about which Argo reports no message.
    """
    if _UNINFORMATIVE.match(message):
        return _GATED if is_gated and not message else ""
    for pattern, explanation in _EXPLANATIONS:
        if match := (pattern.fullmatch(message) or pattern.search(message)):
            text = explanation(match)
            if text is _DEADLINE and is_cancelled:
                return _CANCELLED
            return text.replace("{task}", task).replace("{limit}", f" of {memory}" if memory else "")
    return message


def category_of(reason: str) -> str:
    """Return the kind of a failure, one of `FAILURES`, from the reason that `explain` returned for it."""
    if is_exit(reason) or not reason:
        return "error"
    return next((kind for start, kind in _CATEGORIES if reason.startswith(start)), "other")


def is_exit(message: str) -> bool:
    """Return whether a message gives only the exit code of a process; the reason is then in the log."""
    return bool(_EXIT.fullmatch(message))


def _shortened(text: str) -> str:
    """Return the image's name and the last cause in a chain of errors."""
    image = re.search(r'image "([^"]+)"', text)
    cause = " ".join(text.split()).rstrip(".").rpartition(": ")[2]
    return f"{image[1]}: {cause}" if image else cause
