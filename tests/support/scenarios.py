"""Small VMAS scenarios whose values are known by hand."""

import math
import os
import random
from collections import deque, namedtuple
from enum import Enum

import numpy as np
import torch
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario


class Endless(BaseScenario):
    """Nothing happens, every frame pays the same, and it never ends unless told to.

    reward: what a frame pays.

    terminate_after: frames until an episode terminates, one number or one for each environment; 0 for never.
    """

    def make_world(self, batch_dim, device, **kwargs):
        self.terminate_after = torch.as_tensor(kwargs.pop("terminate_after", 0), device=device)
        self.frame_reward = float(kwargs.pop("reward", 1.0))
        self.num_agents = kwargs.pop("n_agents", 2)
        world = World(batch_dim, device)
        for index in range(self.num_agents):
            world.add_agent(Agent(name=f"agent_{index}"))
        self.age = torch.zeros(batch_dim, device=device)
        return world

    def reset_world_at(self, env_index=None):
        for agent in self.world.agents:
            position = torch.rand(self.world.batch_dim if env_index is None else 1, 2, device=self.world.device)
            agent.set_pos(position.squeeze(0) if env_index is not None else position, batch_index=env_index)
        if env_index is None:
            self.age.zero_()
        else:
            self.age[env_index] = 0

    def post_step(self):
        self.age += 1

    def observation(self, agent):
        return torch.zeros(self.world.batch_dim, 1, device=self.world.device)

    def reward(self, agent):
        return torch.full((self.world.batch_dim,), self.frame_reward, device=self.world.device)

    def done(self):
        return (self.age >= self.terminate_after) & (self.terminate_after > 0)


class HeuristicPolicy:
    """Does not know what to do."""

    def __init__(self, continuous_action):
        pass

    def compute_action(self, observation, u_range):
        raise ZeroDivisionError("no idea")


class PushRight(Endless):
    """A frame pays how hard an agent pushes to the right, and a little where it is."""

    def reward(self, agent):
        return agent.action.u[:, 0] + 0.1 * agent.state.pos[:, 0]


class MoveAndSpeak(Endless):
    """Half the reward is for pushing to the right as hard as possible, half for the second of three words."""

    def make_world(self, batch_dim, device, **kwargs):
        world = super().make_world(batch_dim, device, **kwargs)
        speaking = World(batch_dim, device, dim_c=3)
        for agent in world.agents:
            speaking.add_agent(Agent(name=agent.name, silent=False))
        return speaking

    def reward(self, agent):
        push = agent.action.u[:, 0].clamp(0, 1)
        word = agent.action.c
        return (push + word[:, 1] - word[:, [0, 2]].mean(-1)).clamp_min(0) / 2


class NanReward(Endless):
    """After ten frames every reward is NaN."""

    def observation(self, agent):
        return agent.state.pos.clone()

    def reward(self, agent):
        return torch.where(self.age > 10, float("nan"), 1.0)


class NanLater(Endless):
    """With eight environments, as in training, rewards are NaN from frame 11 on; with fewer they are not."""

    def reward(self, agent):
        late = (self.age > 10) & (self.world.batch_dim == 8)
        return torch.where(late, float("nan"), 1.0)


class NanObservation(Endless):
    """After ten frames every observation is NaN."""

    def observation(self, agent):
        return torch.where(self.age > 10, float("nan"), 1.0).unsqueeze(-1)


class StartReward(Endless):
    """Every frame pays where the agent started."""

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        self.starts = {agent.name: agent.state.pos[:, 0].clone() for agent in self.world.agents}

    def reward(self, agent):
        return self.starts[agent.name]


class LeakyEnvironments(Endless):
    """Observations are relative to the mean over environments."""

    def observation(self, agent):
        return agent.state.pos - agent.state.pos.mean(0)


