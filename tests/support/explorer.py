"""An explorer of everything that can happen when several processes train one run.

Each process runs the real code: it claims an attempt, saves and tidies. Only the store is a model. A process
depends on nothing but its memory after the last call and the answers of the store since. To find its next request,
the call runs again on these answers, up to the first request that has no answer yet.

`explore` searches breadth first through all orders of the requests of all processes, with up to `num_faults`
faults: a crash, a listing that is empty or lacks the newest key, a deletion that is refused, and a write that is
not done, or is done without an answer. It checks in each state what docs/runs.md promises.
"""

import io
import json
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from mappo.errors import KeyMissing, KeyTaken, StoreError, StoreUnavailable, Superseded, TooLarge
from mappo.runs.attempt import Attempt, claim
from mappo.runs.attempt_notes import AttemptNotes
from mappo.runs.checkpoint import Checkpoint
from mappo.runs.checkpoint_ref import CheckpointRef, newest_first
from mappo.runs.run import HINT, Run
from mappo.runs.store import Entry

NOW = 1.8e9
Request = tuple[str, str, bytes]  # operation, key or prefix, content
Answer = bytes | tuple[str, ...] | type[StoreError] | None
_TRIES = 4  # of a save


class Unanswered(BaseException):
    """The first request that has no answer yet."""

    def __init__(self, request: Request):
        self.request = request


class Answers:
    """A `Store` that gives recorded answers."""

    location = "model"

    def __init__(self, answers: Iterable[Answer]):
        self._answers = iter(answers)
        self._unanswered: Unanswered | None = None

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
        self._unanswered = self._unanswered or Unanswered((operation, key, content))
        raise self._unanswered  # the same one again, if the code sends another request while it propagates


@dataclass(frozen=True)
class Process:
    """A process that trains the run.

    call: the number of calls that have returned. memory: the attempt and the iteration after these, pickled.
    answers: those since. floor: the highest number that was claimed before its first request. end: finished,
    superseded, failed or crashed; empty while the process works.
    """

    name: int
    call: int = 0
    memory: bytes = b""
    answers: tuple[Answer, ...] = ()
    floor: int = 0
    number: int = 0
    token: str = ""
    saved: tuple[tuple[CheckpointRef, float], ...] = ()
    end: str = ""


@dataclass(frozen=True)
class State:
    """The store, the processes, and the number of faults that may still happen; numbers stand for the objects.

    The store's keys are in the order of their creation, but those of parts, whose order nobody notices.
    """

    store: tuple[int, ...]
    processes: tuple[int, ...]
    num_faults: int


class Violation(AssertionError):
    """A promise is broken; the text has the steps that lead there."""


class _Numbers:
    """A number for each object, so that states are small."""

    def __init__(self):
        self._numbers, self.objects = {}, []

    def of(self, thing) -> int:
        if thing not in self._numbers:
            self._numbers[thing] = len(self.objects)
            self.objects.append(thing)
        return self._numbers[thing]


