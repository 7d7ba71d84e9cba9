"""Does a candidate beat the champion of its task? The gate, and what becomes of its decision."""

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mappo.config import EvaluationConfig, ExperimentConfig, config_hash, differences
from mappo.environment.random_streams import Stream
from mappo.errors import ConfigError, KeyTaken, StoreError
from mappo.evaluation import statistics
from mappo.evaluation.episodes import PolicyOf, play_episodes, trained_policy
from mappo.evaluation.statistics import Estimate
from mappo.promotion.champions import CARD, POLICY, ChampionDecision, Champions, policy_key
from mappo.promotion.export import export_policy, model_card
from mappo.promotion.gate import Gate
from mappo.runs.checkpoint import Checkpoint

TEST = (
    "one-sided paired t test over episodes, a pair being the two policies' episodes from the same initial state; "
    "of one training of each, so that it says nothing of other training seeds"
)
_MOST_RACES = 10
_LARGEST_SEED = 2**31


@dataclass(frozen=True)
class Decision:
    """What the gate saw and decided.

    opponent: `champion N`, by the number of the decision that made it so, or `random` where there was none.
    Returns are undiscounted, mean over agents, in the order of seeds. lower_bound is the one-sided lower
    confidence bound of the mean difference; the candidate is better if it lies above the gate's margin. action:
    promoted or kept. champion: the decision in force afterwards, by number; None where there is still none.
    """

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


_DECISION = TypeAdapter(Decision)


def promote(
    config: ExperimentConfig,
    candidate: Checkpoint,
    champions: Champions,
    gate: Gate,
    announce: Callable[[str], object] = lambda _: None,
) -> Decision:
    """Put the candidate in the champion's place if it is better. Doing it again after it was promoted is harmless.

    The task is `config.environment`. Gate seeds are drawn afresh, from the operating system, in a random stream
    that nothing else uses, so that no selection can have seen them; both policies meet the same initial states.
    Where another decision comes first, the gate is held again against the new champion, with other seeds.

    Raises:
        CheckpointError: the candidate's or the champion's networks do not fit the task.
        ConfigError: the champion is of another task.
        StoreError: the store does not answer, cannot tell who was first, or others always are.
    """
    for _ in range(_MOST_RACES):
        current = champions.current()
        if current and current.policy == policy_key(candidate):
            announce(f"the candidate is the champion already, by decision {current.number}")
            return _decided(current, champions) or judge(config, candidate, champions, current, gate)
        decision = judge(config, candidate, champions, current, gate)
        if not decision.is_better:
            return decision
        announce("better: exporting the policy")
        card = model_card(candidate, champions.task, _summary(decision))
        key = champions.keep(candidate, {POLICY: export_policy(candidate), CARD: card.encode()})
        number = current.number + 1 if current else 1
        promoted = replace(decision, action="promoted", champion=number)
        try:
            champions.decide(current, "promoted", key, asdict(promoted))
        except KeyTaken:
            announce("another decision came first: the gate is held again, against the new champion")
            continue
        return promoted
    raise StoreError(f"{champions.location}: other decisions came first {_MOST_RACES} times")


def judge(
    config: ExperimentConfig,
    candidate: Checkpoint,
    champions: Champions,
    current: ChampionDecision | None,
    gate: Gate,
) -> Decision:
    """Hold the gate, and change nothing.

    Raises:
        CheckpointError, ConfigError, StoreError: as `promote`.
    """
    seeds = secrets.SystemRandom().sample(range(_LARGEST_SEED), gate.num_seeds)
    episodes = EvaluationConfig(
        seeds=tuple(seeds),
        episodes_per_seed=gate.episodes_per_seed,
        deterministic=config.evaluation.deterministic,
    )

    def earned(policy: PolicyOf) -> list[float]:
        returns, _ = play_episodes(policy, config, episodes, Stream.GATE)
        return returns

    opponent: PolicyOf = lambda environment: environment.rand_action  # noqa: E731
    if current:
        opponent = _policy_of(config, champions.policy(current))
    candidate_returns, opponent_returns = earned(_policy_of(config, candidate)), earned(opponent)
    bound = statistics.paired_lower_bound(candidate_returns, opponent_returns, gate.confidence)
    candidate_mean, opponent_mean = statistics.mean(candidate_returns), statistics.mean(opponent_returns)
    return Decision(
        task=champions.task,
        candidate=_described(candidate),
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
    )


def _policy_of(config: ExperimentConfig, checkpoint: Checkpoint) -> PolicyOf:
    """A checkpoint's policy with networks of its own sizes, on the task and the device of `config`."""
    if changed := differences(replace(config, environment=checkpoint.config.environment), config):
        listed = ", ".join(f"{name} = {change}" for name, change in changed.items())
        raise ConfigError(f"the checkpoint was trained on another task: {listed}")
    return trained_policy(replace(config, networks=checkpoint.config.networks), checkpoint)


def _decided(current: ChampionDecision, champions: Champions) -> Decision | None:
    """The gate's decision that made this policy champion; None if it cannot be read any more."""
    promotions = [each for each in champions.history() if each.policy == current.policy and each.evidence]
    try:
        decision: Decision = _DECISION.validate_json(json.dumps(promotions[-1].evidence))
    except (IndexError, ValidationError):
        return None
    return replace(decision, champion=current.number)


def _described(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "policy": policy_key(checkpoint),
        "config_hash": config_hash(checkpoint.config),
        "seed": checkpoint.config.seed,
        "iteration": checkpoint.iteration,
        "frames": checkpoint.frames,
    }


def _summary(decision: Decision) -> dict[str, Any]:
    """For the model card."""
    mean = decision.candidate_mean
    return {
        "mean return on gate seeds (95 %)": f"{mean.value:.4g} [{mean.low:.4g}, {mean.high:.4g}]",
        f"of {decision.opponent}, which it beat": f"{decision.opponent_mean.value:.4g}",
        "difference": f"{decision.difference:.4g}, with {decision.gate.confidence:.0%} confidence above "
        f"{decision.lower_bound:.4g}; {decision.test}",
    }
