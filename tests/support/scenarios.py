"""The small VMAS scenarios of tests, with known values or deliberate mistakes."""

import math
import os
import random
import signal
import sys
from collections import deque, namedtuple
from enum import Enum
from typing import ClassVar

import numpy as np
import torch
from vmas.simulator.core import Agent, World
from vmas.simulator.scenario import BaseScenario


class Endless(BaseScenario):
    """A task in which nothing happens, every frame pays the same, and no episode terminates by default.

    reward: the reward of a frame, default 1.
    terminate_after: frames until an episode terminates, one number or one per environment; 0 (default): never.
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


class Chatty(Endless):
    """A task that prints in every frame."""

    def post_step(self):
        super().post_step()
        print("chatty " * 100)
        print("chatty", file=sys.stderr)


class HeuristicPolicy:
    """A heuristic policy that raises an error."""

    def __init__(self, continuous_action):
        pass

    def compute_action(self, observation, u_range):
        raise ZeroDivisionError("no idea")


class PushRight(Endless):
    """A task whose reward is an agent's force to the right, plus a little for its position."""

    def reward(self, agent):
        return agent.action.u[:, 0] + 0.1 * agent.state.pos[:, 0]


class PushRightAndMeasure(PushRight):
    """A task that measures its reward."""

    MEASUREMENTS: ClassVar = {"reward_sum": "sum"}

    def reward(self, agent):
        agent.paid = super().reward(agent)
        return agent.paid

    def info(self, agent):
        return {"reward_sum": getattr(agent, "paid", self.age)}


class Reckless(PushRight):
    """A task in which an agent collides, in the first frame, if it pushes hard from a low place."""

    MEASUREMENTS: ClassVar = {"collisions": "sum"}

    def reward(self, agent):
        agent.is_hard = agent.action.u[:, 0] > 0.6
        return super().reward(agent)

    def info(self, agent):
        is_low, is_hard = agent.state.pos[:, 1] < 0.5, getattr(agent, "is_hard", self.age < 0)
        return {"collisions": (is_hard & is_low & (self.age == 1)).float()}


class MoveAndSpeak(Endless):
    """A task that pays half the reward for full force to the right, and half for the second of three words."""

    def make_world(self, batch_dim, device, **kwargs):
        world = super().make_world(batch_dim, device, **kwargs)
        talking_world = World(batch_dim, device, dim_c=3)
        for agent in world.agents:
            talking_world.add_agent(Agent(name=agent.name, silent=False))
        return talking_world

    def reward(self, agent):
        push = agent.action.u[:, 0].clamp(0, 1)
        word = agent.action.c
        return (push + word[:, 1] - word[:, [0, 2]].mean(-1)).clamp_min(0) / 2


class NanReward(Endless):
    """A task whose rewards are NaN after ten frames."""

    def observation(self, agent):
        return agent.state.pos.clone()

    def reward(self, agent):
        return torch.where(self.age > 10, float("nan"), 1.0)


class NanLater(Endless):
    """A task whose rewards are NaN from frame 11 on if there are eight environments, as in training."""

    def reward(self, agent):
        late = (self.age > 10) & (self.world.batch_dim == 8)
        return torch.where(late, float("nan"), 1.0)


class NanObservation(Endless):
    """A task whose observations are NaN after ten frames."""

    def observation(self, agent):
        return torch.where(self.age > 10, float("nan"), 1.0).unsqueeze(-1)


class StartReward(Endless):
    """A task whose reward is the agent's initial position."""

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        self.starts = {agent.name: agent.state.pos[:, 0].clone() for agent in self.world.agents}

    def reward(self, agent):
        return self.starts[agent.name]


class LeakyEnvironments(Endless):
    """A mistake: observations are relative to the mean over environments."""

    def observation(self, agent):
        return agent.state.pos - agent.state.pos.mean(0)


class UnseededObservations(Endless):
    """A mistake: observations contain noise from a generator that no seed reaches."""

    generator = torch.Generator()

    def observation(self, agent):
        return torch.rand(self.world.batch_dim, 1, generator=self.generator)


