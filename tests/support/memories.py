"""The scenarios that keep something over frames: in every kind of place, changed and reset in every kind of way.

Resets draw no random numbers, so a plain and a fast rollout of one policy must be the same to the last bit.
"""

import array
import itertools
import math
import random
import time
from collections import deque, namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from vmas.simulator.core import Agent, Box, Landmark, Sphere, World
from vmas.simulator.scenario import BaseScenario

GLOBAL = [0.0]
WIND = 0.0  # tests change this number from outside
Pair = namedtuple("Pair", "first second")


class Push(BaseScenario):
    """A disc that a policy pushes along a line; an episode ends beyond 0.3."""

    num_agents = 1
    world_class = World

    def make_world(self, batch_dim, device, **kwargs):
        world = self.world_class(batch_dim, device)
        for index in range(self.num_agents):
            world.add_agent(Agent(name=f"agent_{index}", shape=Sphere(0.05)))
        self.build(world, **kwargs)
        kwargs.clear()
        return world

    def build(self, world):
        """Make what the scenario needs."""

    def reset_world_at(self, env_index=None):
        for index, agent in enumerate(self.world.agents):
            self.place(agent, self.start(index), env_index)
        self.forget(env_index)

    def start(self, index):
        """Return the place [2] or the places [envs, 2] where an agent starts."""
        return torch.tensor([0.0, float(index)])

    def place(self, entity, position, env_index):
        """Set the position [2] or [envs, 2] of an entity."""
        positions = position.expand(self.world.batch_dim, 2).clone()
        entity.set_pos(positions if env_index is None else positions[env_index], batch_index=env_index)

    def forget(self, env_index):
        """Reset what the scenario keeps."""

    @property
    def far(self):
        """The distance from 0 along the line [envs]."""
        return self.world.agents[0].state.pos[:, 0]

    def observation(self, agent):
        return torch.cat([agent.state.pos, agent.state.vel], -1)

    def reward(self, agent):
        return -agent.state.pos[:, 0]

    def done(self):
        return self.far > 0.3


def _counter():
    total = 0.0

    def add(number):
        nonlocal total
        total += number
        return total

    return add


class Remembering(Push):
    """A disc and a memory: numbers by environment, or one number, that frames change and episodes reset.

    place: where the memory is kept, a key of `PLACES`.
    change: what a frame does to it, a key of `CHANGES`.
    reset: what a reset does to it, a key of `RESETS`.
    use: what depends on it: reward, observation, done, start or nothing.
    initial: its number at the beginning of an episode; a text for infinity and NaN.
    """

    def build(self, world, place="tensor", change="count", reset="renew", use="reward", initial=0.0):
        self.change, self.reset, self.use, self.initial = change, reset, use, float(initial)
        self.read, self.write = PLACES[place](self, torch.full((world.batch_dim,), self.initial))
        self.memory_of_world = torch.zeros(world.batch_dim)

    def forget(self, env_index):
        self.write(RESETS[self.reset](self, self.read(), env_index))

    def start(self, index):
        far = self.seen() if self.use == "start" else torch.zeros(self.world.batch_dim)
        return torch.stack([-0.01 * far, torch.zeros_like(far)], -1)

    def seen(self):
        """Return the memory as bounded numbers [envs]."""
        return self.read().nan_to_num(7.0).clamp(-9, 9)

    def post_step(self):
        self.write(CHANGES[self.change](self, self.read()))

    def observation(self, agent):
        seen = [self.seen().unsqueeze(-1)] if self.use == "observation" else []
        return torch.cat([agent.state.pos, agent.state.vel, *seen], -1)

    def reward(self, agent):
        return self.far + (self.seen() if self.use == "reward" else 0.0)

    def done(self):
        return (self.far > 0.3) | ((self.seen() > 6) if self.use == "done" else False)


def _in_attribute(scenario, value):
    scenario.memory = value
    return lambda: scenario.memory, lambda value: setattr(scenario, "memory", value)


def _in_place(scenario, value):
    scenario.memory = value
    return lambda: scenario.memory.clone(), lambda value: scenario.memory.copy_(value)


def _in_list(scenario, value):
    scenario.memory = [value]
    return lambda: scenario.memory[0], lambda value: scenario.memory.__setitem__(0, value)


