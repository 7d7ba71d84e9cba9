"""The update of the networks on a batch: advantages, epochs, minibatches, optimiser.

This file is long because it holds the whole update, in its order.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Adam
from torchrl.objectives.multiagent import MAPPOLoss
from torchrl.objectives.value import MultiAgentGAE

from mappo.compute.computation import Way
from mappo.compute.cuda_graphs import CudaGraphed
from mappo.compute.traced_function import TracedFunction
from mappo.config import LearnerConfig
from mappo.environment.frames import nested
from mappo.environment.groups import Group, merged
from mappo.environment.keys import (
    ACTION,
    DONE,
    MEMORIES,
    OBSERVATION,
    REWARD,
    STEP_COUNT,
    TERMINATED,
    Key,
    next_key,
)
from mappo.errors import NonFiniteLoss
from mappo.learning.gradients import Gradients, GroupLoss
from mappo.learning.memory import UNROLLED_INPUTS, estimates, first_memory, in_chunks, unrolled
from mappo.learning.networks import VALUE, GroupNetworks, Networks, observed

LOG_PROB = ("agents", "action_log_prob")  # [envs, time, agents], of the collecting policy
ADVANTAGE = ("agents", "advantage")  # [envs, time, agents, 1]
VALUE_TARGET = ("agents", "value_target")  # [envs, time, agents, 1]

LOSS_INPUTS = (OBSERVATION, ACTION, LOG_PROB, VALUE, VALUE_TARGET, ADVANTAGE)
LOSS_OUTPUTS = {  # name in `Losses` -> name in TorchRL's loss
    "loss_policy": "loss_objective",
    "loss_critic": "loss_critic",
    "loss_entropy": "loss_entropy",
    "kl": "kl_approx",
    "clip_fraction": "clip_fraction",
}


@dataclass(frozen=True)
class Losses:
    """The measures of one `Learner.update`; losses, kl, clip_fraction and norms are means over optimiser steps.

    loss_policy: negated clipped surrogate (dimensionless: advantages are standardised unless switched off).
    loss_critic: value_coefficient x distance between value and value target.
    loss_entropy: -entropy_coefficient x entropy; 0 without an entropy bonus.
    epochs: passes over the batch; fewer than configured if target_kl ended them early.
    kl: approximate Kullback-Leibler divergence of the new from the collecting policy, in nats per agent action.
    clip_fraction: share of probability ratios outside 1 +- clip_epsilon, in 0..1.
    entropy: entropy of the collecting policy in nats per agent action, the batch's mean of -log pi(a|o).
    explained_variance: 1 - Var(value_target - value) / Var(value_target) of the batch, before the update.
    gradient_norm_policy, gradient_norm_critic: gradient norms before clipping.
    learning_rate: the learning rate of all steps of this update.
    by_group: the same measures of each group if there are several, as `kl/adversary`. Then those above are sums of
    the groups' losses, norms of all gradients, the mean of the groups' explained variances, and means over agents.
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
    by_group: dict[str, float] = field(default_factory=dict)


