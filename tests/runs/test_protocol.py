"""The promises of docs/runs.md, in every order of the requests of two processes, with faults."""

import logging
import secrets
import time
from dataclasses import replace

import pytest

from mappo.errors import Superseded
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
    monkeypatch.setattr(time, "monotonic", lambda: 1.0)
    monkeypatch.setattr(tidying, "_PAUSE_SECONDS", 0.0)
    logging.disable(logging.CRITICAL)
    yield lambda *returns, **more: Explorer(make_checkpoint, returns, reset, **more)
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("conditional", [True, False])
def test_nothing_is_lost_in_any_order_of_two_processes(explorer, conditional):
    assert explorer((0.5, 0.2), (0.3,), conditional=conditional).explore(num_faults=0) > 5_000


def test_nothing_is_lost_in_any_order_of_two_processes_with_a_fault(explorer):
    assert explorer((0.2,), (0.3,)).explore(num_faults=1) > 20_000


@pytest.mark.long
@pytest.mark.parametrize(
    ("returns", "num_faults", "conditional"),
    [
        (((0.5, 0.2), (0.3, 0.6)), 1, True),
        (((0.5, 0.2), (0.3,)), 1, False),
        (((0.5,), (0.3,)), 2, True),
    ],
)
def test_nothing_is_lost_in_any_order_of_more_requests(explorer, returns, num_faults, conditional):
    print(explorer(*returns, conditional=conditional).explore(num_faults), "states")


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


ONE, TWO = ((0.5, 0.2),), ((0.2, 0.1), (0.3,))


@pytest.mark.parametrize(
    ("owner", "name", "faulty", "returns", "num_faults", "broken"),
    [
        (Attempt, "require_current", stop_for_what_the_listing_shows, ONE, 1, "stops without a later attempt"),
        (Attempt, "save", save_the_manifest_first, ONE, 1, "lacks"),
        (
            tidying.Tidier,
            "_parts_of",
            parts_that_no_known_checkpoint_needs,
            TWO,
            0,
            "process 1 deletes blobs/0001-",
        ),
        (tidying, "select_prunable", lambda readable, keep: list(readable)[keep:], ONE, 0, "the best is lost"),
        (tidying, "select_prunable", lambda readable, keep: list(readable)[:keep], ONE, 0, "lost"),
    ],
    ids=range(5),
)
def test_explorer_finds_a_planted_fault(explorer, monkeypatch, owner, name, faulty, returns, num_faults, broken):
    monkeypatch.setattr(owner, name, faulty)
    with pytest.raises(Violation, match=broken):
        explorer(*returns).explore(num_faults)