def _in_dict(scenario, value):
    scenario.memory = {"now": {"x": value}}
    return lambda: scenario.memory["now"]["x"], lambda value: scenario.memory["now"].update(x=value)


def _in_tuple(scenario, value):
    scenario.memory = (value, value)
    return lambda: scenario.memory[0], lambda value: setattr(scenario, "memory", (value, value))


def _in_named_tuple(scenario, value):
    scenario.memory = Pair(value, 0)
    return lambda: scenario.memory.first, lambda value: setattr(scenario, "memory", Pair(value, 0))


def _in_deque(scenario, value):
    scenario.memory = deque([value], maxlen=1)
    return lambda: scenario.memory[-1], lambda value: scenario.memory.append(value)


def _in_object(scenario, value):
    scenario.memory = SimpleNamespace(inner=SimpleNamespace(x=value))
    return lambda: scenario.memory.inner.x, lambda value: setattr(scenario.memory.inner, "x", value)


def _in_new_object(scenario, value):
    scenario.memory = SimpleNamespace(x=value)
    return lambda: scenario.memory.x, lambda value: setattr(scenario, "memory", SimpleNamespace(x=value))


def _in_class(scenario, value):
    type(scenario).shared = value
    return lambda: type(scenario).shared, lambda value: setattr(type(scenario), "shared", value)


def _in_class_number(scenario, value):
    type(scenario).shared = float(value[0])
    return _numbers(scenario, lambda: type(scenario).shared, lambda n: setattr(type(scenario), "shared", n))


def _in_global_number(scenario, value):
    GLOBAL[0] = float(value[0])
    return _numbers(scenario, lambda: GLOBAL[0], lambda number: GLOBAL.__setitem__(0, number))


def _in_closure(scenario, value):
    def keep():
        return value

    def put(new):
        nonlocal value
        value = new

    return keep, put


def _in_closure_number(scenario, value):
    scenario.add = _counter()
    return _numbers(scenario, lambda: scenario.add(0.0), lambda number: scenario.add(number - scenario.add(0.0)))


def _in_default(scenario, value):
    def memory(kept=[float(value[0])]):  # noqa: B006  a mutable default is the place
        return kept

    scenario.recall = memory
    return _numbers(scenario, lambda: scenario.recall()[0], lambda n: scenario.recall().__setitem__(0, n))


def _in_function(scenario, value):
    def memory():
        return None

    memory.kept, scenario.recall = float(value[0]), memory
    return _numbers(scenario, lambda: scenario.recall.kept, lambda n: setattr(scenario.recall, "kept", n))


def _in_number(scenario, value):
    scenario.memory = float(value[0])
    return _numbers(scenario, lambda: scenario.memory, lambda number: setattr(scenario, "memory", number))


def _in_array(scenario, value):
    scenario.memory = value.numpy().copy()
    return lambda: torch.from_numpy(scenario.memory.copy()), lambda value: _fill_array(scenario, value)


def _in_bytes(scenario, value):
    scenario.memory = array.array("d", [float(value[0])])
    return _numbers(scenario, lambda: scenario.memory[0], lambda n: scenario.memory.__setitem__(0, n))


def _in_iterator(scenario, value):
    scenario.ticks = itertools.count()
    return lambda: value + next(scenario.ticks), lambda value: None


def _in_generator(scenario, value):
    scenario.ticks = (float(number) for number in range(10**9))
    return lambda: value + next(scenario.ticks), lambda value: None


def _in_tensor_attribute(scenario, value):
    scenario.holder = torch.zeros(1)
    scenario.holder.kept = float(value[0])
    return _numbers(scenario, lambda: scenario.holder.kept, lambda n: setattr(scenario.holder, "kept", n))


def _of_one_number(scenario, value):
    scenario.memory = value[0].clone()
    return lambda: scenario.memory.expand(scenario.world.batch_dim), lambda v: setattr(scenario, "memory", v[0])


def _in_double(scenario, value):
    scenario.memory = value.double()
    return lambda: scenario.memory.float(), lambda value: setattr(scenario, "memory", value.double())


def _with_alias(scenario, value):
    scenario.memory = value
    scenario.alias = scenario.memory[:]
    return lambda: scenario.alias, lambda value: scenario.memory.copy_(value.clone())


def _with_other_name(scenario, value):
    scenario.memory = scenario.first = value
    return lambda: torch.maximum(scenario.memory, scenario.first), lambda v: setattr(scenario, "memory", v)


