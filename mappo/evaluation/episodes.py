"""The episodes of a policy on given seeds. The policy is trained, random or heuristic."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from mappo.compute.computation import Simulation
from mappo.compute.resources import resolve_device
from mappo.config import EvaluationConfig, ExperimentConfig, SelectionConfig
from mappo.environment.environment import groups_of, make_environment, scenario_module
from mappo.environment.frames import require_finite_observations
from mappo.environment.groups import mean_reward, padded
from mappo.environment.keys import ACTION, DONE, OBSERVATION, REWARD
from mappo.environment.random_streams import Stream, private_random_streams
from mappo.errors import NoHeuristic, NonFiniteReturn, NotFaithful
from mappo.fast_simulation.making import make_fast_simulation, most_operations
from mappo.fast_simulation.simulation import FastSimulation
from mappo.learning.memory import remembering
from mappo.learning.networks import make_networks
from mappo.runs.checkpoint import Checkpoint, restore_networks

_PACKAGES = {"cvxpy": "cvxpylayers"}  # the package that brings a module, if its name is another one

Act = Callable[[TensorDictBase], TensorDictBase]  # writes the actions of all agents into the state
PolicyOf = Callable[[EnvBase], Act]  # makes the function that acts in this environment
Step = Callable[[TensorDictBase], TensorDictBase]  # from a state with its actions to the next state
OnState = Callable[[torch.Tensor, torch.Tensor | None], object]  # an `OnFrame` of one environment
OnFrame = Callable[[EnvBase, torch.Tensor, torch.Tensor | None], object]
"""The callback of frames. Its arguments are the environment, a mask [envs] of the episodes that were running
before this frame, and the rewards [envs, agents], which are None after the reset."""


def trained_policy(config: ExperimentConfig, checkpoint: Checkpoint) -> PolicyOf:
    """Return the policy of a checkpoint, for the task of a configuration.

    Raises:
        CheckpointError: the checkpoint's networks do not fit the task.
        ConfigError: the task does not exist, or the device is not available.
    """
    device = resolve_device(config.device)
    with private_random_streams(0, Stream.EVALUATION, device):
        environment = make_environment(config.environment, 1, 0, Stream.EVALUATION, device)
        networks = make_networks(config.networks, environment)
        restore_networks(checkpoint, networks)
    return lambda _: remembering(networks.policy)


def play_episodes(
    policy: PolicyOf,
    config: ExperimentConfig,
    episodes: EvaluationConfig | SelectionConfig,
    stream: Stream,
    on_frame: OnFrame | None = None,
    simulation: Simulation = "plain",
) -> tuple[list[float], list[float]]:
    """Play `episodes_per_seed` episodes for each seed; return their returns and their lengths in frames.

    Each episode has an environment of its own. Initial states depend only on seed and stream, so that two
    policies start from the same states. `on_frame` is called after the reset of each seed's environments, and
    after every frame, but not in the fast simulation. A scenario that cannot be compiled is played plainly.

    Raises:
        CompilationFailed: the simulation is fast, and the compiler is missing or failed.
        NonFiniteObservation: an observation is NaN or infinite; the message names environment and agent.
        NonFiniteReturn: the return of an episode is NaN or infinite; the message names the episode.
    """
    device = resolve_device(config.device)
    returns: list[float] = []
    lengths: list[float] = []
    for seed in episodes.seeds:
        with private_random_streams(seed, stream, device):
            environment = make_environment(config.environment, episodes.episodes_per_seed, seed, stream, device)
            act = policy(environment)
            fast = _fast_simulation(config, environment) if simulation == "fast" else None
            on_state = partial(on_frame, environment) if on_frame and fast is None else None
            max_frames = config.environment.max_episode_frames
            steps = _fast_steps(fast, max_frames) if fast else _plain_steps(environment)
            mean = partial(mean_reward, groups_of(environment))
            seed_returns, seed_lengths = _first_episodes(
                steps, act, config.evaluation.deterministic, on_state, mean
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


def in_order(*callbacks: OnFrame) -> OnFrame:
    """Return a callback of frames that calls these callbacks in order."""

    def on_frame(environment: EnvBase, running: torch.Tensor, rewards: torch.Tensor | None) -> None:
        for callback in callbacks:
            callback(environment, running, rewards)

    return on_frame


def _fast_simulation(config: ExperimentConfig, environment: EnvBase) -> FastSimulation | None:
    try:
        return make_fast_simulation(config.environment, environment, most_operations=most_operations(config))
    except NotFaithful:  # training has logged the reason
        return None


@torch.no_grad()
def _fast_steps(simulation: FastSimulation, max_frames: int) -> tuple[TensorDictBase, Step]:
    """Reset a fast simulation; return the first state, and its step, which ends episodes by the time limit, too.

    Random numbers that steps draw are others from the same distribution as those of the plain environment.
    """
    simulated, first, _ = simulation.begin()
    frames = 0

    def step(acted: TensorDictBase) -> TensorDictBase:
        nonlocal simulated, frames
        simulated, observation, reward, terminated = simulation.step(simulated, acted[ACTION])
        frames += 1
        done = terminated | (frames >= max_frames)
        return TensorDict({OBSERVATION: observation, REWARD: reward, DONE: done}, [len(observation)])

    return TensorDict({OBSERVATION: first}, [len(first)]), step


@torch.no_grad()
def _plain_steps(environment: EnvBase) -> tuple[TensorDictBase, Step]:
    return environment.reset(), lambda acted: environment.step(acted)["next"]


@torch.no_grad()
def _first_episodes(
    steps: tuple[TensorDictBase, Step],
    act: Act,
    deterministic: bool,
    on_frame: OnState | None = None,
    mean: Callable[[torch.Tensor], torch.Tensor] = lambda rewards: rewards.mean(-1),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Play the first episode of each environment; return the episodes' returns and lengths, both [envs].

    mean: the reward [envs] that counts of the rewards [envs, agents].

    An environment whose episode has ended is still simulated, since all environments step together. Its frames do
    not count, and its observations are set to 0, so that the policy never sees them.
    """
    state, step = steps
    running = torch.ones(state.batch_size, dtype=torch.bool, device=state[OBSERVATION].device)
    returns = torch.zeros(state.batch_size, device=running.device)
    lengths = torch.zeros_like(returns)
    if on_frame:
        on_frame(running, None)
    exploration = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    with set_exploration_type(exploration):
        while running.any():
            require_finite_observations(state[OBSERVATION])
            state = step(act(state))
            rewards = state[REWARD].squeeze(-1)
            returns = torch.where(running, returns + mean(rewards), returns)
            lengths += running
            if on_frame:
                on_frame(running, rewards)
            running = running & ~state[DONE].squeeze(-1)
            state[OBSERVATION] = torch.where(running[:, None, None], state[OBSERVATION], 0.0)
    return returns, lengths


