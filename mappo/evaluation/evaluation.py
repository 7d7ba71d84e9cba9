"""The evaluation of a policy: episodes on held-out seeds, beside baselines on the same seeds."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, GroupName, config_hash, differences
from mappo.environment.draws import episodes_share_draws
from mappo.environment.random_streams import Stream
from mappo.environment.reductions import MeasurementName
from mappo.errors import NoHeuristic, NonFiniteReturn
from mappo.evaluation import statistics
from mappo.evaluation.episodes import PolicyOf, heuristic_policy, in_order, play_episodes, trained_policy
from mappo.evaluation.group_returns import GroupReturns, GroupReturnsRecorder
from mappo.evaluation.measurements import Measurement, Measurer, terminations
from mappo.evaluation.statistics import Estimate
from mappo.runs.checkpoint import Checkpoint
from mappo.strict_json import to_dict

_BY_EPISODE = "evaluation episodes of this one trained policy; another training seed may differ by more"
_BY_SEED = (
    "evaluation seeds of this one trained policy (Student's t over their means), because episodes of one seed "
    "share what the scenario draws once; another training seed may differ by more"
)


@dataclass(frozen=True)
class EpisodeReturns:
    """The episode returns of one policy, undiscounted, averaged over agents, and ordered by seed.

    episode_frames_mean: the mean length of an episode in frames. measurements: those of the scenario's `info()` by
    name, and `terminated`, the share of episodes that the task ended before the time limit; with intervals that
    resample the same values as those of the returns. groups: the returns of each group of agents by its name;
    empty if all agents are one group. Groups may have opposite rewards; then only their own returns tell how well
    they do.
    """

    episode_returns: list[float]
    mean: Estimate
    interquartile_mean: Estimate
    episode_frames_mean: float
    measurements: dict[MeasurementName, Measurement] = field(default_factory=dict)
    groups: dict[GroupName, GroupReturns] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationReport:
    """The results of a trained policy and of the baselines, on the same held-out episodes.

    config: the configuration of this evaluation. training_config: the configuration of the checkpoint; in a
    pipeline, both are the same. config_hash and training_config_hash: their hashes. started_from: the run that
    training started from; empty if it started from scratch. resampled: the values that the intervals resample.
    heuristic: the returns of the scenario's hand-written policy; if it is None, no_heuristic names the reason.
    checkpoint: the judged one: best, last or the number of an iteration; empty if an older version evaluated.
    run_frames: the frames of the run's newest checkpoint then; None if only the judged checkpoint was at hand.
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
    checkpoint: str = ""
    run_frames: int | None = None

    def policies(self) -> dict[str, EpisodeReturns]:
        """Return the returns of each policy by its name: the baselines first, then the trained policy."""
        baselines = {"random": self.random} | ({"heuristic": self.heuristic} if self.heuristic else {})
        return baselines | {"trained": self.trained}


def evaluate(
    config: ExperimentConfig, checkpoint: Checkpoint, which: str = "", run_frames: int | None = None
) -> EvaluationReport:
    """Play the episodes that `config.evaluation` describes with the checkpoint's policy and with the baselines.

    The task is `config.environment`. The evaluation has random streams of its own, so that it does not change a
    training that is in progress. `which` and `run_frames` are the report's `checkpoint` and `run_frames`.

    Raises:
        CheckpointError: the checkpoint's networks do not fit the task.
        ConfigError: the task does not exist, or the device is not available.
        NonFiniteReturn: the scenario gave a reward that is NaN or infinite.
    """
    policy = trained_policy(config, checkpoint)

    share_draws = episodes_share_draws(config.environment, resolve_device(config.device))
    per_seed = config.evaluation.episodes_per_seed

    def play(policy: PolicyOf) -> EpisodeReturns:
        measurer, by_group = Measurer(), GroupReturnsRecorder()
        on_frame = in_order(measurer.measure_frame, by_group.add_frame)
        returns, lengths = play_episodes(policy, config, config.evaluation, Stream.EVALUATION, on_frame)
        max_frames = config.environment.max_episode_frames
        return _summarise(returns, lengths, max_frames, measurer, by_group, per_seed if share_draws else 1)

    heuristic, no_heuristic = None, ""
    try:
        heuristic = play(partial(heuristic_policy, scenario=config.environment.scenario))
    except NoHeuristic as error:
        no_heuristic = str(error)
    except NonFiniteReturn as error:
        no_heuristic = f"with the heuristic policy, {error}"
    return EvaluationReport(
        config=to_dict(config),
        config_hash=config_hash(config),
        training_config=to_dict(checkpoint.config),
        training_config_hash=config_hash(checkpoint.config),
        training_frames=checkpoint.frames,
        started_from=checkpoint.started_from,
        resampled=_BY_SEED if share_draws else _BY_EPISODE,
        trained=play(policy),
        random=play(lambda environment: environment.rand_action),
        heuristic=heuristic,
        no_heuristic=no_heuristic,
        checkpoint=which,
        run_frames=run_frames,
    )


def changed_settings(report_config: ExperimentConfig, training_config: ExperimentConfig) -> dict[str, str]:
    """Return the fields that matter to an evaluation and differ from the training's, as `differences` does."""
    changes = differences(training_config, report_config)
    return {name: change for name, change in changes.items() if name.startswith(("environment.", "evaluation."))}


def _summarise(
    returns: list[float],
    lengths: list[float],
    max_frames: int,
    measurer: Measurer,
    by_group: GroupReturnsRecorder,
    share_draws: int,
) -> EpisodeReturns:
    """Return the summary of episodes, of which each `share_draws` in a row depend on each other."""
    average, middle = statistics.mean, statistics.interquartile_mean(returns)
    if share_draws > 1:
        average, middle = statistics.mean_over_seeds, Estimate(middle.value, None, None)
    return EpisodeReturns(
        episode_returns=returns,
        mean=average(statistics.by_seed(returns, share_draws)),
        interquartile_mean=middle,
        episode_frames_mean=sum(lengths) / len(lengths),
        measurements=terminations(lengths, max_frames, average, share_draws)
        | measurer.measurements(average, share_draws),  # a scenario's own `terminated` is the one that counts
        groups=by_group.returns(average, share_draws),
    )
