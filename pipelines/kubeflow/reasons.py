"""The messages of Argo and Kubernetes about a pod, in words that say what to do."""

import re
from collections.abc import Callable

_MEMORY = (
    "out of memory: the pod was killed at its limit{limit}; give it more: -p {task}_memory=..., or "
    "stages.{task}.memory in the site's file"
)
_DEADLINE = "its time was up: stages.{task}.timeout_seconds in the site's file gives it more"
_DELETED = "its pod was deleted: evicted, preempted, or its node was lost"
_GATED = "waits for its pod to be admitted, perhaps for quota of Kueue: kubectl get workloads"
_SAYS_NOTHING = re.compile(r"omitted: |No more retries left|PodInitializing|ContainerCreating|$")
_EXIT = re.compile(r"(?:main: )?Error \(exit code \d+\)")
_WORDS: list[tuple[re.Pattern[str], Callable[[re.Match[str]], str]]] = [
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
        lambda match: f"waits, since its container cannot be made: {match['why']}",
    ),
    (re.compile(r"Backoff for (?P<why>.*)"), lambda match: f"the next attempt begins after {match['why']}"),
]


def in_words(
    message: str, task: str, memory: str = "", *, is_cancelled: bool = False, is_gated: bool = False
) -> str:
    """Return what a node's message means for its stage; empty for one that says nothing.

    task: the stage's name in parameters and in the site's file. memory: the limit of its pod. is_cancelled:
    somebody ended the run, which Argo calls a deadline. is_gated: the pod joins a queue of Kueue, about which Argo
    says nothing.
    """
    if _SAYS_NOTHING.match(message):
        return _GATED if is_gated and not message else ""
    for pattern, words in _WORDS:
        if match := (pattern.fullmatch(message) or pattern.search(message)):
            found = words(match)
            if found is _DEADLINE and is_cancelled:
                return "ended, since the run was cancelled"
            return found.replace("{task}", task).replace("{limit}", f" of {memory}" if memory else "")
    return message


def is_exit(message: str) -> bool:
    """Return whether a message says only that a process ended badly: the log knows more."""
    return bool(_EXIT.fullmatch(message))


def _shortened(text: str) -> str:
    """Return the image's name and the last cause of a chain."""
    image = re.search(r'image "([^"]+)"', text)
    cause = " ".join(text.split()).rstrip(".").rpartition(": ")[2]
    return f"{image[1]}: {cause}" if image else cause