class GreedyReset(Endless):
    """A mistake: the reset of one environment resets all environments."""

    def observation(self, agent):
        return agent.state.pos.clone()

    def reset_world_at(self, env_index=None):
        super().reset_world_at(None)


class TerminatingTimeLimit(Endless):
    """A mistake: the scenario reports its own time limit as termination."""

    def done(self):
        return self.age >= 20


class Exploding(Endless):
    """A mistake: the scenario raises an error in the middle of an episode."""

    def post_step(self):
        super().post_step()
        if (self.age > 5).any():
            raise ZeroDivisionError("the scenario divides by zero")


class LateExplosion(Endless):
    """A mistake: the scenario raises an error near the end of an episode."""

    def post_step(self):
        super().post_step()
        if (self.age > 35).any():
            raise ZeroDivisionError("too old")


class LeakyReward(Endless):
    """A mistake: the reward of every environment is the mean over environments."""

    def reward(self, agent):
        return agent.state.pos[:, 0].mean().expand(self.world.batch_dim)


class GreedyClock(Endless):
    """A mistake: the reset of one environment sets the clocks of all environments to zero."""

    def observation(self, agent):
        return self.age.unsqueeze(-1)

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        self.age.zero_()


class LazyReset(Endless):
    """A mistake: the reset of one environment does nothing."""

    def reset_world_at(self, env_index=None):
        if env_index is None:
            super().reset_world_at(None)


class ObservationWithoutEnvironments(Endless):
    """A mistake: observations have no axis of environments."""

    def observation(self, agent):
        return torch.zeros(3)


class ObservationThatGrows(Endless):
    """A mistake: observations get a second feature in the middle of an episode."""

    def observation(self, agent):
        return torch.zeros(self.world.batch_dim, 1 + int((self.age > 5).all()))


class RewardOfAllAgents(Endless):
    """A mistake: rewards have a column for each agent."""

    def reward(self, agent):
        return torch.ones(self.world.batch_dim, self.num_agents)


class NumberAsReward(Endless):
    """A mistake: rewards are Python numbers."""

    def reward(self, agent):
        return 1.0


class DoneAsNumbers(Endless):
    """A mistake: done is a float instead of a boolean."""

    def done(self):
        return torch.zeros(self.world.batch_dim)


class UnboundedReward(Endless):
    """A mistake: rewards grow with the square of time."""

    def reward(self, agent):
        return self.age**2


class SoundRace(Endless):
    """A correct task with properties that resemble mistakes.

    Environments terminate at different times, and their observations are NaN after that. A method calls
    another one with keywords. A buffer contains NaN as a sign of no value. An attribute has as many elements
    as there are environments in validation, but it has no axis of environments.
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
    """A task that ends after twenty frames and shows the time in observations."""

    def observation(self, agent):
        return torch.stack([self.age / 20, agent.state.pos[:, 0]], dim=-1)


class AlwaysDone(Endless):
    """A mistake: every frame ends an episode."""

    def done(self):
        return torch.ones(self.world.batch_dim, dtype=torch.bool)


class SparseReward(Endless):
    """A task that pays nothing for thirty frames, then a large reward per frame: badly scaled, but bounded."""

    def reward(self, agent):
        return 2_000.0 * (self.age > 30)


class LeaksFromTheLast(Endless):
    """A mistake: the reward of every environment depends on the speed in the last environment."""

    def reward(self, agent):
        return agent.state.vel[-1].norm().expand(self.world.batch_dim) + agent.state.pos[:, 0]


class GreedyAgentAttribute(Endless):
    """A mistake: the reset of one environment writes an attribute of agents in all environments."""

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
    """A mistake: the reset of one environment leaves one agent at the origin."""

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        if env_index is not None:
            self.world.agents[1].set_pos(torch.zeros(2), batch_index=env_index)


class HiddenState(Endless):
    """A task that counts frames in a closure, which no attribute refers to."""

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
    """A task with state in every kind of attribute that a walk must find; observations show the whole state."""

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
        self.part = self.whole[:, 1:3]  # shares memory with `whole`
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
    """A mistake: the scenario raises an error in the first frame."""

    def reward(self, agent):
        raise RuntimeError("on purpose")


class MissingFile(Endless):
    """A mistake: the scenario raises an error that a machine in trouble may also raise."""

    def reward(self, agent):
        raise FileNotFoundError(2, "No such file", "map.png")


class Crowd(Endless):
    """A task whose agents do not collide with each other."""

    def make_world(self, batch_dim, device, **kwargs):
        world = super().make_world(batch_dim, device, **kwargs)
        for agent in world.agents:
            agent._collide = False
        return world

    def observation(self, agent):
        return agent.state.pos.clone()


class HostBranch(Endless):
    """A task in which Python branches on the values of a tensor."""

    def post_step(self):
        if (self.age > 5).any():
            self.age += 1
        self.age += 1


class HostBranchIfAsked(HostBranch):
    """A task that branches as `HostBranch` does if the variable MAPPO_TEST_HOST_BRANCH is set."""

    def post_step(self):
        if os.environ.get("MAPPO_TEST_HOST_BRANCH"):
            super().post_step()


class NoisyObservation(Endless):
    """A task whose observations contain noise from the simulator's random state."""

    def observation(self, agent):
        return agent.state.pos + torch.rand_like(agent.state.pos)


