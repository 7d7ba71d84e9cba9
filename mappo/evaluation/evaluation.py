"""How good a policy is: episodes from held-out seeds, beside baselines on the same seeds."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from mappo.config import ExperimentConfig, config_hash
from mappo.environment.random_streams import Stream
from mappo.errors import NoHeuristic, NonFiniteReturn
from mappo.evaluation import statistics
from mappo.evaluation.episodes import PolicyOf, heuristic_policy, play_episodes, trained_policy
from mappo.evaluation.statistics import Estimate
from mappo.runs.checkpoint import Checkpoint
from mappo.strict_json import to_dict

RESAMPLED = "evaluation episodes of this one trained policy; another training seed may differ by more"


@dataclass(frozen=True)
class EpisodeReturns:
    """Undiscounted episode returns, mean over agents, in the order of seeds; lengths in frames."""

    episode_returns: list[float]
    mean: Estimate
    interquartile_mean: Estimate
    episode_frames_mean: float


@dataclass(frozen=True)
class EvaluationReport:
    """A trained policy and baselines on the same held-out episodes.

    config is the configuration evaluated with, training_config the checkpoint's, which is the same in a pipeline;
    the hashes are theirs; started_from is empty for training from scratch. resampled says what the intervals
    resample. heuristic is the scenario's own hand-written policy; where it is None, no_heuristic says why.
    """

    config: dict[str, Any]
    config_hash: str
    training_config: dict[str, Any]
    training_config_hash: str
    training_frames: int
    started_from: str
    resampled: str
    trained: EpisodeReturns
    random: EpisodeReturns
    heuristic: EpisodeReturns | None
    no_heuristic: str

    def policies(self) -> dict[str, EpisodeReturns]:
        """What each policy earned, by its name, from the baselines up."""
        baselines = {"random": self.random} | ({"heuristic": self.heuristic} if self.heuristic else {})
        return baselines | {"trained": self.trained}


def evaluate(config: ExperimentConfig, checkpoint: Checkpoint) -> EvaluationReport:
    """Play the episodes that `config.evaluation` describes with the checkpoint's policy and with the baselines.

    The task is `config.environment`. Random streams are this function's own: evaluating in the middle of
    training does not change training.

    Raises:
        CheckpointError: the checkpoint's networks do not fit the task.
        ConfigError: the task or the device is not there.
        NonFiniteReturn: the scenario paid a reward that is not finite.
    """
    policy = trained_policy(config, checkpoint)

    def earned(policy: PolicyOf) -> EpisodeReturns:
        return _summarise(*play_episodes(policy, config, config.evaluation, Stream.EVALUATION))

    heuristic, no_heuristic = None, ""
    try:
        heuristic = earned(partial(heuristic_policy, scenario=config.environment.scenario))
    except NoHeuristic as reason:
        no_heuristic = str(reason)
    except NonFiniteReturn as error:
        no_heuristic = f"under it, {error}"
    return EvaluationReport(
        config=to_dict(config),
        config_hash=config_hash(config),
        training_config=to_dict(checkpoint.config),
        training_config_hash=config_hash(checkpoint.config),
        training_frames=checkpoint.frames,
        started_from=checkpoint.started_from,
        resampled=RESAMPLED,
        trained=earned(policy),
        random=earned(lambda environment: environment.rand_action),
        heuristic=heuristic,
        no_heuristic=no_heuristic,
    )


def _summarise(returns: list[float], lengths: list[float]) -> EpisodeReturns:
    return EpisodeReturns(
        episode_returns=returns,
        mean=statistics.mean(returns),
        interquartile_mean=statistics.interquartile_mean(returns),
        episode_frames_mean=sum(lengths) / len(lengths),
    )