class UnseededObservations(Endless):
    """Noise comes from a generator that no seed reaches."""

    generator = torch.Generator()

    def observation(self, agent):
        return torch.rand(self.world.batch_dim, 1, generator=self.generator)


class GreedyReset(Endless):
    """A reset of one environment resets them all."""

    def observation(self, agent):
        return agent.state.pos.clone()

    def reset_world_at(self, env_index=None):
        super().reset_world_at(None)


class TerminatingTimeLimit(Endless):
    """Reports a time limit of its own as termination."""

    def done(self):
        return self.age >= 20


class Exploding(Endless):
    """Raises in the middle of an episode."""

    def post_step(self):
        super().post_step()
        if (self.age > 5).any():
            raise ZeroDivisionError("the scenario divides by zero")


class LateExplosion(Endless):
    """Raises near the end of an episode."""

    def post_step(self):
        super().post_step()
        if (self.age > 35).any():
            raise ZeroDivisionError("too old")


class LeakyReward(Endless):
    """Every environment is paid the mean over environments."""

    def reward(self, agent):
        return agent.state.pos[:, 0].mean().expand(self.world.batch_dim)


class GreedyClock(Endless):
    """A reset of one environment sets the clocks of all to zero."""

    def observation(self, agent):
        return self.age.unsqueeze(-1)

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        self.age.zero_()


class LazyReset(Endless):
    """A reset of one environment does nothing."""

    def reset_world_at(self, env_index=None):
        if env_index is None:
            super().reset_world_at(None)


class ObservationWithoutEnvironments(Endless):
    """An observation has no row for each environment."""

    def observation(self, agent):
        return torch.zeros(3)


class ObservationThatGrows(Endless):
    """An observation gets a second feature in the middle of an episode."""

    def observation(self, agent):
        return torch.zeros(self.world.batch_dim, 1 + int((self.age > 5).all()))


class RewardOfAllAgents(Endless):
    """A reward has a column for each agent."""

    def reward(self, agent):
        return torch.ones(self.world.batch_dim, self.num_agents)


class NumberAsReward(Endless):
    """A reward is a Python number."""

    def reward(self, agent):
        return 1.0


class DoneAsNumbers(Endless):
    """Done is 0 or 1 rather than a boolean."""

    def done(self):
        return torch.zeros(self.world.batch_dim)


class UnboundedReward(Endless):
    """The reward grows with the square of time."""

    def reward(self, agent):
        return self.age**2


class SoundRace(Endless):
    """Nothing is wrong: environments terminate at different times, and what they show after that is NaN.

    A method calls another with keywords, a buffer holds NaN for nothing yet, and there is an attribute as long as
    there are environments in validation that has nothing to do with them.
    """

    def make_world(self, batch_dim, device, **kwargs):
        world = super().make_world(batch_dim, device, **kwargs)
        self.fuel, self.reached = torch.zeros(batch_dim), torch.full((batch_dim,), float("nan"))
        self.order = torch.arange(8)
        return world

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        fuel = torch.randint(3, 25, (self.world.batch_dim if env_index is None else 1,)).float()
        self.order = self.order[torch.randperm(8)]
        if env_index is None:
            self.fuel = fuel
        else:
            self.fuel[env_index] = fuel[0]

    def post_step(self):
        super().post_step()
        self.fuel = self.fuel - 1

    def observation(self, agent, noisy=False):
        return torch.cat([self.fuel.sqrt().unsqueeze(-1), agent.state.pos], dim=-1)

    def info(self, agent):
        return {"seen": self.observation(agent, noisy=True), "paid": self.reward(agent=agent)}

    def done(self):
        return self.fuel <= 0


class FiniteHorizon(TerminatingTimeLimit):
    """Ends after twenty frames, as agents see."""

    def observation(self, agent):
        return torch.stack([self.age / 20, agent.state.pos[:, 0]], dim=-1)


class AlwaysDone(Endless):
    """Every frame is the last."""

    def done(self):
        return torch.ones(self.world.batch_dim, dtype=torch.bool)


