"""The champions of each task: the policy in use, and the decisions that have put it there.

    TASK/decisions/00000003.json     the third decision; the one with the highest number is in force
    TASK/policies/1a2b3c4d5e6f7a8b/  a run with one checkpoint, the exported policy and model-card.md

A decision is created under the next free number, and is never changed or deleted. If two decisions race for a
number, the store refuses one of them. So the history is complete.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mappo.config import EnvironmentConfig
from mappo.errors import CheckpointError, ConfigError, StoreError, one_line
from mappo.runs.attempt import claim
from mappo.runs.checkpoint import Checkpoint, Sha256, pack, sha256_of, verify
from mappo.runs.locations import joined, open_store
from mappo.runs.run import POLICY_PARTS, Run
from mappo.runs.store import honours_conditions
from mappo.strict_json import first_problem, json_hash, to_dict

_log = logging.getLogger(__name__)
POLICY, CARD = "policy.pt2", "model-card.md"  # the files beside the checkpoint of a policy
ONNX, CONTRACT = "policy.onnx", "contract.json"  # two more, if the promotion could make them
_DECISION = re.compile(r"decisions/([0-9]{8})\.json")
_TASK = re.compile(r"([A-Za-z0-9._-]+)/decisions/[0-9]{8}\.json")
_POLICY_KEY = r"^policies/[0-9a-f]{16}$"
_MAX_BYTES, _MAX_FILE_BYTES = 50_000_000, 1 << 32
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, config=_STRICT)
class ChampionDecision:
    """A decision that changed the champion.

    policy: the key of the new champion's policy, below the task. decided: the time of the decision, in UTC.
    evidence: the gate's decision; empty for a rollback. reason: the text that a person gave for a rollback.
    files: the SHA-256 of the files beside the policy's checkpoint, by name; empty in decisions before 0.6.
    """

    format: Literal[1]
    number: Annotated[int, Field(ge=1)]
    action: Literal["promoted", "rolled back"]
    policy: Annotated[str, Field(pattern=_POLICY_KEY)]
    decided: str
    evidence: dict[str, JsonValue]
    reason: str = ""
    files: dict[str, Sha256] = field(default_factory=dict)


_CHAMPION_DECISION = TypeAdapter(ChampionDecision)


def task_name(config: EnvironmentConfig) -> str:
    """Return the name of a task: its scenario, and a hash of its whole environment configuration.

    Settings of groups are left out if they are empty, so that tasks keep their names of earlier versions.
    """
    scenario = re.sub(r"[^A-Za-z0-9._-]", ".", config.scenario)
    values = {name: value for name, value in to_dict(config).items() if value or "groups" not in name}
    return f"{scenario}-{json_hash(values)[:8]}"


def tasks(location: str | Path) -> list[str]:
    """Return the names of the tasks that have a champion.

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
        """Return all decisions that changed the champion, the oldest first.

        Raises:
            ConfigError: a decision is damaged.
            StoreError: the store does not answer.
        """
        matches = [_DECISION.fullmatch(entry.key) for entry in self._store.entries("decisions/")]
        return [self._read(int(match[1])) for match in matches if match]

    def current(self) -> ChampionDecision | None:
        """Return the decision in force, or None if there is none yet.

        Raises:
            ConfigError: the decision is damaged.
            StoreError: the store does not answer.
        """
        matches = [_DECISION.fullmatch(entry.key) for entry in self._store.entries("decisions/")]
        numbers = [int(match[1]) for match in matches if match]
        return self._read(max(numbers)) if numbers else None

    def policy(self, decision: ChampionDecision) -> Checkpoint:
        """Load the networks of a champion.

        Raises:
            CheckpointError: the checkpoint is damaged, or is that of another policy.
            StoreError: the store does not answer.
        """
        run = Run.at(self.policy_location(decision))
        checkpoint = run.load(run.choose("last"), POLICY_PARTS)
        if (key := policy_key(checkpoint)) != decision.policy:
            raise CheckpointError(f"{run.store.location}: replaced: it holds {key}, not {decision.policy}")
        return checkpoint

    def file(self, decision: ChampionDecision, name: str) -> bytes:
        """Return a file beside a champion's checkpoint, such as its exported policy.

        Raises:
            CheckpointError: the file is not the one that the decision names.
            StoreError: the file is missing, or the store does not answer.
        """
        location = f"{self.policy_location(decision)}/{name}"
        content = open_store(self.policy_location(decision)).read(name, _MAX_FILE_BYTES)
        if name in decision.files:
            return verify(content, decision.files[name], location)
        _log.warning("%s is not verified: decision %d holds no hash of it", location, decision.number)
        return content

    def policy_location(self, decision: ChampionDecision) -> str:
        """Return the location of a champion's checkpoint, exported policy and model card."""
        return joined(self.location, decision.policy)

    def save_policy(self, checkpoint: Checkpoint, *files: Mapping[str, bytes]) -> dict[str, Sha256]:
        """Save a policy's networks and its files; return the SHA-256 of the files. Saving it again is harmless.

        Each mapping holds files that belong together. They are kept as they are if an earlier decision for this
        policy names them all and none was changed.

        Raises:
            StoreError: the store refuses writes or does not answer.
        """
        key = policy_key(checkpoint)
        run = Run.at(joined(self.location, key))
        if not run.refs():
            from mappo.environment.simulation_state import SimulationState  # imports torch; look-ups do without

            attempt = claim(run)
            attempt.save(
                replace(
                    checkpoint, optimiser={}, state=SimulationState(), history="", earlier_rows=None, segments=()
                )
            )
            attempt.tidy()
        earlier = [decision for decision in reversed(self.history()) if decision.policy == key]
        hashes = {}
        for together in files:
            kept = next((decision.files for decision in earlier if self._has_files(decision, together)), None)
            for name, content in together.items():
                hashes[name] = kept[name] if kept else sha256_of(content)
                if not kept:
                    run.store.write(name, content)
        return hashes

    def _has_files(self, decision: ChampionDecision, names: Iterable[str]) -> bool:
        try:
            return all(name in decision.files and self.file(decision, name) for name in names)
        except (CheckpointError, StoreError):
            return False

    def decide(
        self,
        after: ChampionDecision | None,
        action: Literal["promoted", "rolled back"],
        policy: str,
        evidence: Mapping[str, Any],
        reason: str = "",
        files: Mapping[str, Sha256] = MappingProxyType({}),
    ) -> ChampionDecision:
        """Put a policy in force, unless another decision has followed `after` already. The operation is atomic.

        Raises:
            KeyTaken: another decision came first.
            StoreError: the store does not answer, or does not support conditional writes.
        """
        if not honours_conditions(self._store, "decisions/"):
            raise StoreError(
                f"{self.location}: this store ignores conditional writes (If-None-Match), so that two promotions "
                "could overwrite each other: use another store for champions"
            )
        number = after.number + 1 if after else 1
        decided = datetime.now(UTC).isoformat(timespec="seconds")
        decision = ChampionDecision(1, number, action, policy, decided, dict(evidence), reason, dict(files))
        content = json.dumps(asdict(decision), indent=1, allow_nan=False).encode()
        self._store.create(_decision_key(number), content)
        return decision

    def roll_back(self, to: int | None = None, reason: str = "") -> ChampionDecision:
        """Put an earlier champion in force: the one of decision `to`, or else the last one with another policy.

        Raises:
            ConfigError: there is no such champion.
            CheckpointError: the checkpoint of the earlier champion is damaged.
            KeyTaken: another decision came first.
            StoreError: the store does not answer, or does not support conditional writes.
        """
        history = self.history()
        if not history:
            raise ConfigError(f"{self.location}: there is no champion")
        current = history[-1]
        others = [decision for decision in history if decision.policy != current.policy]
        candidates = [decision for decision in others if to in (None, decision.number)]
        if not candidates:
            numbers = ", ".join(str(decision.number) for decision in others) or "none"
            target = f"decision {to}" if to else "an earlier champion"
            raise ConfigError(
                f"{self.location}: cannot roll back to {target}: decisions for another policy: {numbers}"
            )
        self.policy(candidates[-1])  # raises an error if the checkpoint is missing or damaged
        return self.decide(current, "rolled back", candidates[-1].policy, {}, reason, candidates[-1].files)

    def _read(self, number: int) -> ChampionDecision:
        key = _decision_key(number)
        try:
            decision = _CHAMPION_DECISION.validate_json(self._store.read(key, _MAX_BYTES))
            json.dumps(decision.evidence, allow_nan=False)
        except ValidationError as error:
            raise ConfigError(f"{self.location}/{key}: not a decision: {first_problem(error)}") from None
        except (ValueError, RecursionError) as error:  # a number that is not finite or has too many digits
            raise ConfigError(f"{self.location}/{key}: not a decision: evidence: {one_line(error)}") from None
        if decision.number != number:
            raise ConfigError(f"{self.location}/{key}: not a decision: number: {decision.number}, not {number}")
        return decision


def policy_key(checkpoint: Checkpoint) -> str:
    """Return the key of a checkpoint's policy, below its task: a hash of the networks."""
    manifest, _ = pack(checkpoint)
    return f"policies/{manifest.parts['networks'].sha256[:16]}"


def _decision_key(number: int) -> str:
    return f"decisions/{number:08d}.json"
