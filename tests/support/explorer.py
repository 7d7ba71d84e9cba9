"""An explorer of everything that can happen when several processes train one run.

Each process runs the real code: it claims an attempt, saves and tidies. Only the store is a model. A process
depends on nothing but the answers of the store. So its state is the list of answers so far: to find its next
request, the code runs again from its start on these answers, up to the first request that has no answer yet.

`explore` searches breadth first through all orders of requests of the processes, with up to `num_faults` faults: a
crash, a listing that is empty or lacks the newest key, a deletion or a hint that is refused, and an answer that is
lost before or after the request has taken effect. Each state is checked for what docs/runs.md promises.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import count

from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable, Superseded, TooLarge
from mappo.runs.attempt import Attempt, claim
from mappo.runs.attempt_notes import AttemptNotes
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.checkpoint_ref import CheckpointRef, newest_first
from mappo.runs.run import HINT, Run
from mappo.runs.store import Entry

NOW = 1.8e9
Content = dict[str, bytes]  # a store: key -> bytes, in the order of their creation
Request = tuple[str, str, bytes]  # operation, key or prefix, content
Answer = bytes | tuple[str, ...] | type[StoreError] | None


class Unanswered(BaseException):
    """The first request that has no answer yet."""

    def __init__(self, request: Request):
        self.request = request


class Answers:
    """A `Store` that gives recorded answers."""

    location = "model"

    def __init__(self, answers: Iterable[Answer]):
        self._answers = iter(answers)

    def read(self, key: str, max_bytes: int) -> bytes:
        content = self._ask("read", key)
        if len(content) > max_bytes:
            raise TooLarge(key)
        return content

    def write(self, key: str, content: bytes) -> None:
        self._ask("write", key, content)

    def create(self, key: str, content: bytes) -> None:
        self._ask("create", key, content)

    def entries(self, prefix: str = "") -> list[Entry]:
        return [Entry(key, 1, NOW) for key in sorted(self._ask("list", prefix))]

    def delete(self, key: str) -> None:
        self._ask("delete", key)

    def impatient(self) -> "Answers":
        return self

    def _ask(self, operation: str, key: str, content: bytes = b""):
        for answer in self._answers:
            if isinstance(answer, type):
                raise answer(f"{operation} {key}")
            return answer
        raise Unanswered((operation, key, content))


@dataclass
class Log:
    """What a process has done so far."""

    attempt: Attempt | None = None
    saved: list[tuple[CheckpointRef, float]] = field(default_factory=list)  # with the return in the evaluation
    end: str = ""  # finished, superseded or failed; empty while the process works
    request: Request | None = None  # the next one


@dataclass(frozen=True)
class Process:
    """A process: its answers so far. floor: the highest number that was claimed before its first request."""

    name: int
    answers: tuple[Answer, ...] = ()
    floor: int = 0
    is_dead: bool = False


@dataclass(frozen=True)
class State:
    """The store, the processes, and the number of faults that may still happen.

    The keys of each folder are in the order of their creation, but those of parts, whose order nobody notices.
    """

    store: tuple[tuple[str, bytes], ...]
    processes: tuple[Process, ...]
    num_faults: int

    @property
    def content(self) -> Content:
        return dict(self.store)


class Violation(AssertionError):
    """A promise is broken; the text has the steps that lead there."""


@dataclass(frozen=True)
class Explorer:
    """The processes that train a run.

    make_checkpoint: returns the checkpoint of an iteration, with its return in the evaluation. returns: the
    returns of each process's saves. reset: makes names that are drawn at random depend on the process alone.
    """

    make_checkpoint: Callable[[int, float], Checkpoint]
    returns: tuple[tuple[float, ...], ...]
    reset: Callable[[int], None]
    conditional: bool = True
    keep: int = 1

    def explore(self, num_faults: int) -> int:
        """Visit all states and return their number.

        Raises:
            Violation: a promise is broken in a state.
        """
        processes = tuple(map(Process, range(len(self.returns))))
        start = State((), processes, num_faults)
        steps: dict[State, tuple[State, str] | None] = {start: None}
        waiting = deque([start])
        while waiting:
            state = waiting.popleft()
            try:
                self._check(state)
                for step, following in self._steps(state):
                    if following not in steps:
                        steps[following] = state, step
                        waiting.append(following)
            except AssertionError as error:
                raise Violation(f"{error}\n" + "\n".join(_trace(steps, state))) from error
        return len(steps)

    def _steps(self, state: State) -> Iterator[tuple[str, State]]:
        for process in state.processes:
            log = self._log(process)
            if process.is_dead or log.request is None:
                continue
            if not process.answers:
                claimed = [self._log(other).attempt for other in state.processes]
                process = replace(process, floor=max((done.number for done in claimed if done), default=0))
            if state.num_faults and process.answers:
                yield f"{process.name}: crash", _with(state, replace(process, is_dead=True), state.content, 1)
            for note, answer, content, cost in self._outcomes(state.content, log.request):
                if cost > state.num_faults:
                    continue
                text = f"{process.name}: {log.request[0]} {log.request[1]}{note}"
                following = replace(process, answers=(*process.answers, answer))
                while (request := self._log(following).request) and _is_private(request):
                    if cost < state.num_faults:
                        dead = replace(following, is_dead=True)
                        yield f"{text}, crash before {request[1]}", _with(state, dead, content, cost + 1)
                    _, answer, content, _ = next(self._outcomes(content, request))
                    following = replace(following, answers=(*following.answers, answer))
                yield text, _with(state, following, content, cost)

    def _outcomes(self, content: Content, request: Request) -> Iterator[tuple[str, Answer, Content, int]]:
        """Yield what may happen to a request: a note, the answer, the store afterwards, the number of faults."""
        operation, key, written = request
        if operation == "read":
            yield "", content.get(key, KeyMissing), content, 0
            return
        if operation == "list":
            keys = tuple(name for name in content if name.startswith(key))
            yield "", keys, content, 0
            if keys:
                yield " (empty)", (), content, 1
                hidden = [name for name in keys if not name.startswith("blobs/")][-1:]
                yield " (lags)", tuple(name for name in keys if name not in hidden), content, 1
            return
        if operation == "delete":
            yield "", None, {name: value for name, value in content.items() if name != key}, 0
            yield " (refused)", StoreError, content, 1
            return
        is_taken = operation == "create" and content.get(key, written) != written and self.conditional
        after = content if is_taken else {**content, key: written}
        yield "", KeyTaken if is_taken else None, after, 0
        yield " (not done)", StoreUnavailable, content, 1
        if not is_taken:
            yield " (answer lost)", StoreUnavailable, after, 1

    def _log(self, process: Process) -> Log:
        return self._run(process.name, process.answers)

    @cache  # noqa: B019  (an explorer lives as long as its search)
    def _run(self, name: int, answers: tuple[Answer, ...]) -> Log:
        """Run a process on its answers."""
        log = Log()
        self.reset(name)
        try:
            self._train(Run(Answers(answers)), self.returns[name], log)
            log.end = "finished"
        except Unanswered as unanswered:
            log.request = unanswered.request
        except Superseded:
            log.end = "superseded"
        except StoreError:
            log.end = "failed"
        return log

    def _train(self, run: Run, returns: tuple[float, ...], log: Log) -> None:
        refs = run.refs()
        attempt = claim(run, self.keep)
        log.attempt = attempt
        refs = newest_first([*refs, *run.refs()])
        iteration = next((ref.iteration for ref in refs if run.readable_manifest(ref)), 0)
        for value in returns:
            iteration += 1
            checkpoint = self.make_checkpoint(iteration, value)
            log.saved.append((_saved(attempt, checkpoint), value))
            attempt.tidy()

    def _check(self, state: State) -> None:
        content, logs = state.content, [self._log(process) for process in state.processes]
        refs = newest_first(CheckpointRef.from_key(key) for key in content)
        for ref in refs:
            missing = ref.blobs(Run(_Whole(content)).manifest(ref)) - content.keys()
            assert not missing, f"{ref} lacks {missing}"
        saved = [pair for log in logs for pair in log.saved]
        if saved:
            newest = newest_first(ref for ref, _ in saved)[0]
            assert (refs[0].attempt, refs[0].iteration) >= (newest.attempt, newest.iteration), "the newest is lost"
            best = max(value for _, value in saved)
            kept = [json.loads(content[ref.key])["selection_return"] for ref in refs]
            assert max(kept) >= best, "the best is lost"
        numbers = [log.attempt.number for log in logs if log.attempt]
        if self.conditional:
            assert len(set(numbers)) == len(numbers), "two attempts have one number"
        for process, log in zip(state.processes, logs, strict=True):
            self._check_process(process, log, content)

    def _check_process(self, process: Process, log: Log, content: Content) -> None:
        attempt = log.attempt
        if attempt and self.conditional:
            assert attempt.number > process.floor, (
                f"process {process.name} has an earlier number than one before it"
            )
        if log.end == "superseded":
            notes = AttemptNotes(_Whole(content)).from_number(attempt.number + self.conditional)
            later = [number for number, note in notes if note.token != attempt.token]
            assert later, f"process {process.name} stops without a later attempt"
        if log.end == "failed":  # before it has a number, since the store did not accept one
            assert not attempt, f"process {process.name} fails"
            assert StoreUnavailable in process.answers, f"process {process.name} does not start"
        if log.request and attempt:
            operation, key, _ = log.request
            own = (f"blobs/{attempt.id}/", f"checkpoints/{attempt.id}/", "attempts/", HINT)
            if operation in ("write", "create"):
                assert key.startswith(own), f"process {process.name} writes {key}"
            if operation == "delete":
                assert key.startswith((*own[:2], "checkpoints/")), f"process {process.name} deletes {key}"


class _Whole(Answers):
    """A store that never fails."""

    def __init__(self, content: Content):
        self._content = content

    def read(self, key: str, max_bytes: int) -> bytes:
        return self._content[key]

    def entries(self, prefix: str = "") -> list[Entry]:
        return [Entry(key, 1, NOW) for key in self._content if key.startswith(prefix)]


def _saved(attempt: Attempt, checkpoint: Checkpoint) -> CheckpointRef:
    """Save as the saver does: again, until the store accepts it."""
    for tried in count():
        try:
            return attempt.save(checkpoint)
        except Superseded:
            raise
        except StoreError:
            if tried == 3:
                raise
    raise AssertionError


def _is_private(request: Request) -> bool:
    """Return whether no other process can notice a request: one for the probe, or for parts of a checkpoint."""
    operation, key, _ = request
    return key.startswith(("blobs/", "attempts/probe-")) and operation in ("read", "write", "create")


def _with(state: State, process: Process, content: Content, cost: int) -> State:
    processes = tuple(process if process.name == other.name else other for other in state.processes)
    items = sorted(
        content.items(), key=lambda item: item[0] if item[0].startswith("blobs/") else item[0].partition("/")[0]
    )
    return State(tuple(items), processes, state.num_faults - cost)


def _trace(steps: dict[State, tuple[State, str] | None], state: State) -> list[str]:
    trace = []
    while step := steps[state]:
        state, text = step
        trace.append(text)
    return trace[::-1]
