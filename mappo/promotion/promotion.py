"""The promotion of a candidate: test whether it beats the champion of its task, and record the decision."""

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mappo.compute.resources import resolve_device
from mappo.config import EvaluationConfig, ExperimentConfig, GroupName, config_hash, differences
from mappo.environment.draws import episodes_share_draws
from mappo.environment.random_streams import Stream
from mappo.environment.reductions import MeasurementName
from mappo.errors import ConfigError, KeyTaken, StoreError
from mappo.evaluation import statistics
from mappo.evaluation.episodes import PolicyOf, in_order, play_episodes, trained_policy
from mappo.evaluation.group_returns import GroupReturns, GroupReturnsRecorder
from mappo.evaluation.measurements import Measurement, Measurer
from mappo.evaluation.statistics import Estimate
from mappo.evaluation.verdicts import Verdict, judge_constraint
from mappo.promotion.champions import CARD, ONNX, POLICY, ChampionDecision, Champions, policy_key
from mappo.promotion.export import export_policy, model_card, trace_policy
from mappo.promotion.gate import Gate
from mappo.promotion.onnx_export import export_onnx, missing_packages
from mappo.runs.checkpoint import Checkpoint
from mappo.strict_json import parse_report

TEST = (
    "one-sided paired t test over gate seeds; a pair is the mean returns of both policies from the same initial "
    "states of one seed; the test compares one training of each policy, and its result does not hold for other "
    "training seeds; the confidence holds if the differences of seeds are roughly symmetric: a loss so rare that "
    "the gate's episodes do not show it counts for nothing"
)
_MAX_RACES = 10
_LARGEST_SEED = 2**31


@dataclass(frozen=True)
class Decision:
    """The decision of the gate, with the returns that it is based on.

    opponent: `champion N`, where N is the number of its decision, or `random` if the task had no champion.
    Returns are undiscounted, averaged over agents, and ordered by seed. lower_bound: the one-sided lower
    confidence bound of the mean difference; the candidate is better if this bound exceeds the gate's margin.
    action: promoted or kept. champion: the number of the decision in force afterwards; None if the task still
    has no champion. candidate_measurements and opponent_measurements: the measurements of these episodes.
    constraints: the verdicts on what the gate requires of the candidate's measurements, by name. candidate_groups
    and opponent_groups: the returns of each group of agents, if there are several; the gate decides by the groups
    of `environment.return_groups` together.
    """

    __pydantic_config__ = ConfigDict(json_schema_serialization_defaults_required=True)

    task: str
    candidate: dict[str, Any]
    opponent: str
    gate: Gate
    test: str
    seeds: list[int]
    candidate_returns: list[float]
    opponent_returns: list[float]
    candidate_mean: Estimate
    opponent_mean: Estimate
    difference: float
    lower_bound: float
    is_better: bool
    action: str
    champion: int | None
    candidate_measurements: dict[MeasurementName, Measurement] = field(default_factory=dict)
    opponent_measurements: dict[MeasurementName, Measurement] = field(default_factory=dict)
    candidate_groups: dict[GroupName, GroupReturns] = field(default_factory=dict)
    opponent_groups: dict[GroupName, GroupReturns] = field(default_factory=dict)

    def groups(self) -> dict[str, dict[str, GroupReturns]]:
        """Return the returns by group of the candidate and of the opponent, by policy and name."""
        return {"candidate": self.candidate_groups, self.opponent: self.opponent_groups}

    constraints: dict[MeasurementName, Verdict] = field(default_factory=dict)

    @property
    def keeps_constraints(self) -> bool:
        """Return whether the candidate keeps every constraint of the gate."""
        return all(verdict.is_kept for verdict in self.constraints.values())

    def measurements(self) -> dict[str, dict[str, Measurement]]:
        """Return the measurements of the candidate and of the opponent, by policy and name."""
        return {"candidate": self.candidate_measurements, self.opponent: self.opponent_measurements}


@dataclass(frozen=True)
class PromotionSkipped:
    """The result of a promotion without a location for champions: no gate decided."""

    study: str
    action: str = "not asked"