def _with_part(scenario, value):
    scenario.memories = torch.stack([value, value], -1)
    scenario.part = scenario.memories[:, 0]
    return lambda: scenario.part.clone(), lambda v: scenario.memories.__setitem__((slice(None), 0), v)


def _numbers(scenario, read, write):
    """Return the access to one number for all environments."""
    return lambda: torch.full((scenario.world.batch_dim,), read()), lambda value: write(float(value[0]))


def _fill_array(scenario, value):
    scenario.memory[:] = [float(number) for number in value]


PLACES = {
    "tensor": _in_attribute,
    "in place": _in_place,
    "list": _in_list,
    "dict": _in_dict,
    "tuple": _in_tuple,
    "named tuple": _in_named_tuple,
    "deque": _in_deque,
    "object": _in_object,
    "new object": _in_new_object,
    "class": _in_class,
    "closure": _in_closure,
    "one number": _of_one_number,
    "double": _in_double,
    "alias": _with_alias,
    "other name": _with_other_name,
    "part": _with_part,
}
PLACES_OF_NUMBERS = {
    "class number": _in_class_number,
    "global number": _in_global_number,
    "closure number": _in_closure_number,
    "default": _in_default,
    "function": _in_function,
    "number": _in_number,
    "array": _in_array,
    "bytes": _in_bytes,
    "iterator": _in_iterator,
    "generator": _in_generator,
    "tensor attribute": _in_tensor_attribute,
}
PLACES |= PLACES_OF_NUMBERS
CHANGES = {
    "nothing": lambda scenario, memory: memory,
    "count": lambda scenario, memory: memory + 1,
    "least": lambda scenario, memory: torch.minimum(memory, 1 - scenario.far),
    "sum": lambda scenario, memory: memory + scenario.far,
    "where": lambda scenario, memory: torch.where(scenario.far > 0.1, memory + 1, memory),
    "mask": lambda scenario, memory: _added(memory, scenario.far > 0.1),
}


def _added(memory, mask):
    memory = memory.clone()
    memory[mask] += 1
    return memory


def _rows(scenario, memory, env_index, new):
    """Return the memory with new numbers [envs] in all rows or in one."""
    if env_index is None:
        return new
    memory = memory.clone()
    memory[env_index] = new[env_index]
    return memory


def _full(scenario, number):
    return torch.full((scenario.world.batch_dim,), number)


RESETS = {
    "renew": lambda s, memory, row: _rows(s, memory, row, _full(s, s.initial)),
    "keep": lambda s, memory, row: memory,
    "only full": lambda s, memory, row: _full(s, s.initial) if row is None else memory,
    "only one": lambda s, memory, row: memory if row is None else _rows(s, memory, row, _full(s, s.initial)),
    "halve": lambda s, memory, row: _rows(s, memory, row, 0.5 * memory),
    "by number": lambda s, memory, row: _rows(s, memory, row, torch.arange(s.world.batch_dim).float()),
    "staggered": lambda s, memory, row: (
        torch.arange(s.world.batch_dim).float() if row is None else _rows(s, memory, row, _full(s, s.initial))
    ),
    "all": lambda s, memory, row: _full(s, s.initial),
}


class OwnGoal(Push):
    """The goal is drawn once, when the world is made."""

    def build(self, world, source="torch", shape=False):
        draw = {
            "torch": lambda: float(torch.rand(())),
            "numpy": lambda: float(np.random.rand()),
            "python": random.random,
            "unseeded": lambda: float(np.random.default_rng().random()),
        }[source]
        self.goal = draw()
        self.goals = torch.full((2,), draw())
        if shape:
            world.add_landmark(Landmark("post", shape=Sphere(0.02 + 0.1 * draw()), collide=True, movable=False))

    def reset_world_at(self, env_index=None):
        super().reset_world_at(env_index)
        for landmark in self.world.landmarks:
            self.place(landmark, torch.tensor([0.25, 0.0]), env_index)

    def reward(self, agent):
        return self.goals[0] - (self.far - self.goal).abs()


class FirstFrame(Push):
    """The first frame decides what the task is."""

    def build(self, world, what="number"):
        self.what, self.first = what, None

    def post_step(self):
        if self.first is None:
            self.first = float(self.far.sum()) if self.what == "number" else 1.0 + self.far.clone()

    def reward(self, agent):
        return self.far - self.first