class Learner:
    """The learner of multi-agent PPO: it improves a policy with a critic, batch by batch.

    Source: Schulman et al., Proximal Policy Optimization Algorithms (2017), equation 7; Yu et al., The
    Surprising Effectiveness of PPO in Cooperative Multi-Agent Games (2022), appendix A.
    """

    def __init__(
        self,
        config: LearnerConfig,
        networks: Networks,
        num_iterations: int,
        iteration: int = 0,
        update: Way = "plain",
    ):
        """Prepare the optimiser, the loss and the advantage estimator.

        num_iterations: the length of the run, which the learning-rate schedule spans.
        iteration: the number of updates before this learner, in a resumed run.
        update: the way in which gradients are computed; `config.update` may leave it open.
        """
        self.config = config
        self.networks = networks
        self.num_iterations, self.iteration = num_iterations, iteration
        parameters = list(networks.modules().parameters())
        device = parameters[0].device
        self.optimiser = _make_optimiser(parameters, config.learning_rate)
        # Adam itself skips steps while its flag `found_inf` (meant for GradScaler) is 1: the host need not wait.
        self._found_inf = self.optimiser.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        self._gae = _make_gae(config)
        self._losses = [_make_loss(config, part, networks.has_memory) for part in networks.parts]
        # The number of frames in a row of minibatches; with a memory, rows are chunks of frames.
        self._row_frames = config.chunk_frames if networks.has_memory else 1
        self._memories = MEMORIES if networks.has_memory else ()
        self._inputs = (*LOSS_INPUTS, *UNROLLED_INPUTS) if networks.has_memory else LOSS_INPUTS
        self._gradients = Gradients(
            self._losses,
            in_keys=self._inputs,
            outputs=LOSS_OUTPUTS,
            max_norm=config.max_gradient_norm,
            way=update,
        )
        self._step = self._optimiser_step if update == "plain" else CudaGraphed(self._optimiser_step)
        way: Way = "plain" if update == "plain" else "fast"  # bfloat16 would make advantages inexact
        self._estimates = TracedFunction(partial(_estimates, networks), networks.modules(), device, way)

    def prepare(self, frame: TensorDictBase, batch_frames: int) -> None:
        """Start to compile the update of batches of `batch_frames` frames; without this, the first update does.

        frame: a frame of the environment [envs], whose numbers do not matter.
        """
        observation, action = frame[OBSERVATION][0], frame[ACTION][0]
        value = observation.new_zeros(len(observation), 1)
        like: dict[Key, Tensor] = {
            **dict.fromkeys(self._inputs, value),
            OBSERVATION: observation,
            ACTION: action,
            LOG_PROB: value[:, 0],
            STEP_COUNT: frame[STEP_COUNT][0],
            **{key: memory[0] for key, memory in first_memory(self.networks.player, 1).items()},
        }
        size = self.config.minibatch_frames
        for frames in {min(size, batch_frames), batch_frames % size} - {0}:
            zeros = {key: tensor.new_zeros(1, frames, *tensor.shape) for key, tensor in like.items()}
            minibatch = self._in_rows(nested(zeros, [1, frames]))
            self._gradients.prepare(*(minibatch[key] for key in self._inputs))
            self._estimates.prepare(
                *(zeros[key][0] for key in (OBSERVATION, OBSERVATION, ACTION, *self._memories))
            )

    def wait(self) -> None:
        """Wait for everything that is being compiled.

        Raises:
            CompilationFailed: the compiler is missing or failed.
        """
        self._gradients.wait()
        self._estimates.wait()

    def update(self, batch: TensorDictBase) -> Losses:
        """Improve the networks on a contiguous batch [envs, time] and return the losses.

        Advantages are estimated first, on the batch in order of time; then frames, or chunks of frames for
        networks with a memory, are shuffled into minibatches. Every epoch visits every frame once. The last
        minibatch of an epoch is smaller if the frames do not divide evenly. The observation moments are updated
        last, so that the first step uses the networks that collected the batch.

        Raises:
            NonFiniteLoss: a loss term is NaN or infinite; the parameters are those of the last finite step.
        """
        learning_rate = self._set_learning_rate()
        self._estimate(batch)
        measures = self._measures(batch)
        frames = self._prepare_frames(batch)
        steps: list[Tensor] = []
        self._found_inf.zero_()
        epochs = 0
        while epochs < self.config.epochs:
            epoch = [self._step(*minibatch)[0].clone() for minibatch in self._shuffled(frames)]
            steps += epoch
            epochs += 1
            if self.config.target_kl and _largest_kl(self._means(epoch)) > self.config.target_kl:
                break
        self._require_finite(steps)
        self.iteration += 1
        self.networks.update_observation_moments(batch[OBSERVATION])
        measures |= self._means(steps)
        return Losses(
            **{"loss_entropy": 0.0, **{name: value for name, value in measures.items() if "/" not in name}},
            epochs=epochs,
            learning_rate=learning_rate,
            by_group={name: value for name, value in measures.items() if "/" in name},
        )

    def optimiser_tensors(self) -> dict[str, Tensor]:
        """Return Adam's state by names like `critic.module.network.0.weight.exp_avg`; empty before a step."""
        return {
            f"{name}.{key}": value.detach()
            for name, parameter in self.networks.modules().named_parameters()
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }

    def restore_optimiser(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore, before the first update, the state that `optimiser_tensors` returned for the same networks.

        Raises:
            ValueError: a tensor is missing, of another shape or type, or impossible; nothing is changed.
        """
        state: dict[Tensor, dict[str, Tensor]] = {}
        for name, parameter in self.networks.modules().named_parameters():
            shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            values = {key: tensors.get(f"{name}.{key}") for key in shapes}
            invalid = [
                key for key, value in values.items() if value is None or not _is_valid(value, shapes[key], key)
            ]
            if invalid:
                raise ValueError(
                    f"the optimiser's {', '.join(invalid)} of {name}: missing, of another shape or type, "
                    "or impossible"
                )
            state[parameter] = {
                key: value.to(parameter.device, copy=True) for key, value in values.items() if value is not None
            }
        self.optimiser.state.update(state)

    def _set_learning_rate(self) -> float:
        """Set and return the learning rate of this iteration, by the schedule."""
        is_linear = self.config.learning_rate_schedule == "linear"
        factor = 1 - self.iteration / self.num_iterations if is_linear else 1.0
        learning_rate = self.config.learning_rate * factor
        for group in self.optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        return learning_rate

    @torch.no_grad()
    def _estimate(self, batch: TensorDictBase) -> None:
        """Write values, targets, advantages and log-probabilities into the batch [envs, time]."""
        frames = (batch[key] for key in (OBSERVATION, next_key(OBSERVATION), ACTION, *self._memories))
        batch[VALUE], batch[next_key(VALUE)], batch[LOG_PROB] = self._map_minibatches(self._estimates, *frames)
        self._gae(batch)

    def _map_minibatches(self, function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> list[Tensor]:
        """Apply a function of frames to tensors [envs, time, ...], minibatch by minibatch to save memory."""
        minibatches = zip(
            *(torch.split(tensor.flatten(0, 1), self.config.minibatch_frames) for tensor in tensors), strict=True
        )
        outputs = (
            torch.cat(parts) for parts in zip(*(function(*minibatch) for minibatch in minibatches), strict=True)
        )
        return [output.reshape(*tensors[0].shape[:2], *output.shape[1:]) for output in outputs]

    def _prepare_frames(self, batch: TensorDictBase) -> TensorDictBase:
        """Return the batch's frames or chunks, with values and advantages in the units of the losses."""
        self._standardise_values(batch)
        if self.config.advantage_normalisation == "batch":
            batch[ADVANTAGE] = self._by_group(standardise, batch[ADVANTAGE])
        if self.config.advantage_normalisation == "agent":
            batch[ADVANTAGE] = standardise(batch[ADVANTAGE], per_agent=True)
        return self._in_rows(batch)

    def _in_rows(self, batch: TensorDictBase) -> TensorDictBase:
        """Return what the loss reads of a batch [envs, time] as rows of minibatches: frames or chunks."""
        inputs = batch.select(*self._inputs)
        return in_chunks(inputs, self._row_frames) if self.networks.has_memory else inputs.reshape(-1)

    def _standardise_values(self, batch: TensorDictBase) -> None:
        """Convert values and targets to standardised units, if the critic predicts standardised values.

        The critic's predictions are converted with the old moments, value targets with moments that include
        them.
        """
        values: list[Tensor] = []
        targets: list[Tensor] = []
        for part in self.networks.parts:
            moments = part.critic.module.moments
            if moments is None:
                return
            values.append(moments.standardise(part.group.rows(batch[VALUE])))
            moments.update(part.group.rows(batch[VALUE_TARGET]))
            targets.append(moments.standardise(part.group.rows(batch[VALUE_TARGET])))
        groups = self.networks.groups
        batch[VALUE], batch[VALUE_TARGET] = merged(groups, values), merged(groups, targets)

    def _by_group(self, function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
        """Return the results of a function of each group's share of values [..., agents, 1], in the same shape."""
        groups = self.networks.groups
        return merged(groups, [function(group.rows(values)) for group in groups])

    def _measures(self, batch: TensorDictBase) -> dict[str, float]:
        """Return the explained variance and the entropy by name: of all agents, and of each of several groups."""
        groups = self.networks.groups
        explained = {
            f"explained_variance/{group.name}": explained_variance(
                group.rows(batch[VALUE]), group.rows(batch[VALUE_TARGET])
            )
            for group in groups
        }
        known = [value for value in explained.values() if not math.isnan(value)]
        together = {
            "explained_variance": sum(known) / len(known) if known else math.nan,
            "entropy": -batch[LOG_PROB].mean().item(),
        }
        if len(groups) == 1:
            return together
        entropy = {f"entropy/{group.name}": -group.rows(batch[LOG_PROB], -1).mean().item() for group in groups}
        return {**together, **explained, **entropy}

    def _shuffled(self, frames: TensorDictBase) -> Iterable[tuple[Tensor, ...]]:
        """Return the minibatches of one epoch, which hold every frame or chunk once in random order."""
        order = torch.randperm(len(frames), device=frames.device)
        # One copy of all frames is ten times as fast as many.
        shuffled = (frames[key][order] for key in self._inputs)
        num_rows = self.config.minibatch_frames // self._row_frames
        return zip(*(torch.split(tensor, num_rows) for tensor in shuffled), strict=True)

    def _optimiser_step(self, *minibatch: Tensor) -> list[Tensor]:
        """Make one optimiser step on a minibatch of inputs; return losses and measures in one tensor."""
        frames = dict(zip(self._inputs, minibatch, strict=True))
        if self.config.advantage_normalisation == "minibatch":
            frames[ADVANTAGE] = self._by_group(standardise, frames[ADVANTAGE])
        values = self._gradients(*frames.values())
        self._found_inf.masked_fill_(~values.isfinite().all(), 1.0)
        self.optimiser.step()
        return [values]

    def _means(self, steps: list[Tensor]) -> dict[str, float]:
        """Return the mean over steps of each loss and measure, by name."""
        return dict(zip(self._gradients.names, torch.stack(steps).mean(0).tolist(), strict=True))

    def _require_finite(self, steps: list[Tensor]) -> None:
        """Raise if a loss of any step was not finite.

        Adam has skipped every step since then. One check after all steps means that the host waits once for a
        GPU.

        Raises:
            NonFiniteLoss: a loss or measure is NaN or infinite; the message names it.
        """
        if not self._found_inf:
            return
        for step in steps:
            values = zip(self._gradients.names, step.tolist(), strict=True)
            if terms := [f"{name} = {value}" for name, value in values if not math.isfinite(value)]:
                raise NonFiniteLoss(f"{', '.join(terms)}; training stopped before the optimiser's step")


def standardise(values: Tensor, per_agent: bool = False) -> Tensor:
    """Scale values [..., agents, 1] to zero mean and unit standard deviation, over all or for each agent.

    A single value has no deviation and becomes 0.
    """
    dims = [dim for dim in range(values.dim()) if not per_agent or dim != values.dim() - 2]
    centred = values - values.mean(dims, keepdim=True)
    return centred / values.std(dims, correction=0, keepdim=True).clamp_min(1e-6)


def explained_variance(value: Tensor, value_target: Tensor) -> float:
    """Return the share of the targets' variance that the values explain, or NaN if the targets do not vary.

    A share of 1 is perfect, 0 is no better than a constant.
    """
    variance = value_target.var(correction=0)
    return float(1 - (value_target - value).var(correction=0) / variance) if variance > 0 else float("nan")


def _estimates(
    networks: Networks, observation: Tensor, next_observation: Tensor, action: Tensor, *memories: Tensor
) -> list[Tensor]:
    """Return the values [frames, agents, 1] of both observations and log pi(a|o) [frames, agents]."""
    if networks.has_memory:
        return estimates(networks.policy, networks.critic, observation, next_observation, action, *memories)
    frames = observed(observation)
    critic = networks.critic.module
    log_prob = [part.policy.get_dist(frames).log_prob(part.group.actions(action)) for part in networks.parts]
    return [critic(observation), critic(next_observation), merged(networks.groups, log_prob, -1)]


def _make_optimiser(parameters: list[Parameter], learning_rate: float) -> Adam:
    """Make Adam. On a GPU, its learning rate is a tensor there, so that a CUDA graph can capture its steps."""
    device = parameters[0].device
    if device.type != "cuda":
        return Adam(parameters, learning_rate, fused=True)
    optimiser = Adam(parameters, torch.tensor(learning_rate, device=device), fused=True, capturable=True)
    optimiser._warned_capturable_if_run_uncaptured = True  # no warning: fused, a capturable step costs nothing
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


def _make_loss(config: LearnerConfig, part: GroupNetworks, is_unrolled: bool) -> GroupLoss:
    if is_unrolled:
        policy, critic = unrolled(part.policy, part.critic, VALUE)
    else:
        policy = part.policy
        critic = TensorDictModule(part.critic.module.predict, in_keys=[OBSERVATION], out_keys=[VALUE])
    loss = MAPPOLoss(
        policy,
        critic,
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
    return GroupLoss(part.group, part.modules(), loss, partial(_share, part.group))


def _share(group: Group, key: NestedKey, tensor: Tensor) -> Tensor:
    """Return a group's share of an input of the loss. Networks cut their share out of observations themselves.

    Memories and step counts are those of a single group.
    """
    if key == OBSERVATION or key in UNROLLED_INPUTS:
        return tensor
    if key == ACTION:
        return group.actions(tensor)
    return group.rows(tensor, -1 if key == LOG_PROB else -2)


def _largest_kl(means: Mapping[str, float]) -> float:
    """Return the divergence of the group whose policy has changed most."""
    return max(value for name, value in means.items() if name.partition("/")[0] == "kl")


def _is_valid(value: Tensor, shape: torch.Size, key: str) -> bool:
    if value.shape != shape or value.dtype != torch.float32:
        return False
    least = -torch.inf if key == "exp_avg" else 0.0  # the count of steps and mean squares are never negative
    return bool((value.isfinite() & (value >= least)).all())