class Explorer:
    """The processes that train a run, and all states that they can reach."""

    def __init__(
        self,
        make_checkpoint: Callable[[int, float], Checkpoint],
        returns: tuple[tuple[float, ...], ...],
        reset: Callable[[int], None],
        conditional: bool = True,
        keep: int = 1,
    ):
        """Set the parameters.

        make_checkpoint: returns the checkpoint of an iteration with a return in the evaluation. returns: the
        returns of each process's saves. reset: makes the random names of the next call depend on the process
        alone.
        """
        self._make_checkpoint, self._returns, self._reset = make_checkpoint, returns, reset
        self._conditional, self._keep = conditional, keep
        self._items, self._known_processes = _Numbers(), _Numbers()

    def explore(self, num_faults: int) -> int:
        """Search all states and return their number.

        Raises:
            Violation: a promise is broken in a state.
        """
        processes = tuple(map(Process, range(len(self._returns))))
        start = State((), tuple(map(self._known_processes.of, processes)), num_faults)
        steps: dict[State, tuple[State, int, Request, str] | None] = {start: None}
        waiting = deque([start])
        while waiting:
            state = waiting.popleft()
            try:
                self._check(state.store, state.processes)
                for following, *step in self._steps(state):
                    if following not in steps:
                        steps[following] = state, *step
                        waiting.append(following)
            except AssertionError as error:
                raise Violation(f"{error}\n" + "\n".join(_trace(steps, state))) from error
        return len(steps)

    def _steps(self, state: State) -> Iterator[tuple[State, int, Request, str]]:
        """Yield the states that follow, with the process, its request and the fault that lead there."""
        content = dict(map(self._items.objects.__getitem__, state.store))
        processes = [self._known_processes.objects[number] for number in state.processes]
        for process in processes:
            request = self._request(process)
            if request is None:
                continue
            if not process.call and not process.answers:
                process = replace(process, floor=max(other.number for other in processes))
            elif state.num_faults:
                yield (
                    self._state(state, replace(process, end="crashed"), content, 1),
                    process.name,
                    request,
                    "crash",
                )
            for note, answer, after, cost in self._outcomes(content, request):
                if cost <= state.num_faults:
                    for following, after_all, crash in self._answered(process, answer, after):
                        if cost + crash <= state.num_faults:
                            told = f"{note}, then a crash" if crash else note
                            yield (
                                self._state(state, following, after_all, cost + crash),
                                *(process.name, request, told),
                            )

    def _answered(
        self, process: Process, answer: Answer, content: dict[str, bytes]
    ) -> Iterator[tuple[Process, dict[str, bytes], int]]:
        """Yield a process after an answer: it works, or crashes between writes that nobody notices."""
        process = self._advanced(replace(process, answers=(*process.answers, answer)))
        while (request := self._request(process)) and _is_private(request):
            yield replace(process, end="crashed"), content, 1
            _, answer, content, _ = next(self._outcomes(content, request))
            process = self._advanced(replace(process, answers=(*process.answers, answer)))
        yield process, content, 0

    def _state(self, state: State, process: Process, content: dict[str, bytes], cost: int) -> State:
        numbers = list(state.processes)
        numbers[process.name] = self._known_processes.of(process)
        parts = sorted(item for item in content.items() if item[0].startswith("blobs/"))
        others = [item for item in content.items() if not item[0].startswith("blobs/")]
        others.sort(key=lambda item: item[0].partition("/")[0])  # the order within each folder stays
        return State(tuple(map(self._items.of, [*parts, *others])), tuple(numbers), state.num_faults - cost)

    def _outcomes(
        self, content: dict[str, bytes], request: Request
    ) -> Iterator[tuple[str, Answer, dict[str, bytes], int]]:
        """Yield what may happen to a request: the fault, the answer, the store then, the number of faults."""
        operation, key, written = request
        if operation == "read":
            yield "", content.get(key, KeyMissing), content, 0
            return
        if operation == "list":
            keys = tuple(name for name in content if name.startswith(key))
            yield "", keys, content, 0
            if keys:
                yield "is empty", (), content, 1
                yield "lags", keys[:-1], content, 1
            return
        if operation == "delete":
            yield "", None, {name: value for name, value in content.items() if name != key}, 0
            yield "is refused", StoreError, content, 1
            return
        is_taken = operation == "create" and content.get(key, written) != written and self._conditional
        after = content if is_taken else {**content, key: written}
        yield "", KeyTaken if is_taken else None, after, 0
        yield "is not done", StoreUnavailable, content, 1
        if not is_taken:
            yield "has no answer", StoreUnavailable, after, 1

    def _request(self, process: Process) -> Request | None:
        """Return the next request of a process, or None if it has ended."""
        return None if process.end else self._call(process.name, process.call, process.memory, process.answers)[0]

    def _advanced(self, process: Process) -> Process:
        """Return the process after all calls that need no further answer."""
        while not process.end:
            request, memory, saved, end = self._call(process.name, process.call, process.memory, process.answers)
            if request:
                break
            if memory and not process.memory:
                attempt, _ = _remembered(memory, None)
                process = replace(process, number=attempt.number, token=attempt.token)
            answers = process.answers if end else ()
            saved = process.saved + saved
            process = replace(process, call=process.call + 1, memory=memory, answers=answers, saved=saved, end=end)
        return process

    @cache  # noqa: B019  (an explorer lives as long as its search)
    def _call(self, name: int, call: int, memory: bytes, answers: tuple[Answer, ...]):
        """Run a call on its answers: the start of training, a save, or tidying.

        Return the request that has no answer yet, or else the memory afterwards, what was saved, and how the
        process ends.
        """
        self._reset(name)
        run, returns = Run(Answers(answers)), self._returns[name]
        try:
            if call == 0:
                return None, _pickled(*self._start(run)), (), ""
            attempt, iteration = _remembered(memory, run)
            if call % 2 == 0:
                attempt.tidy()
                return None, _pickled(attempt, iteration), (), "finished" if call == 2 * len(returns) else ""
            value = returns[call // 2]
            ref = _save(attempt, self._make_checkpoint(iteration + 1, value))
            return None, _pickled(attempt, iteration + 1), ((ref, value),), ""
        except Unanswered as unanswered:
            return unanswered.request, memory, (), ""
        except Superseded:
            return None, memory, (), "superseded"
        except StoreError:
            return None, memory, (), "failed"

    def _start(self, run: Run) -> tuple[Attempt, int]:
        refs = run.refs()
        attempt = claim(run, self._keep)
        attempt._tidier._has_swept = True  # the sweep deletes only what is a day old
        refs = newest_first([*refs, *run.refs()])
        return attempt, next((ref.iteration for ref in refs if run.readable_manifest(ref)), 0)

    @cache  # noqa: B019
    def _check(self, store: tuple[int, ...], numbers: tuple[int, ...]) -> None:
        content = dict(map(self._items.objects.__getitem__, store))
        processes = [self._known_processes.objects[number] for number in numbers]
        refs = self._whole_refs(store)
        if saved := [pair for process in processes for pair in process.saved]:
            newest = newest_first(ref for ref, _ in saved)[0]
            assert refs, "everything is lost"
            assert newest_first([refs[0], newest])[0] == refs[0], "the newest is lost"
            kept = [json.loads(content[ref.key])["selection_return"] for ref in refs]
            assert max(kept) >= max(value for _, value in saved), "the best is lost"
        claimed = [process.number for process in processes if process.number]
        assert len(set(claimed)) == len(claimed) or not self._conditional, "two attempts have one number"
        for process in processes:
            self._check_process(process, content)

    @cache  # noqa: B019
    def _whole_refs(self, store: tuple[int, ...]) -> list[CheckpointRef]:
        """Return the checkpoints, the newest first, after a check that they have all their parts."""
        content = dict(map(self._items.objects.__getitem__, store))
        refs = newest_first(CheckpointRef.from_key(key) for key in content)
        for ref in refs:
            missing = ref.blobs(Run(_Whole(content)).manifest(ref)) - content.keys()
            assert not missing, f"{ref} lacks {missing}"
        return refs

    def _check_process(self, process: Process, content: dict[str, bytes]) -> None:
        name = f"process {process.name}"
        if process.number and self._conditional:
            assert process.number > process.floor, f"{name} has an earlier number than one before it"
        if process.end == "superseded":
            notes = AttemptNotes(_Whole(content)).from_number(process.number + self._conditional)
            assert any(note.token != process.token for _, note in notes), f"{name} stops without a later attempt"
        if process.end == "failed":  # before it has a number, since the store did not accept one
            assert not process.number, f"{name} fails"
            assert StoreUnavailable in process.answers, f"{name} does not start"
        if process.number and (request := self._request(process)):
            operation, key, _ = request
            own = f"{process.number:04d}-{process.token}/"
            if operation in ("write", "create"):
                assert key.startswith((f"blobs/{own}", f"checkpoints/{own}", HINT)), f"{name} writes {key}"
            if operation == "delete":
                assert key.startswith((f"blobs/{own}", "checkpoints/")), f"{name} deletes {key}"


class _Whole(Answers):
    """A store that never fails."""

    def __init__(self, content: dict[str, bytes]):
        self._content = content

    def read(self, key: str, max_bytes: int) -> bytes:
        return self._content[key]

    def entries(self, prefix: str = "") -> list[Entry]:
        return [Entry(key, 1, NOW) for key in self._content if key.startswith(prefix)]


def _save(attempt: Attempt, checkpoint: Checkpoint) -> CheckpointRef:
    """Save as the saver does: again, until the store accepts it."""
    for _ in range(_TRIES - 1):
        try:
            return attempt.save(checkpoint)
        except Superseded:
            raise
        except StoreError:
            continue
    return attempt.save(checkpoint)


def _is_private(request: Request) -> bool:
    """Return whether no other process can notice a request: one for the probe, or for parts of a checkpoint."""
    operation, key, _ = request
    return key.startswith("attempts/probe-") or (key.startswith("blobs/") and operation != "delete")


def _pickled(attempt: Attempt, iteration: int) -> bytes:
    """Return an attempt and an iteration as bytes, without the run."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing):
            return "run" if isinstance(thing, Run) else None

    file = io.BytesIO()
    Pickler(file).dump((attempt, iteration))
    return file.getvalue()


def _remembered(memory: bytes, run: Run | None) -> tuple[Attempt, int]:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, _):
            return run

    return Unpickler(io.BytesIO(memory)).load()


def _trace(steps, state: State) -> list[str]:
    trace = []
    while step := steps[state]:
        state, name, (operation, key, _), fault = step
        trace.append(f"{name}: {operation} {key} {fault}")
    return trace[::-1]