class Noisy(Push):
    """A frame draws a random number, always or seldom, or reads what is not part of the simulation."""

    def build(self, world, source="python", probability=1.0):
        self.source, self.probability = source, probability
        self.numpy_generator, self.python_generator = np.random.default_rng(0), random.Random(0)
        self.torch_generator = torch.Generator().manual_seed(0)

    def post_step(self):
        number = {
            "python": random.random,
            "numpy": np.random.rand,
            "own numpy": self.numpy_generator.random,
            "own python": self.python_generator.random,
            "torch": lambda: float(torch.rand(())),
            "own torch": lambda: torch.rand((), generator=self.torch_generator),
            "system": random.SystemRandom().random,
            "clock": lambda: time.monotonic() % 1,
            "file": lambda: float(len(Path(__file__).read_text()) % 2),
        }[self.source]()
        if number < self.probability:
            for agent in self.world.agents:
                agent.state.vel = agent.state.vel + torch.tensor([0.0, 1.0])


class NoisyReward(Push):
    """A frame adds random numbers from torch to the reward; `kind` says how it draws them."""

    def build(self, world, kind="rand"):
        self.kind, self.scale = kind, torch.full((world.batch_dim,), 0.5)
        self.count = torch.zeros(world.batch_dim)

    def forget(self, env_index):
        self.count[slice(None) if env_index is None else env_index] = 0

    def post_step(self):
        self.count = self.count + 1
        if self.kind == "seeded":
            torch.manual_seed(7)
        position = self.world.agents[0].state.pos
        self.noise = {
            "rand": lambda: torch.rand(self.world.batch_dim),
            "seeded": lambda: torch.rand(self.world.batch_dim),
            "shared": lambda: torch.rand(1).expand(self.world.batch_dim),
            "in place": lambda: torch.zeros_like(position).normal_()[:, 1] * self.scale,
            "column": lambda: position.clone()[:, 1].uniform_(-1, 1),
            "like": lambda: torch.randn_like(position).sum(-1),
            "distribution": lambda: torch.distributions.Normal(1.0, self.scale).sample(),
            "coin": lambda: torch.bernoulli(self.scale),
            "integer": lambda: torch.randint(0, 5, (self.world.batch_dim,)).float(),
            "by state": lambda: torch.normal(position[:, 0], 1.0),
            "by time": lambda: torch.bernoulli((self.count / 100).clamp(max=1.0)),
            "own": lambda: torch.rand(self.world.batch_dim, generator=torch.Generator().manual_seed(3)),
        }[self.kind]()

    def reward(self, agent):
        return self.far + self.noise


class FromOutside(Push):
    """A frame reads a number that another module may change."""

    def reward(self, agent):
        return self.far + WIND


class OwnCollisions(World):
    """A world whose agents do not collide with each other."""

    def collides(self, a, b):
        return not (isinstance(a, Agent) and isinstance(b, Agent)) and super().collides(a, b)


class OwnForces(World):
    """A world whose collisions push twice as hard."""

    def update_env_forces(self, entity_a, f_a, t_a, entity_b, f_b, t_b):
        super().update_env_forces(entity_a, 2 * f_a, t_a, entity_b, 2 * f_b, t_b)


class OwnDistance(World):
    """A world whose distances are squared."""

    def get_distance(self, entity_a, entity_b, env_index=None):
        return super().get_distance(entity_a, entity_b, env_index) ** 2


class OwnWorld(Push):
    """A task of two discs that meet, in a world with a method of its own."""

    num_agents = 2

    def make_world(self, batch_dim, device, **kwargs):
        kinds = {"collisions": OwnCollisions, "forces": OwnForces, "distance": OwnDistance, "none": World}
        self.world_class = kinds.get(kwargs["method"], World)
        world = super().make_world(batch_dim, device, method=kwargs["method"])
        kwargs.clear()
        return world

    def build(self, world, method):
        if method == "attribute":
            world.collides = lambda a, b: False

    def start(self, index):
        return torch.tensor([-0.4 + 0.15 * index, 0.0])

    def reward(self, agent):
        one, other = self.world.agents
        return self.world.get_distance(one, other)