class MaskedWrites(Endless):
    """A task that writes to tensors through masks, in every way that scenarios use."""

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
    """A task whose reward is a sum over the elements that a mask selects."""

    def reward(self, agent):
        return agent.state.pos[agent.state.pos[:, 0] > 0].sum().expand(self.world.batch_dim)


class SharedClock(Endless):
    """A task whose environments share one number that every frame changes."""

    def make_world(self, batch_dim, device, **kwargs):
        self.clock = torch.zeros(())
        return super().make_world(batch_dim, device, **kwargs)

    def post_step(self):
        super().post_step()
        self.clock = self.clock + 1

    def observation(self, agent):
        return agent.state.pos + self.clock


class RareState(Endless):
    """A task in which Python counts frames, which changes observations only after thirty frames."""

    def make_world(self, batch_dim, device, **kwargs):
        frames = iter(range(10**9))
        self.late = lambda: next(frames) > 30
        return super().make_world(batch_dim, device, **kwargs)

    def observation(self, agent):
        return agent.state.pos + float(self.late())


class StickyDone(Endless):
    """A mistake: done() stays true, because no reset clears the attribute that it reads."""

    def make_world(self, batch_dim, device, **kwargs):
        self.reached = torch.zeros(batch_dim, dtype=torch.bool, device=device)
        return super().make_world(batch_dim, device, **kwargs)

    def done(self):
        self.reached = self.reached | (self.age > 15)
        return self.reached


class ForgetsTimer(Endless):
    """A mistake: only the reset of all environments resets the timer, which the reward reads."""

    def make_world(self, batch_dim, device, **kwargs):
        self.timer = torch.zeros(batch_dim, device=device)
        return super().make_world(batch_dim, device, **kwargs)

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        if env_index is None:
            self.timer = torch.zeros_like(self.timer)

    def reward(self, agent):
        return 1 / (1 + self.timer)

    def post_step(self):
        super().post_step()
        self.timer = self.timer + 1


class KeepsSeason(ForgetsTimer):
    """A task whose timer goes on over episodes."""

    def reset_world_at(self, env_index=None):
        Endless.reset_world_at(self, env_index)


class OwnRanges(PushRight):
    """A task with one agent that may push twice as hard as the other."""

    ranges = {"strong": 1.0, "weak": 0.5}

    def make_world(self, batch_dim, device, **kwargs):
        world = World(batch_dim, device)
        for name, u_range in self.ranges.items():
            world.add_agent(Agent(name=name, u_range=u_range))
        self.age = torch.zeros(batch_dim, device=device)
        self.terminate_after, self.frame_reward = torch.zeros(()), 1.0
        return world


class FixedComponent(OwnRanges):
    """A task that pays an agent for the sum of its forces; `strong` cannot push upwards."""

    ranges = {"strong": [1.0, 0.0], "weak": [0.5, 2.0]}

    def reward(self, agent):
        return agent.action.u.sum(-1)