class SparseReward(Endless):
    """Nothing for thirty frames, then a large reward a frame: badly scaled, but bounded."""

    def reward(self, agent):
        return 2_000.0 * (self.age > 30)


class LeaksFromTheLast(Endless):
    """Every environment is paid by the speed of the last."""

    def reward(self, agent):
        return agent.state.vel[-1].norm().expand(self.world.batch_dim) + agent.state.pos[:, 0]


class GreedyAgentAttribute(Endless):
    """A reset of one environment fills the tanks of all, which agents carry."""

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        for agent in self.world.agents:
            agent.tank = torch.full((self.world.batch_dim,), 10.0)

    def post_step(self):
        super().post_step()
        for agent in self.world.agents:
            agent.tank = agent.tank - 1

    def observation(self, agent):
        return agent.tank.unsqueeze(-1)


class ForgetsOneAgent(Endless):
    """A reset of one environment places all agents but one."""

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        if env_index is not None:
            self.world.agents[1].set_pos(torch.zeros(2), batch_index=env_index)


class HiddenState(Endless):
    """Counts frames in a variable that only a function can see."""

    def make_world(self, batch_dim, device, **kwargs):
        frames = 0

        def count():
            nonlocal frames
            frames += 1
            return frames

        self.count = count
        self.frames = 0
        return super().make_world(batch_dim, device, **kwargs)

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        self.frames = self.count() if env_index is None else self.frames

    def post_step(self):
        super().post_step()
        self.frames = self.count()

    def observation(self, agent):
        return agent.state.pos + self.frames


class ManyKindsOfState(Endless):
    """Keeps state in every kind of place that a walk through attributes must find, and shows all of it."""

    class Phase(Enum):
        SEARCH = 1
        RETURN = 2

    class Memory:
        __slots__ = ("visits",)

        def __init__(self):
            self.visits = 0

    class Filter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(2))
            self.weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)

    Pair = namedtuple("Pair", "first second")

    def make_world(self, batch_dim, device, **kwargs):
        world = super().make_world(batch_dim, device, **kwargs)
        self.batch_dim = batch_dim
        self.frames = 0
        self.phase = self.Phase.SEARCH
        self.memory = self.Memory()
        self.filter = self.Filter()
        self.pair = self.Pair(0, torch.zeros(batch_dim))
        self.trail = deque(maxlen=3)
        self.distances = np.zeros(batch_dim)
        self.of_agent = dict.fromkeys(world.agents, 0.0)
        self.met = set()
        self.shuffled = list(world.agents)
        self.generator = torch.Generator().manual_seed(5)
        self.numpy_generator = np.random.default_rng(6)
        self.python_generator = random.Random(7)
        self.best = -math.inf
        self.whole = torch.zeros(batch_dim, 4)
        self.part = self.whole[:, 1:3]  # the same memory
        self.chosen = world.agents[0]
        return world

    def post_step(self):
        super().post_step()
        self.frames += 1
        self.phase = self.Phase.RETURN if self.frames % 3 else self.Phase.SEARCH
        self.memory.visits += 1
        self.filter.mean += 0.5
        self.filter.weight *= 0.9
        self.pair = self.Pair(self.pair.first + 1, self.pair.second + 1)
        self.trail.append(self.world.agents[0].state.pos.clone())
        self.distances += self.numpy_generator.random(self.batch_dim)
        self.of_agent[self.chosen] += 1.0
        self.met.add(self.frames % 4)
        self.python_generator.shuffle(self.shuffled)
        self.chosen = self.shuffled[0]
        self.best = max(self.best, float(self.distances.max()))
        self.part += torch.rand(self.batch_dim, 2, generator=self.generator)
        self.late = getattr(self, "late", 0) + 1

    def observation(self, agent):
        numbers = [
            self.frames,
            self.phase.value,
            self.memory.visits,
            self.pair.first,
            len(self.trail),
            self.of_agent[agent],
            sum(self.met),
            self.world.agents.index(self.chosen),
            max(self.best, -1.0),
            float(self.filter.weight[0]),
            getattr(self, "late", 0),
        ]
        columns = [torch.full((self.batch_dim,), float(number)) for number in numbers]
        columns += [self.pair.second, torch.as_tensor(self.distances, dtype=torch.float32)]
        columns += [*self.whole.T, self.filter.mean.sum().expand(self.batch_dim)]
        columns += [torch.stack([*self.trail]).sum((0, 2)) if self.trail else torch.zeros(self.batch_dim)]
        return torch.stack(columns, dim=-1)


