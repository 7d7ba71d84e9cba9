"""How good a policy is: episodes from held-out seeds, beside baselines on the same seeds."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo import statistics
from mappo.checkpoint import Checkpoint, restore_networks
from mappo.config import EvaluationConfig, ExperimentConfig, SelectionConfig, config_hash, to_dict
from mappo.environment import (
    ACTION,
    DONE,
    OBSERVATION,
    REWARD,
    Stream,
    make_environment,
    private_random_streams,
    require_finite_observations,
    resolve_device,
    scenario_module,
)
from mappo.networks import make_networks
from mappo.statistics import Estimate


class NonFiniteReturn(ArithmeticError):
    """An episode's return is NaN or infinite, so there is nothing to average."""


class NoHeuristic(Exception):
    """The scenario has no heuristic policy for this task, or it cannot be run; the message says why."""


RESAMPLED = "evaluation episodes of this one trained policy; another training seed may differ by more"

Act = Callable[[TensorDictBase], TensorDictBase]  # writes the actions of all agents into the state
PolicyOf = Callable[[EnvBase], Act]
OnFrame = Callable[[EnvBase, torch.Tensor, torch.Tensor | None], object]
"""Sees an environment, which of its episodes had not ended before this frame [envs], and its rewards [envs]."""


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


def trained_policy(config: ExperimentConfig, checkpoint: Checkpoint) -> PolicyOf:
    """The policy of a checkpoint, for the task of a configuration.

    Raises:
        CheckpointError: the checkpoint's networks do not fit the task.
        ConfigError: the task or the device is not there.
    """
    device = resolve_device(config.device)
    with private_random_streams(0, Stream.EVALUATION, device):
        environment = make_environment(config.environment, 1, 0, Stream.EVALUATION, device)
        networks = make_networks(config.networks, environment)
        restore_networks(checkpoint, networks)
    return lambda _: networks.policy


def play_episodes(
    policy: PolicyOf,
    config: ExperimentConfig,
    episodes: EvaluationConfig | SelectionConfig,
    stream: Stream,
    on_frame: OnFrame | None = None,
) -> tuple[list[float], list[float]]:
    """Returns, and lengths in frames, of one episode in each of `episodes_per_seed` environments, for each seed.

    `policy` makes the function that acts in an environment. Initial states depend on seed and stream alone, not
    on the policy, so two policies meet the same ones.

    Raises:
        NonFiniteObservation: naming environment and agent.
        NonFiniteReturn: naming the episode.
    """
    device = resolve_device(config.device)
    returns: list[float] = []
    lengths: list[float] = []
    for seed in episodes.seeds:
        with private_random_streams(seed, stream, device):
            environment = make_environment(config.environment, episodes.episodes_per_seed, seed, stream, device)
            seed_returns, seed_lengths = _first_episodes(
                environment, policy(environment), config.evaluation.deterministic, on_frame
            )
        if not seed_returns.isfinite().all():
            episode = int((~seed_returns.isfinite()).nonzero()[0])
            raise NonFiniteReturn(
                f"the return of episode {episode} of seed {seed} is {seed_returns[episode].item()}: the scenario "
                "must keep its rewards finite"
            )
        returns += seed_returns.tolist()
        lengths += seed_lengths.tolist()
    return returns, lengths


def _summarise(returns: list[float], lengths: list[float]) -> EpisodeReturns:
    return EpisodeReturns(
        episode_returns=returns,
        mean=statistics.mean(returns),
        interquartile_mean=statistics.interquartile_mean(returns),
        episode_frames_mean=sum(lengths) / len(lengths),
    )


@torch.no_grad()
def _first_episodes(
    environment: EnvBase, act: Act, deterministic: bool, on_frame: OnFrame | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return and length [envs] of each environment's first episode.

    Ended ones are simulated on, but their frames do not count and what they show is not acted upon.
    """
    state = environment.reset()
    running = torch.ones(environment.batch_size, dtype=torch.bool, device=environment.device)
    returns = torch.zeros(environment.batch_size, device=environment.device)
    lengths = torch.zeros_like(returns)
    if on_frame:
        on_frame(environment, running, None)
    exploration = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    with set_exploration_type(exploration):
        while running.any():
            require_finite_observations(state[OBSERVATION])
            state = environment.step(act(state))["next"]
            reward = state[REWARD].mean((-2, -1))
            returns = torch.where(running, returns + reward, returns)
            lengths += running
            if on_frame:
                on_frame(environment, running, reward)
            running = running & ~state[DONE].squeeze(-1)
            state[OBSERVATION] = torch.where(running[:, None, None], state[OBSERVATION], 0.0)
    return returns, lengths


def heuristic_policy(environment: EnvBase, scenario: str) -> Act:
    """The `HeuristicPolicy` of the module that defines the scenario, acting for each agent in turn.

    It is foreign code, in some scenarios with dependencies of its own: whatever it raises is a reason.
    """
    module, simulator = scenario_module(scenario), environment.base_env._env
    if not hasattr(module, "HeuristicPolicy"):
        raise NoHeuristic(f"{module.__name__} defines no HeuristicPolicy")
    if not simulator.continuous_actions:
        raise NoHeuristic("heuristic policies give continuous actions, which this configuration does not take")

    def act(state: TensorDictBase) -> TensorDictBase:
        with _as_reason(module.__name__):
            actions = [
                heuristic.compute_action(state[OBSERVATION][:, index], u_range=agent.u_range)
                for index, agent in enumerate(simulator.agents)
            ]
            stacked = torch.stack(actions, dim=1)
            if stacked.shape != environment.full_action_spec[ACTION].shape or not stacked.isfinite().all():
                raise ValueError(f"actions {list(stacked.shape)} do not fit the task or are not finite")
            return state.set(ACTION, stacked)

    with _as_reason(module.__name__):
        heuristic = module.HeuristicPolicy(continuous_action=True)
    return act


@contextmanager
def _as_reason(module: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise NoHeuristic(f"{module}.HeuristicPolicy: {type(error).__name__}: {error}") from error
