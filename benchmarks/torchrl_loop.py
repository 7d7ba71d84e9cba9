"""Train with TorchRL's canonical multi-agent PPO loop: its collector, replay buffer and loss.

    python -m benchmarks.torchrl_loop SETTINGS DIRECTORY

A configuration of mappo sets the task, the sizes of the networks and the hyperparameters. The loop leaves out
the features that TorchRL's examples do not have: evaluation during training, checkpoints and a learning-rate
schedule.
"""

import logging
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictModuleBase
from torch import nn
from torchrl._utils import logger
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
from torchrl.envs import EnvBase
from torchrl.modules import MultiAgentMLP, ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from benchmarks.progress import Progress
from mappo.compute.resources import resolve_device
from mappo.config import ExperimentConfig, from_json
from mappo.environment.environment import make_environment
from mappo.environment.keys import ACTION, DONE, OBSERVATION, REWARD
from mappo.environment.random_streams import Stream, private_random_streams

VALUE, LOG_PROB = ("agents", "state_value"), ("agents", "action_log_prob")
_LOC, _SCALE = ("agents", "loc"), ("agents", "scale")
_EXPANDED = {name: ("next", "agents", name) for name in ("done", "terminated")}


OnIteration = Callable[[int, float, float, TensorDictModuleBase], object]


def main() -> None:
    """Train and report every iteration."""
    config = from_json(sys.argv[1])
    torch.set_num_threads(config.threads or torch.get_num_threads())
    progress = Progress(Path(sys.argv[2]))

    def on_iteration(
        frames: int, collect_seconds: float, learn_seconds: float, policy: TensorDictModuleBase
    ) -> None:
        progress.report_iteration(frames, collect_seconds, learn_seconds, dict(policy.named_parameters()))

    train(config, on_iteration)


def train(config: ExperimentConfig, on_iteration: OnIteration = lambda *_: None) -> TensorDictModuleBase:
    """Train from scratch to the end and return the policy.

    `on_iteration` is called with the frames so far, the seconds of collecting and learning, and the policy.
    """
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You requested advantage normalization", UserWarning)
        return _train(config, on_iteration)


def _train(config: ExperimentConfig, on_iteration: OnIteration) -> TensorDictModuleBase:
    device = resolve_device(config.device)
    learner, collection = config.learner, config.collection
    with private_random_streams(config.seed, Stream.TRAINING, device):
        environment = make_environment(
            config.environment, collection.num_envs, config.seed, Stream.TRAINING, device
        )
        policy, critic = (network.to(device) for network in _networks(config, environment))
        collector = Collector(
            environment,
            policy,
            frames_per_batch=collection.frames_per_batch,
            total_frames=collection.num_iterations * collection.frames_per_batch,
            device=device,
            auto_register_policy_transforms=False,
        )
        buffer = ReplayBuffer(
            storage=LazyTensorStorage(collection.frames_per_batch, device=device),
            sampler=SamplerWithoutReplacement(),
            batch_size=learner.minibatch_frames,
        )
        loss = _loss(config, policy, critic)
        optimiser = torch.optim.Adam(loss.parameters(), learner.learning_rate)
        frames, iteration_start = 0, time.perf_counter()
        for batch in collector:
            collect_end = time.perf_counter()
            _expand(batch)
            with torch.no_grad():
                loss.value_estimator(
                    batch, params=loss.critic_network_params, target_params=loss.target_critic_network_params
                )
            buffer.extend(batch.reshape(-1))
            for _ in range(learner.epochs * collection.frames_per_batch // learner.minibatch_frames):
                terms = loss(buffer.sample())
                total = terms["loss_objective"] + terms["loss_critic"]
                if learner.entropy_coefficient:
                    total = total + terms["loss_entropy"]
                total.backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), learner.max_gradient_norm)
                optimiser.step()
                optimiser.zero_grad()
            collector.update_policy_weights_()
            frames += batch.numel()
            on_iteration(frames, collect_end - iteration_start, time.perf_counter() - collect_end, policy)
            iteration_start = time.perf_counter()
        collector.shutdown()
    return policy


def _networks(config: ExperimentConfig, environment: EnvBase) -> tuple[ProbabilisticActor, TensorDictModule]:
    """Make a shared policy and a centralised critic from TorchRL's modules."""
    num_agents, num_features = environment.full_observation_spec_unbatched[OBSERVATION].shape
    action = environment.full_action_spec_unbatched[ACTION]
    sizes = {
        "n_agent_inputs": num_features,
        "n_agents": num_agents,
        "share_params": True,
        "num_cells": list(config.networks.hidden_sizes),
        "activation_class": {"tanh": nn.Tanh, "relu": nn.ReLU}[config.networks.activation],
    }
    actor = MultiAgentMLP(n_agent_outputs=2 * action.shape[-1], centralized=False, **sizes)
    policy = ProbabilisticActor(
        TensorDictModule(nn.Sequential(actor, NormalParamExtractor()), [OBSERVATION], [_LOC, _SCALE]),
        spec=environment.full_action_spec_unbatched,
        in_keys=[_LOC, _SCALE],
        out_keys=[ACTION],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": action.space.low, "high": action.space.high},
        return_log_prob=True,
        log_prob_key=LOG_PROB,
    )
    values = MultiAgentMLP(n_agent_outputs=1, centralized=True, **sizes)
    return policy, TensorDictModule(values, [OBSERVATION], [VALUE])


def _loss(config: ExperimentConfig, policy: ProbabilisticActor, critic: TensorDictModule) -> ClipPPOLoss:
    learner = config.learner
    loss = ClipPPOLoss(
        policy,
        critic,
        clip_epsilon=learner.clip_epsilon,
        entropy_bonus=bool(learner.entropy_coefficient),
        entropy_coeff=learner.entropy_coefficient,
        critic_coeff=learner.value_coefficient,
        normalize_advantage=learner.advantage_normalisation == "minibatch",
    )
    loss.set_keys(
        reward=REWARD,
        action=ACTION,
        value=VALUE,
        sample_log_prob=LOG_PROB,
        done=_EXPANDED["done"][1:],
        terminated=_EXPANDED["terminated"][1:],
    )
    loss.make_value_estimator(ValueEstimators.GAE, gamma=learner.discount, lmbda=learner.gae_lambda)
    return loss


def _expand(batch) -> None:  # type: ignore[no-untyped-def]
    """Copy the flags, which VMAS reports once per environment, to every agent, as the loss requires."""
    shape = batch["next", *REWARD].shape
    for name, key in (("done", DONE), ("terminated", "terminated")):
        batch[_EXPANDED[name]] = batch["next", key].unsqueeze(-1).expand(shape)


if __name__ == "__main__":
    main()
