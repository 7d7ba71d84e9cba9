"""The promises of docs/runs.md, in every order of the requests of two processes, with faults."""

import secrets
import time
from dataclasses import replace

import pytest

from mappo.errors import Superseded
from mappo.runs import attempt as attempts
from mappo.runs import tidying
from mappo.runs.attempt import Attempt
from mappo.runs.checkpoint import manifest_bytes, pack, sha256_of
from mappo.runs.checkpoint_ref import CheckpointRef
from tests.support.explorer import NOW, Explorer, Violation


@pytest.fixture
def explorer(monkeypatch, checkpoint):
    """Return a function that makes an explorer. Names and times depend on the process alone."""
    names = iter([])

    def reset(process):
        nonlocal names
        names = (f"{process}{number:07d}" for number in range(100))

    def make_checkpoint(iteration, value):
        return replace(
            small, iteration=iteration, history=f"{iteration}\n", selection_return=value, highest_return=1.0
        )

    state = replace(checkpoint.state, tensors={}, structure={})
    small = replace(checkpoint, tensors={}, optimiser={}, state=state)
    monkeypatch.setattr(secrets, "token_hex", lambda _: next(names))
    monkeypatch.setattr(time, "time", lambda: NOW)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(tidying, "_PAUSE_SECONDS", 0.0)
    return lambda *returns, **more: Explorer(make_checkpoint, returns, reset, **more)


@pytest.mark.parametrize("conditional", [True, False])
def test_nothing_is_lost_in_any_order_of_two_processes_with_a_fault(explorer, conditional):
    num_states = explorer((0.5, 0.2), (0.3, 0.1), conditional=conditional).explore(num_faults=1)
    print(f"{num_states} states")
    assert num_states > 10_000


@pytest.mark.long
def test_nothing_is_lost_in_any_order_of_three_processes(explorer):
    print(explorer((0.5,), (0.2,), (0.3,)).explore(num_faults=1), "states")


@pytest.mark.long
def test_nothing_is_lost_in_any_order_of_two_processes_with_two_faults(explorer):
    print(explorer((0.5, 0.2), (0.3,)).explore(num_faults=2), "states")


def stop_for_what_the_listing_shows(self):
    """Refuse to save, as version 0.5 did, unless the newest attempt that the listing shows is this one."""
    if max(self.run.attempts.numbers(), default=0) != self.number:
        raise Superseded("the newest attempt is another one")


def save_the_manifest_first(self, checkpoint):
    manifest, parts = pack(checkpoint)
    content = manifest_bytes(manifest)
    self.require_current()
    ref = CheckpointRef.from_key(f"checkpoints/{self.id}/{checkpoint.iteration:010d}-{sha256_of(content)}.json")
    self.run.store.create(ref.key, content)
    for name, part in parts.items():
        self.run.store.write(f"blobs/{self.id}/{name}", part)
    self._tidier.add(ref, manifest)
    return ref


def parts_that_no_known_checkpoint_needs(self, ref):
    """Return the parts of any attempt's checkpoint, as if a listing showed all checkpoints of that attempt."""
    others = [(other, manifest) for other, manifest in self._known.items() if manifest and other != ref]
    return sorted(ref.blobs(self._known[ref]) - {key for other, known in others for key in other.blobs(known)})


FAULTS = [
    (Attempt, "require_current", stop_for_what_the_listing_shows, "stops without a later attempt"),
    (Attempt, "save", save_the_manifest_first, "lacks"),
    (tidying.Tidier, "_parts_of", parts_that_no_known_checkpoint_needs, "lacks"),
    (tidying, "select_prunable", lambda readable, keep: list(readable)[keep:], "the best is lost"),
    (tidying, "select_prunable", lambda readable, keep: list(readable)[:keep], "the newest is lost"),
    (attempts, "note_key", lambda number: "attempts/0001.json", "fails|does not start|earlier number"),
]


@pytest.mark.parametrize(
    ("owner", "name", "faulty", "broken"), FAULTS, ids=lambda value: getattr(value, "__name__", "")
)
def test_explorer_finds_a_planted_fault(explorer, monkeypatch, owner, name, faulty, broken):
    monkeypatch.setattr(owner, name, faulty)
    with pytest.raises(Violation, match=broken):
        explorer((0.5, 0.2), (0.3,)).explore(num_faults=1)