class Posts(Push):
    """A post to the right and one to the left of the disc, with the same name or not."""

    def build(self, world, names=("post", "post")):
        for name in names:
            world.add_landmark(Landmark(name, shape=Box(0.1, 0.1), collide=True, movable=False))

    def forget(self, env_index):
        for landmark, far in zip(self.world.landmarks, (0.13, -0.13), strict=True):
            self.place(landmark, torch.tensor([far, 0.0]), env_index)


class AsksWhetherNear(Push):
    """A task whose reward uses the answer of `World.collides` for more than skipping a pair."""

    num_agents = 2

    def reward(self, agent):
        one, other = self.world.agents
        return self.far + (1.0 if self.world.collides(one, other) else 2.0)


class CountsSelected(Push):
    """The reward divides by the number of selected environments."""

    def reward(self, agent):
        selected = self.far[self.far > 0.1]
        return self.far + (1.0 if selected.numel() > 0 else 2.0)


class Graduating(Push):
    """An episode that ended beyond 0.3 makes the next one start further away; the level is in `level`."""

    def build(self, world, level="tensor"):
        self.kind = level
        self.level = torch.zeros(world.batch_dim) if level == "tensor" else 0
        self.success = torch.zeros(world.batch_dim, dtype=torch.bool)

    def forget(self, env_index):
        rows = slice(None) if env_index is None else slice(env_index, env_index + 1)
        if self.kind == "tensor":
            self.level = self.level.clone()
            self.level[rows] += self.success[rows].float()
        else:
            self.level += int(self.success[rows].sum())
        self.success = self.success.clone()
        self.success[rows] = False
        level = self.level if self.kind == "tensor" else torch.full_like(self.far, self.level)
        self.place(self.world.agents[0], torch.stack([-0.1 * level, torch.zeros_like(level)], -1), env_index)

    def done(self):
        self.success = self.success | (self.far > 0.3)
        return self.far > 0.3


class ByNumber(Push):
    """A task whose environments differ, by something that is kept in a place of this kind."""

    def build(self, world, kind="list", use="reward"):
        numbers = [0.05 * index for index in range(world.batch_dim)]
        self.use = use
        self.numbers = {
            "list": numbers,
            "array": np.array(numbers, dtype=np.float32),
            "tensor": torch.tensor(numbers),
            "column": torch.tensor([numbers, numbers]),
            "closure": lambda: torch.tensor(numbers),
            "arange": None,
        }[kind]
        self.kind = kind

    def own(self):
        """Return the number of each environment [envs]."""
        if self.kind == "arange":
            return 0.05 * torch.arange(self.world.batch_dim)
        if self.kind == "column":
            return self.numbers[1]
        numbers = self.numbers() if self.kind == "closure" else self.numbers
        return torch.as_tensor(numbers)

    def start(self, index):
        own = self.own() if self.use == "start" else torch.zeros(self.world.batch_dim)
        return torch.stack([own, torch.zeros_like(own)], -1)

    def reward(self, agent):
        return self.far + (self.own() if self.use == "reward" else 0.0)

    def done(self):
        return self.far > (self.own() if self.use == "done" else 0.3)


class DrawnStarts(Push):
    """A task that draws starts: one for each environment, or one for all that are reset together.

    ends: where an episode ends, to the right of the farthest start.
    """

    def build(self, world, shared=False, ends=math.inf):
        self.shared, self.ends = shared, ends

    def done(self):
        return self.world.agents[0].state.pos[:, 0] > 1 - math.e + self.ends

    def reset_world_at(self, env_index=None):
        rows = self.world.batch_dim if env_index is None else 1
        far = torch.rand(1 if self.shared else rows, 1).expand(rows, 1) - math.e
        positions = torch.cat([far, torch.zeros(rows, 1)], 1)
        self.world.agents[0].set_pos(positions if env_index is None else positions[0], batch_index=env_index)


class DrawnGoals(Push):
    """A task that draws goals. Each reset gives the tensor of goals a second name, which alone frames read."""

    def build(self, world):
        self.goals = torch.zeros(world.batch_dim)

    def forget(self, env_index):
        if env_index is None:
            self.goals = torch.rand(self.world.batch_dim)
        else:
            self.goals[env_index] = torch.rand(1)
        self.seen = self.goals.view(-1)

    def reward(self, agent):
        return -(self.far - self.seen).abs()

    def observation(self, agent):
        return torch.cat([super().observation(agent), self.seen[:, None]], -1)