class Crashing(Endless):
    """A mistake in the code, met in the first frame."""

    def reward(self, agent):
        raise RuntimeError("on purpose")


class MissingFile(Endless):
    """Raises what a machine in trouble might, and is to blame for it."""

    def reward(self, agent):
        raise FileNotFoundError(2, "No such file", "map.png")


class Crowd(Endless):
    """Many agents that walk through each other."""

    def make_world(self, batch_dim, device, **kwargs):
        world = super().make_world(batch_dim, device, **kwargs)
        for agent in world.agents:
            agent._collide = False
        return world

    def observation(self, agent):
        return agent.state.pos.clone()


class HostBranch(Endless):
    """Python decides what a frame does, by what a tensor holds."""

    def post_step(self):
        if (self.age > 5).any():
            self.age += 1
        self.age += 1


class HostBranchIfAsked(HostBranch):
    """The same where the environment says so, and otherwise always the same."""

    def post_step(self):
        if os.environ.get("MAPPO_TEST_HOST_BRANCH"):
            super().post_step()


class NoisyObservation(Endless):
    """Noise from the simulator's random state in every observation."""

    def observation(self, agent):
        return agent.state.pos + torch.rand_like(agent.state.pos)


class MaskedWrites(Endless):
    """Writes what masks select, in all the ways that scenarios do."""

    def make_world(self, batch_dim, device, **kwargs):
        world = super().make_world(batch_dim, device, **kwargs)
        self.marks, self.best = torch.zeros(batch_dim, 2), torch.zeros(batch_dim)
        return world

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        for tensor in (self.marks, self.best):
            tensor[slice(None) if env_index is None else env_index] = 0

    def post_step(self):
        super().post_step()
        position = self.world.agents[0].state.pos
        self.marks[position[:, 0] > 0.5] = torch.tensor([1.0, 2.0])
        self.marks[position > 0.7] -= 0.25
        self.marks[position[:, 1] > 0.6, 1] = 3.0
        self.best[~(self.age > 3)] = position[~(self.age > 3), 0] * 2 + self.best[~(self.age > 3)]

    def observation(self, agent):
        return torch.cat([self.marks, self.best.unsqueeze(-1), agent.state.pos], dim=-1)


class CountOfMasked(Endless):
    """Sums what a mask selects."""

    def reward(self, agent):
        return agent.state.pos[agent.state.pos[:, 0] > 0].sum().expand(self.world.batch_dim)


class SharedClock(Endless):
    """Environments share one number that every frame changes."""

    def make_world(self, batch_dim, device, **kwargs):
        self.clock = torch.zeros(())
        return super().make_world(batch_dim, device, **kwargs)

    def post_step(self):
        super().post_step()
        self.clock = self.clock + 1

    def observation(self, agent):
        return agent.state.pos + self.clock


class RareState(Endless):
    """Python counts frames, and tells after thirty of them."""

    def make_world(self, batch_dim, device, **kwargs):
        frames = iter(range(10**9))
        self.late = lambda: next(frames) > 30
        return super().make_world(batch_dim, device, **kwargs)

    def observation(self, agent):
        return agent.state.pos + float(self.late())
