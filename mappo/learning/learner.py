"""One batch in, improved policy and losses out: advantages, epochs, minibatches, optimiser."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam
from torchrl.modules import ProbabilisticActor
from torchrl.objectives.multiagent import MAPPOLoss
from torchrl.objectives.value import MultiAgentGAE

from mappo.compute.cuda_graphs import CudaGraphed
from mappo.compute.traced_function import TracedFunction
from mappo.config import LearnerConfig
from mappo.environment.keys import ACTION, DONE, OBSERVATION, REWARD, TERMINATED, next_key
from mappo.errors import NonFiniteLoss
from mappo.learning.gradients import Gradients
from mappo.learning.networks import VALUE, Networks

LOG_PROB = ("agents", "action_log_prob")  # [envs, time, agents], of the collecting policy
ADVANTAGE = ("agents", "advantage")  # [envs, time, agents, 1]
VALUE_TARGET = ("agents", "value_target")  # [envs, time, agents, 1]

LEARNED_FROM = (OBSERVATION, ACTION, LOG_PROB, VALUE, VALUE_TARGET, ADVANTAGE)
LOSS_OUTPUTS = {  # names of ours, and of TorchRL's loss
    "loss_policy": "loss_objective",
    "loss_critic": "loss_critic",
    "loss_entropy": "loss_entropy",
    "kl": "kl_approx",
    "clip_fraction": "clip_fraction",
}


@dataclass(frozen=True)
class Losses:
    """What one `Learner.update` did; unless it says otherwise, the mean over its optimiser steps.

    loss_policy: clipped surrogate, negated (dimensionless: advantages are standardised unless switched off).
    loss_critic: value_coefficient x distance between value and value target.
    loss_entropy: -entropy_coefficient x entropy; 0 when there is no bonus.
    kl: approximate Kullback-Leibler divergence of the new from the collecting policy, in nats an agent action.
    clip_fraction: share of probability ratios outside 1 +- clip_epsilon, in 0..1.
    epochs: passes over the batch; fewer than configured when target_kl stopped them.
    entropy: of the collecting policy, in nats an agent action, estimated on the batch as mean -log pi(a|o).
    explained_variance: 1 - Var(value_target - value) / Var(value_target) of the batch, before the update.
    gradient_norm_policy, gradient_norm_critic: before clipping.
    learning_rate: of all steps of this update.
    """

    loss_policy: float
    loss_critic: float
    loss_entropy: float
    epochs: int
    kl: float
    clip_fraction: float
    entropy: float
    explained_variance: float
    gradient_norm_policy: float
    gradient_norm_critic: float
    learning_rate: float


class Learner:
    """Proximal policy optimisation of a shared policy with a centralised critic.

    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), equation 7; Yu et al., The
    Surprising Effectiveness of PPO in Cooperative Multi-Agent Games (2022), appendix A.
    """

    def __init__(self, config: LearnerConfig, networks: Networks, num_iterations: int, iteration: int = 0):
        """`num_iterations` is the length of the run, which the learning-rate schedule spans.

        `iteration` counts the updates that are done already, when a run goes on.
        """
        self.config = config
        self.networks = networks
        self.num_iterations, self.iteration = num_iterations, iteration
        parameters = list(networks.modules().parameters())
        device = parameters[0].device
        self.optimiser = _make_optimiser(parameters, config.learning_rate)
        self._failed = self.optimiser.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        self._gae = _make_gae(config)
        self._loss = _make_loss(config, networks)
        self._gradients = Gradients(
            networks.modules(),
            self._loss,
            in_keys=LEARNED_FROM,
            outputs=LOSS_OUTPUTS,
            max_norm=config.max_gradient_norm,
            way=config.update,
        )
        self._step = self._step_on if config.update == "plain" else CudaGraphed(self._step_on)
        self._log_prob = TracedFunction(partial(_log_prob, networks.policy), networks.policy, device)

    def update(self, batch: TensorDictBase) -> Losses:
        """Improve the networks on a contiguous batch [envs, time].

        Advantages come first, on the batch in its order of time; only then are frames shuffled into minibatches.
        Every epoch visits every frame once; the last minibatch of an epoch is smaller when they do not divide.
        Observations count into the running moments last, so that the batch is learned from by the networks that
        collected it.

        Raises:
            NonFiniteLoss: a loss term is NaN or infinite; parameters are those of the last good step.
        """
        learning_rate = self._set_learning_rate()
        self._estimate(batch)
        explained, entropy = explained_variance(batch[VALUE], batch[VALUE_TARGET]), -batch[LOG_PROB].mean().item()
        frames = self._frames(batch)
        steps: list[Tensor] = []
        self._failed.zero_()
        epochs = 0
        while epochs < self.config.epochs:
            epoch = [self._step(*minibatch)[0].clone() for minibatch in self._shuffled(frames)]
            steps += epoch
            epochs += 1
            if self.config.target_kl and self._means(epoch)["kl"] > self.config.target_kl:
                break
        self._require_finite(steps)
        self.iteration += 1
        self.networks.update_observation_moments(batch[OBSERVATION])
        return Losses(
            **{"loss_entropy": 0.0, **self._means(steps)},
            epochs=epochs,
            learning_rate=learning_rate,
            entropy=entropy,
            explained_variance=explained,
        )

    def optimiser_tensors(self) -> dict[str, Tensor]:
        """What Adam remembers, by names such as `critic.module.network.0.weight.exp_avg`; empty before a step."""
        return {
            f"{name}.{key}": value.detach()
            for name, parameter in self.networks.modules().named_parameters()
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }

    def restore_optimiser(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `optimiser_tensors` of the same networks gave, before the first update.

        Raises:
            ValueError: a tensor is missing, of another shape or type, or not finite; nothing is changed.
        """
        state: dict[Tensor, dict[str, Tensor]] = {}
        for name, parameter in self.networks.modules().named_parameters():
            shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            own = {key: tensors.get(f"{name}.{key}") for key in shapes}
            bad = [key for key, value in own.items() if value is None or not _is_like(value, shapes[key])]
            if bad:
                raise ValueError(
                    f"the optimiser's {', '.join(bad)} of {name}: missing, of another shape or type, or not finite"
                )
            state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in own.items() if value is not None
            }
        self.optimiser.state.update(state)

    def _set_learning_rate(self) -> float:
        """That of this iteration, by the schedule."""
        left = 1 - self.iteration / self.num_iterations if self.config.learning_rate_schedule == "linear" else 1.0
        learning_rate = self.config.learning_rate * left
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        return learning_rate

    @torch.no_grad()
    def _estimate(self, batch: TensorDictBase) -> None:
        """Write values, targets, advantages and log-probabilities into the batch [envs, time]."""
        for key, observation in ((VALUE, OBSERVATION), (next_key(VALUE), next_key(OBSERVATION))):
            batch[key] = self._in_minibatches(self.networks.critic.module, batch[observation])
        self._gae(batch)
        batch[LOG_PROB] = self._in_minibatches(
            lambda *each: self._log_prob(*each)[0], batch[OBSERVATION], batch[ACTION]
        )

    def _in_minibatches(self, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """What a function of frames gives for tensors [envs, time, ...], in little memory."""
        minibatches = zip(
            *(torch.split(each.flatten(0, 1), self.config.minibatch_frames) for each in tensors), strict=True
        )
        together = torch.cat([function(*each) for each in minibatches])
        return together.reshape(*tensors[0].shape[:2], *together.shape[1:])

    def _frames(self, batch: TensorDictBase) -> TensorDictBase:
        """The frames to learn from, [envs x time], in the units that the losses compare."""
        self._standardise_values(batch)
        if self.config.advantage_normalisation == "batch":
            batch[ADVANTAGE] = standardise(batch[ADVANTAGE])
        if self.config.advantage_normalisation == "agent":
            batch[ADVANTAGE] = standardise(batch[ADVANTAGE], each_agent=True)
        return batch.select(*LEARNED_FROM).reshape(-1)

    def _standardise_values(self, batch: TensorDictBase) -> None:
        """Where the critic predicts standardised values: what it did predict, and targets to learn."""
        moments = self.networks.critic.module.moments
        if moments is not None:
            batch[VALUE] = moments.standardise(batch[VALUE])
            moments.update(batch[VALUE_TARGET])
            batch[VALUE_TARGET] = moments.standardise(batch[VALUE_TARGET])

    def _shuffled(self, frames: TensorDictBase) -> Iterable[tuple[Tensor, ...]]:
        """An epoch: every frame once, in minibatches. All are copied at once, in a tenth of the time."""
        order = torch.randperm(len(frames), device=frames.device)
        shuffled = (frames[key][order] for key in LEARNED_FROM)
        return zip(*(torch.split(each, self.config.minibatch_frames) for each in shuffled), strict=True)

    def _step_on(self, *minibatch: Tensor) -> list[Tensor]:
        """One optimiser step on a minibatch of what is `LEARNED_FROM`; its losses and measures, in one tensor."""
        frames = dict(zip(LEARNED_FROM, minibatch, strict=True))
        if self.config.advantage_normalisation == "minibatch":
            frames[ADVANTAGE] = standardise(frames[ADVANTAGE])
        values = self._gradients(*frames.values())
        self._failed.masked_fill_(~values.isfinite().all(), 1.0)
        self.optimiser.step()
        return [values]

    def _means(self, steps: list[Tensor]) -> dict[str, float]:
        """Of each loss and measure, by name."""
        return dict(zip(self._gradients.names, torch.stack(steps).mean(0).tolist(), strict=True))

    def _require_finite(self, steps: list[Tensor]) -> None:
        """Once a loss was not finite, Adam has changed nothing, and no GPU was waited for to know."""
        if not self._failed:
            return
        for step in steps:
            named = zip(self._gradients.names, step.tolist(), strict=True)
            if bad := [f"{name} = {value}" for name, value in named if not math.isfinite(value)]:
                raise NonFiniteLoss(f"{', '.join(bad)}; training stopped, and the optimiser did not step on it")


def standardise(values: Tensor, each_agent: bool = False) -> Tensor:
    """Zero mean and unit standard deviation, over everything or over each agent's share.

    [..., agents, 1] -> [..., agents, 1]. A single value has no spread and becomes 0.
    """
    dims = [dim for dim in range(values.dim()) if not each_agent or dim != values.dim() - 2]
    centred = values - values.mean(dims, keepdim=True)
    return centred / values.std(dims, correction=0, keepdim=True).clamp_min(1e-6)


def explained_variance(value: Tensor, value_target: Tensor) -> float:
    """Share of the targets' variance that the values account for: 1 is perfect, 0 no better than a constant.

    NaN when the targets do not vary.
    """
    variance = value_target.var(correction=0)
    return float(1 - (value_target - value).var(correction=0) / variance) if variance > 0 else float("nan")


def _log_prob(policy: ProbabilisticActor, observation: Tensor, action: Tensor) -> list[Tensor]:
    """Observations and actions [frames, agents, ...] -> log pi(a|o) [frames, agents]."""
    frames = TensorDict({OBSERVATION: observation}, batch_size=[len(observation)])
    return [policy.get_dist(frames).log_prob(action)]


def _make_optimiser(parameters: list[Parameter], learning_rate: float) -> Adam:
    """On a GPU, one whose steps can be recorded: the learning rate is there, too."""
    device = parameters[0].device
    if device.type != "cuda":
        return Adam(parameters, learning_rate, fused=True)
    optimiser = Adam(parameters, torch.tensor(learning_rate, device=device), fused=True, capturable=True)
    optimiser._warned_capturable_if_run_uncaptured = True  # fused, it costs nothing
    return optimiser


def _make_gae(config: LearnerConfig) -> MultiAgentGAE:
    gae = MultiAgentGAE(gamma=config.discount, lmbda=config.gae_lambda, value_network=None)
    gae.set_keys(
        value=VALUE,
        advantage=ADVANTAGE,
        value_target=VALUE_TARGET,
        reward=REWARD,
        done=DONE,
        terminated=TERMINATED,
    )
    return gae


def _make_loss(config: LearnerConfig, networks: Networks) -> MAPPOLoss:
    loss = MAPPOLoss(
        networks.policy,
        TensorDictModule(networks.critic.module.predict, in_keys=[OBSERVATION], out_keys=[VALUE]),
        clip_epsilon=config.clip_epsilon,
        entropy_bonus=config.entropy_coefficient > 0,
        entropy_coeff=config.entropy_coefficient,
        critic_coeff=config.value_coefficient,
        loss_critic_type=config.value_loss,
        clip_value=config.value_clip_epsilon or None,
        normalize_advantage=False,
        functional=False,
    )
    loss.set_keys(
        value=VALUE, advantage=ADVANTAGE, value_target=VALUE_TARGET, action=ACTION, sample_log_prob=LOG_PROB
    )
    return loss


def _is_like(value: Tensor, shape: torch.Size) -> bool:
    return value.shape == shape and value.dtype == torch.float32 and bool(value.isfinite().all())