_DECISION = TypeAdapter(Decision)
_RESULT: TypeAdapter[Decision | PromotionSkipped] = TypeAdapter(Decision | PromotionSkipped)


def promote(
    config: ExperimentConfig,
    candidate: Checkpoint,
    champions: Champions,
    gate: Gate,
    announce: Callable[[str], object] = lambda _: None,
) -> Decision:
    """Make the candidate the champion if it is better and keeps the gate's constraints.

    Promoting the current champion again is harmless.

    The task is `config.environment`. The operating system draws new gate seeds for every decision, and no other
    part of the program uses their random stream. So no selection can have seen these episodes. Both policies
    start from the same initial states. If another decision comes first, the gate is repeated with other seeds,
    against the new champion.

    Raises:
        CheckpointError: the candidate's or the champion's networks do not fit the task.
        ConfigError: the candidate or the champion was trained on another task.
        StoreError: the store does not answer, does not support conditional writes, or another decision always
        comes
            first.
    """
    for _ in range(_MAX_RACES):
        current = champions.current()
        if current and current.policy == policy_key(candidate):
            announce(f"the candidate is already the champion, by decision {current.number}")
            earlier = _decision_of(current, champions)
            if earlier and earlier.gate.constraints == gate.constraints:
                return earlier
            return judge(config, candidate, champions, current, gate)
        decision = judge(config, candidate, champions, current, gate)
        if not (decision.is_better and decision.keeps_constraints):
            return decision
        announce("better: exporting the policy")
        card = model_card(candidate, champions.task, _summary(decision))
        files = champions.save_policy(candidate, *_exports(candidate, card, announce))
        number = current.number + 1 if current else 1
        promoted = replace(decision, action="promoted", champion=number)
        try:
            champions.decide(current, "promoted", policy_key(candidate), asdict(promoted), files=files)
        except KeyTaken:
            announce("another decision came first: the gate is repeated against the new champion")
            continue
        return promoted
    raise StoreError(f"{champions.location}: gave up after {_MAX_RACES} tries; another decision always came first")


def _exports(candidate: Checkpoint, card: str, announce: Callable[[str], object]) -> list[dict[str, bytes]]:
    """Return the files of a new champion; those of one format belong together."""
    traced = trace_policy(candidate)
    files = [{POLICY: export_policy(traced), CARD: card.encode()}]
    if missing := missing_packages():
        announce(
            f"{ONNX} is not made; missing packages: {missing}: after pip install 'mappo[onnx]', `mappo champion "
            "export --format onnx` makes it"
        )
        return files
    return [*files, export_onnx(traced)]


def parse_decision(location: str, content: bytes) -> Decision | PromotionSkipped:
    """Parse the JSON that a promotion wrote. Error messages name its `location`.

    Raises:
        ConfigError: the content is not the result of a promotion.
    """
    return parse_report(_RESULT, location, content, "the result of a promotion")


