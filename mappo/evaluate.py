"""How good a policy is: episodes from held-out seeds, beside a random policy on the same seeds."""

from dataclasses import dataclass

import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo import statistics
from mappo.checkpoint import Checkpoint, restore_networks
from mappo.config import EnvironmentConfig, EvaluationConfig, ExperimentConfig, config_hash
from mappo.environment import (
    DONE,
    REWARD,
    Stream,
    make_environment,
    private_random_streams,
    resolve_device,
)
from mappo.networks import make_networks
from mappo.statistics import Estimate


class NonFiniteReturn(ArithmeticError):
    """An episode's return is NaN or infinite, so there is nothing to average."""


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
    """A trained and a random policy on the same held-out episodes.

    config_hash is that of the configuration evaluated with; training_config_hash that of the checkpoint's, which
    is the same in a pipeline. resampled says what the intervals resample.
    """

    config_hash: str
    training_config_hash: str
    training_frames: int
    seeds: list[int]
    episodes_per_seed: int
    deterministic: bool
    resampled: str
    trained: EpisodeReturns
    random: EpisodeReturns


def evaluate(config: ExperimentConfig, checkpoint: Checkpoint) -> EvaluationReport:
    """Play the episodes that `config.evaluation` describes with the checkpoint's policy and with a random one.

    The task is `config.environment`. Random streams are this function's own: evaluating in the middle of
    training does not change training.

    Raises:
        CheckpointError: the checkpoint's networks do not fit the task.
        ConfigError: the task or the device is not there.
        NonFiniteReturn: the scenario paid a reward that is not finite.
    """
    device = resolve_device(config.device)
    with private_random_streams(0, Stream.EVALUATION, device):
        environment = make_environment(config.environment, 1, 0, Stream.EVALUATION, device)
        networks = make_networks(config.networks, environment)
        restore_networks(checkpoint, networks)
        trained = play_episodes(networks.policy, config.environment, config.evaluation, device)
        random = play_episodes(None, config.environment, config.evaluation, device)
    return EvaluationReport(
        config_hash=config_hash(config),
        training_config_hash=config_hash(checkpoint.config),
        training_frames=checkpoint.frames,
        seeds=list(config.evaluation.seeds),
        episodes_per_seed=config.evaluation.episodes_per_seed,
        deterministic=config.evaluation.deterministic,
        resampled=RESAMPLED,
        trained=trained,
        random=random,
    )


def play_episodes(
    policy: TensorDictModuleBase | None,
    environment: EnvironmentConfig,
    evaluation: EvaluationConfig,
    device: torch.device,
) -> EpisodeReturns:
    """One episode in each of `episodes_per_seed` parallel environments, for each seed.

    Without a policy, actions are drawn uniformly from the action space: the baseline that training must beat.
    Initial states depend on the seed alone, not on the policy, so two policies meet the same ones.
    """
    returns: list[float] = []
    lengths: list[float] = []
    for seed in evaluation.seeds:
        with private_random_streams(seed, Stream.EVALUATION, device):
            env = make_environment(environment, evaluation.episodes_per_seed, seed, Stream.EVALUATION, device)
            seed_returns, seed_lengths = _first_episodes(env, policy, evaluation.deterministic)
        if not seed_returns.isfinite().all():
            episode = int((~seed_returns.isfinite()).nonzero()[0])
            raise NonFiniteReturn(
                f"the return of episode {episode} of seed {seed} is {seed_returns[episode].item()}: the scenario "
                "must keep its rewards finite"
            )
        returns += seed_returns.tolist()
        lengths += seed_lengths.tolist()
    return EpisodeReturns(
        episode_returns=returns,
        mean=statistics.mean(returns),
        interquartile_mean=statistics.interquartile_mean(returns),
        episode_frames_mean=sum(lengths) / len(lengths),
    )


@torch.no_grad()
def _first_episodes(
    environment: EnvBase, policy: TensorDictModuleBase | None, deterministic: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return and length [envs] of each environment's first episode; later frames of ended ones do not count."""
    act = policy or environment.rand_action
    state = environment.reset()
    running = torch.ones(environment.batch_size, dtype=torch.bool, device=environment.device)
    returns = torch.zeros(environment.batch_size, device=environment.device)
    lengths = torch.zeros_like(returns)
    exploration = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    with set_exploration_type(exploration):
        while running.any():
            state = environment.step(act(state))["next"]
            reward = state[REWARD].mean((-2, -1))
            returns = torch.where(running, returns + reward, returns)
            lengths += running
            running = running & ~state[DONE].squeeze(-1)
    return returns, lengths
