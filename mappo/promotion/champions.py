"""The champion of each task: which policy is in use, and all that were before it.

    TASK/decisions/00000003.json     the third decision; the one with the highest number is in force
    TASK/policies/1a2b3c4d5e6f7a8b/  a run with one checkpoint, policy.pt2 and model-card.md

Decisions are only ever created, each under the next number, so that of two which race for a number one is refused,
and the history is what was decided.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mappo.config import EnvironmentConfig
from mappo.errors import ConfigError, StoreError
from mappo.runs.attempt import claim
from mappo.runs.checkpoint import Checkpoint, pack
from mappo.runs.locations import joined, open_store
from mappo.runs.run import Run
from mappo.runs.store import honours_conditions
from mappo.strict_json import json_hash, to_dict

POLICY, CARD = "policy.pt2", "model-card.md"  # in the place of a policy
_DECISION = re.compile(r"decisions/(\d{8})\.json")
_TASK = re.compile(r"([^/]+)/decisions/\d{8}\.json")
_POLICY_KEY = r"^policies/[0-9a-f]{16}$"
_MAX_BYTES = 50_000_000
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_STRICT)
class ChampionDecision:
    """A decision that changed the champion. policy: its place below the task; decided: when, in UTC.

    evidence is the gate's decision; empty for a rollback. reason is what a person gave for a rollback.
    """

    format: Literal[1]
    number: Annotated[int, Field(ge=1)]
    action: Literal["promoted", "rolled back"]
    policy: Annotated[str, Field(pattern=_POLICY_KEY)]
    decided: str
    evidence: dict[str, JsonValue]
    reason: str = ""


_ENTRY = TypeAdapter(ChampionDecision)


def task_name(config: EnvironmentConfig) -> str:
    """The name of a task: its scenario, and a hash of all that makes it another task."""
    scenario = re.sub(r"[^A-Za-z0-9._-]", ".", config.scenario)
    return f"{scenario}-{json_hash(to_dict(config))[:8]}"


def tasks(location: str | Path) -> list[str]:
    """The tasks that have a champion.

    Raises:
        StoreError: the store does not answer.
    """
    matches = (_TASK.fullmatch(entry.key) for entry in open_store(str(location)).entries())
    return sorted({match[1] for match in matches if match})


class Champions:
    """The champions of one task, in a directory or a bucket."""

    def __init__(self, location: str | Path, task: str):
        self.location = joined(str(location), task)
        self.task = task
        self._store = open_store(self.location)

    def history(self) -> list[ChampionDecision]:
        """All decisions that changed the champion, the first first.

        Raises:
            ConfigError: one is damaged.
            StoreError: the store does not answer.
        """
        matches = [_DECISION.fullmatch(entry.key) for entry in self._store.entries("decisions/")]
        return [self._read(int(match[1])) for match in matches if match]

    def current(self) -> ChampionDecision | None:
        """The decision in force, if there is one.

        Raises:
            ConfigError, StoreError: as `history`.
        """
        matches = [_DECISION.fullmatch(entry.key) for entry in self._store.entries("decisions/")]
        numbers = [int(match[1]) for match in matches if match]
        return self._read(max(numbers)) if numbers else None

    def policy(self, entry: ChampionDecision) -> Checkpoint:
        """The checkpoint of a champion.

        Raises:
            CheckpointError: it is damaged.
            StoreError: the store does not answer.
        """
        run = Run.at(self.place(entry))
        return run.load(run.choose("last"))

    def place(self, entry: ChampionDecision) -> str:
        """Where its checkpoint, its exported policy and its model card are."""
        return joined(self.location, entry.policy)

    def keep(self, checkpoint: Checkpoint, files: Mapping[str, bytes]) -> str:
        """Keep a policy with what belongs to it; its key. Doing it again is harmless.

        Raises:
            StoreError: it cannot be written.
        """
        key = policy_key(checkpoint)
        run = Run.at(joined(self.location, key))
        if not run.saved():
            claim(run).save(checkpoint)
        for name, content in files.items():
            run.store.write(name, content)
        return key

    def decide(
        self,
        after: ChampionDecision | None,
        action: Literal["promoted", "rolled back"],
        policy: str,
        evidence: Mapping[str, Any],
        reason: str = "",
    ) -> ChampionDecision:
        """Put a policy in force, if `after` still is; atomically.

        Raises:
            KeyTaken: another decision was faster.
            StoreError: the store does not answer, or cannot tell who was first.
        """
        if not honours_conditions(self._store, "decisions/"):
            raise StoreError(
                f"{self.location}: this store ignores conditional writes (If-None-Match), so that two promotions "
                "could overwrite each other: keep champions in another store"
            )
        number = after.number + 1 if after else 1
        decided = datetime.now(UTC).isoformat(timespec="seconds")
        entry = ChampionDecision(1, number, action, policy, decided, dict(evidence), reason)
        content = json.dumps(asdict(entry), indent=1, allow_nan=False).encode()
        self._store.create(_decision_key(number), content)
        return entry

    def roll_back(self, to: int | None = None, reason: str = "") -> ChampionDecision:
        """Put an earlier champion in force: that of decision `to`, or the last one with another policy.

        Raises:
            ConfigError: there is none.
            KeyTaken, StoreError: as `decide`.
        """
        entries = self.history()
        if not entries:
            raise ConfigError(f"{self.location}: there is no champion")
        current = entries[-1]
        others = [each for each in entries if each.policy != current.policy and to in (None, each.number)]
        if not others:
            there = ", ".join(str(each.number) for each in entries if each.policy != current.policy) or "none"
            which = f"decision {to}" if to else "an earlier champion"
            raise ConfigError(f"{self.location}: no way back to {which}: decisions for another policy: {there}")
        self.policy(others[-1])  # it must be there, and whole
        return self.decide(current, "rolled back", others[-1].policy, {}, reason)

    def _read(self, number: int) -> ChampionDecision:
        key = _decision_key(number)
        try:
            entry = _ENTRY.validate_json(self._store.read(key, _MAX_BYTES))
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(str(part) for part in problem["loc"])
            raise ConfigError(f"{self.location}/{key}: not a decision: {name}: {problem['msg']}") from None
        if entry.number != number:
            raise ConfigError(f"{self.location}/{key}: not a decision: number: {entry.number}, not {number}")
        return entry


def policy_key(checkpoint: Checkpoint) -> str:
    """The place of a checkpoint's policy below its task, by the hash of its networks."""
    manifest, _ = pack(checkpoint)
    return f"policies/{manifest.parts['networks'].sha256[:16]}"


def _decision_key(number: int) -> str:
    return f"decisions/{number:08d}.json"