def judge(
    config: ExperimentConfig,
    candidate: Checkpoint,
    champions: Champions,
    current: ChampionDecision | None,
    gate: Gate,
) -> Decision:
    """Return the decision of the gate, without promoting anything.

    Raises:
        CheckpointError: the candidate's or the champion's networks do not fit the task.
        ConfigError: the candidate or the champion was trained on another task.
        StoreError: the store does not answer.
    """
    seeds = secrets.SystemRandom().sample(range(_LARGEST_SEED), gate.num_seeds)
    episodes = EvaluationConfig(
        seeds=tuple(seeds),
        episodes_per_seed=gate.episodes_per_seed,
        deterministic=config.evaluation.deterministic,
    )

    def play(policy: PolicyOf) -> tuple[list[float], dict[str, Measurement], dict[str, GroupReturns]]:
        measurer, by_group = Measurer(), GroupReturnsRecorder()
        on_frame = in_order(measurer.measure_frame, by_group.add_frame)
        returns, _ = play_episodes(policy, config, episodes, Stream.GATE, on_frame)
        per_seed = statistics.mean_over_seeds, gate.episodes_per_seed
        return returns, measurer.measurements(*per_seed), by_group.returns(*per_seed)

    opponent: PolicyOf = lambda environment: environment.rand_action  # noqa: E731
    if current:
        opponent = _policy_of(config, champions.policy(current))
    candidate_returns, candidate_measurements, candidate_groups = play(_policy_of(config, candidate))
    opponent_returns, opponent_measurements, opponent_groups = play(opponent)
    candidate_by_seed, opponent_by_seed = (
        statistics.by_seed(returns, gate.episodes_per_seed) for returns in (candidate_returns, opponent_returns)
    )
    bound = statistics.paired_lower_bound(candidate_by_seed, opponent_by_seed, gate.confidence)
    candidate_mean = statistics.mean_over_seeds(candidate_by_seed)
    opponent_mean = statistics.mean_over_seeds(opponent_by_seed)
    return Decision(
        task=champions.task,
        candidate=_description(candidate),
        opponent=f"champion {current.number}" if current else "random",
        gate=gate,
        test=TEST,
        seeds=seeds,
        candidate_returns=candidate_returns,
        opponent_returns=opponent_returns,
        candidate_mean=candidate_mean,
        opponent_mean=opponent_mean,
        difference=candidate_mean.value - opponent_mean.value,
        lower_bound=bound,
        is_better=bound > gate.margin,
        action="kept",
        champion=current.number if current else None,
        candidate_measurements=candidate_measurements,
        opponent_measurements=opponent_measurements,
        candidate_groups=candidate_groups,
        opponent_groups=opponent_groups,
        constraints=_verdicts(config, gate, candidate_measurements),
    )


def _verdicts(
    config: ExperimentConfig, gate: Gate, measurements: Mapping[str, Measurement]
) -> dict[MeasurementName, Verdict]:
    """Return the verdicts on the gate's constraints. Episodes are independent units unless they share draws."""
    if not gate.constraints:
        return {}
    share_draws = episodes_share_draws(config.environment, resolve_device(config.device))
    per_unit = gate.episodes_per_seed if share_draws else 1
    return {
        name: judge_constraint(constraint, measurements.get(name), gate.confidence, per_unit)
        for name, constraint in gate.constraints.items()
    }


def _policy_of(config: ExperimentConfig, checkpoint: Checkpoint) -> PolicyOf:
    """Return a checkpoint's policy on the task and the device of `config`; its networks keep their own sizes."""
    if changes := differences(replace(config, environment=checkpoint.config.environment), config):
        text = ", ".join(f"{name} = {change}" for name, change in changes.items())
        raise ConfigError(f"the checkpoint was trained on another task: {text}")
    return trained_policy(replace(config, networks=checkpoint.config.networks), checkpoint)


def _decision_of(current: ChampionDecision, champions: Champions) -> Decision | None:
    """Return the gate's decision that made this policy the champion; None if it is missing or unreadable."""
    promotions = [
        decision for decision in champions.history() if decision.policy == current.policy and decision.evidence
    ]
    try:
        decision: Decision = _DECISION.validate_json(json.dumps(promotions[-1].evidence))
    except (IndexError, ValidationError):
        return None
    return replace(decision, champion=current.number)


def _description(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "policy": policy_key(checkpoint),
        "config_hash": config_hash(checkpoint.config),
        "seed": checkpoint.config.seed,
        "iteration": checkpoint.iteration,
        "frames": checkpoint.frames,
    }


def _summary(decision: Decision) -> dict[str, Any]:
    """Return the rows of the gate in the model card."""
    mean = decision.candidate_mean
    return {
        "mean return on gate seeds (95 %)": f"{mean.value:.4g} [{mean.low:.4g}, {mean.high:.4g}]",
        f"mean return of {decision.opponent}, which it beat": f"{decision.opponent_mean.value:.4g}",
        "difference": f"{decision.difference:.4g}, with {decision.gate.confidence:.0%} confidence above "
        f"{decision.lower_bound:.4g}; {decision.test}",
        **{
            f"mean return of group {name} (95 %)": str(returns.mean)
            for name, returns in decision.candidate_groups.items()
        },
        **{
            f"{name}, {measurement.reduction} over an episode (95 %)": str(measurement)
            for name, measurement in decision.candidate_measurements.items()
        },
        **{f"constraint on {name}": str(verdict) for name, verdict in decision.constraints.items()},
    }