class NoRange(OwnRanges):
    """A mistake: no component of any action can move."""

    ranges = {"strong": 0.0, "weak": [0.0, 0.0]}


class NegativeRange(OwnRanges):
    """A mistake: a range is negative."""

    ranges = {"strong": 1.0, "weak": [0.5, -0.5]}


class OddInfo(Endless):
    """A task whose `info()` has NaN, and other keys for each agent."""

    def info(self, agent):
        return {f"of {agent.name}": torch.full_like(self.age, math.nan)}


class Measured(Endless):
    """A task that measures 2, -1, 7 and 4 in its first four frames, the same under a name for each reduction.

    Agents measure one more and one less. `late` is the frame's number from the third frame on, and NaN before.
    """

    MEASUREMENTS: ClassVar = {
        **{f"x_{reduction}": reduction for reduction in ("last", "sum", "mean", "maximum")},
        "late": "mean",
        "misspelt": "sum",
    }

    def info(self, agent):
        frame = self.age.long()
        numbers = torch.tensor([0.0, 2, -1, 7, 4], device=self.age.device)[frame.clamp(max=4)]
        numbers = numbers + (1 if agent is self.world.agents[0] else -1)
        return {
            **{f"x_{reduction}": numbers for reduction in ("last", "sum", "mean", "maximum")},
            "late": torch.where(frame > 2, frame.float(), torch.nan),
            "undeclared": numbers,
        }


class ManyMeasurements(Endless):
    """A task whose `info()` has everything that cannot be measured, and more names than are kept."""

    def info(self, agent):
        return {
            **{f"number {index}": self.age for index in range(30)},
            "x" * 200: self.age,
            "line\nbreak": self.age,
            "position": agent.state.pos,
            "complex": self.age * 1j,
            "infinite": self.age / 0,
        }


class BadMeasurements(Endless):
    """A mistake: a reduction that does not exist."""

    MEASUREMENTS: ClassVar = {"speed": "average"}


class BreaksWhenBuilt(Endless):
    """A mistake: an error in a helper of `make_world`."""

    def make_world(self, batch_dim, device, **kwargs):
        return _radius({}) and super().make_world(batch_dim, device, **kwargs)


def _radius(table):
    return table["radius"]


class LargeMap(Endless):
    """A task that keeps millions of Python numbers."""

    def make_world(self, batch_dim, device, **kwargs):
        self.heights = [[0.1234567890123 + row * 1e-7 + column for column in range(1900)] for row in range(1900)]
        return super().make_world(batch_dim, device, **kwargs)


class ExitsWhenMade(Endless):
    """A mistake: the scenario ends the process, with success, before it is made."""

    def __init__(self):
        raise SystemExit(0)


class ExitsWhenBuilt(Endless):
    """A mistake: the scenario ends the process, with success, when its world is made."""

    def make_world(self, batch_dim, device, **kwargs):
        raise SystemExit(0)


class TerminatedWhenBuilt(Endless):
    """A task whose process receives SIGTERM while its world is made."""

    def make_world(self, batch_dim, device, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return super().make_world(batch_dim, device, **kwargs)


class LargeLists(Endless):
    """A task that keeps Python numbers for each environment."""

    def make_world(self, batch_dim, device, **kwargs):
        self.routes = [[0.1234567890123 + row + column for column in range(400)] for row in range(batch_dim)]
        return super().make_world(batch_dim, device, **kwargs)


class LargeInteger(Endless):
    """A task that keeps an integer of more digits than Python reads."""

    def make_world(self, batch_dim, device, **kwargs):
        self.key = 10**6_000
        return super().make_world(batch_dim, device, **kwargs)


class DeepTuples(Endless):
    """A task that keeps tuples in tuples, in more levels than Python reads."""

    def make_world(self, batch_dim, device, **kwargs):
        self.path = ()
        for _ in range(5_000):
            self.path = (self.path,)
        return super().make_world(batch_dim, device, **kwargs)