def heuristic_policy(environment: EnvBase, scenario: str) -> Act:
    """Return the `HeuristicPolicy` of the scenario's module as a policy that acts for all agents.

    The heuristic is foreign code, which needs further packages in some scenarios. So any exception that it raises
    becomes a `NoHeuristic`.

    Raises:
        NoHeuristic: the module has no heuristic policy, the policy cannot act in this task, or it has failed.
    """
    module, simulator = scenario_module(scenario), environment.base_env._env
    if not hasattr(module, "HeuristicPolicy"):
        raise NoHeuristic(f"{module.__name__} defines no HeuristicPolicy")
    if not simulator.continuous_actions:
        raise NoHeuristic("heuristic policies return continuous actions; the actions of this task are discrete")

    zero = environment.base_env.read_action(environment.full_action_spec[ACTION].zero())
    expected = [action.shape for action in zero]

    def act(state: TensorDictBase) -> TensorDictBase:
        with _as_no_heuristic(module.__name__):
            observations = environment.base_env.observations_by_agent(state[OBSERVATION])
            actions = [
                heuristic.compute_action(observation, u_range=agent.u_range)
                for agent, observation in zip(simulator.agents, observations, strict=True)
            ]
            stacked = torch.stack(padded(actions), dim=1)
            if [action.shape for action in actions] != expected or not stacked.isfinite().all():
                raise ValueError(f"actions {list(stacked.shape)} do not fit the task or are not finite")
            return state.set(ACTION, stacked)

    with _as_no_heuristic(module.__name__):
        heuristic = module.HeuristicPolicy(continuous_action=True)
    return act


@contextmanager
def _as_no_heuristic(module: str) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        package = _PACKAGES.get(error.name or "", error.name)
        raise NoHeuristic(
            f"that of {module} needs a package that is not installed: pip install {package}"
        ) from error
    except Exception as error:
        raise NoHeuristic(f"{module}.HeuristicPolicy: {type(error).__name__}: {error}") from error
