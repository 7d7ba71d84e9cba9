"""A homogeneous swarm covers moving targets and avoids collisions; any number of agents.

Targets drift through a square arena at constant speed and bounce off its walls. Every frame pays all agents the
mean over targets of exp(-d / covering_distance), where d is the distance of the target's nearest agent, plus what
these agents closed in on their targets, less what they come too near to each other. Each agent gets the share that
it earns itself. Sitting on every target for 100 frames pays 100. Positions and velocities of the entities are all
the state there is.
"""

from typing import Any

import torch
from torch import Tensor
from vmas.simulator.core import Agent, Landmark, Sphere, World
from vmas.simulator.heuristic_policy import BaseHeuristicPolicy
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.utils import Color, ScenarioUtils

NEIGHBOURS = 3  # how many other agents an agent sees: the nearest
_WALL = 0.95  # share of the arena that targets keep within


class Scenario(BaseScenario):
    """The task; its arguments are, with their defaults, as follows.

    n_agents (4), n_targets (3): at least 1 each.
    half_width (1.0): the arena is a square of twice this side, in metres.
    target_speed (0.1): metres a second; a frame is 0.1 s, and agents reach about 0.3 m/s.
    covering_distance (0.3): metres at which a target pays 1/e of what it pays when sat upon.
    shaping_factor (10.0): what a metre costs or pays that the nearest agents lose or gain on their targets.
    collision_penalty (2.0): what a frame costs in the same place as another agent; nothing at `safe_distance`.
    safe_distance (0.2): metres from the nearest agent; spheres touch at 0.1.
    shared_reward (false): whether all agents get the mean of what each has earned, which is the return either way.
    """

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        """Agents, then targets.

        Raises:
            ValueError: an argument is out of range, or so many agents do not fit the arena.
        """
        num_agents = _at_least(1, n_agents=kwargs.pop("n_agents", 4))
        num_targets = _at_least(1, n_targets=kwargs.pop("n_targets", 3))
        self.half_width = _at_least(1e-3, half_width=kwargs.pop("half_width", 1.0))
        self.target_speed = _at_least(0.0, target_speed=kwargs.pop("target_speed", 0.1))
        self.covering_distance = _at_least(1e-3, covering_distance=kwargs.pop("covering_distance", 0.3))
        self.shaping_factor = _at_least(0.0, shaping_factor=kwargs.pop("shaping_factor", 10.0))
        self.collision_penalty = _at_least(0.0, collision_penalty=kwargs.pop("collision_penalty", 2.0))
        self.safe_distance = _at_least(1e-3, safe_distance=kwargs.pop("safe_distance", 0.2))
        self.agent_radius = 0.05
        self.shared_reward = bool(kwargs.pop("shared_reward", False))
        ScenarioUtils.check_kwargs_consumed(kwargs)
        self.cells = int(num_agents**0.5 - 1e-9) + 1  # a side of the square grid that agents start on
        if self._cell_width() < 2 * self.agent_radius:
            raise ValueError(
                f"n_agents = {num_agents}: they do not fit an arena with half_width = {self.half_width}; "
                f"at least {self.cells * self.agent_radius:.2f} is needed"
            )
        world = World(batch_dim, device, x_semidim=self.half_width, y_semidim=self.half_width)
        for index in range(num_agents):
            world.add_agent(Agent(name=f"agent_{index}", shape=Sphere(self.agent_radius), collide=False))
        for index in range(num_targets):
            landmark = Landmark(
                name=f"target_{index}",
                shape=Sphere(self.agent_radius),
                color=Color.GREEN,
                collide=False,
                movable=True,
                drag=0.0,
            )
            world.add_landmark(landmark)
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        """Agents anywhere in a cell of their own, targets anywhere, heading anywhere."""
        rows = self.world.batch_dim if env_index is None else 1

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(rows, 2, device=self.world.device).uniform_(low, high)

        def place(values: Tensor) -> Tensor:
            return values if env_index is None else values[0]

        free = max(self._cell_width() / 2 - self.agent_radius, 0.0)
        for index, agent in enumerate(self.world.agents):
            cell = torch.tensor([index % self.cells, index // self.cells], device=self.world.device)
            centre = (cell + 0.5) * self._cell_width() - self.half_width
            agent.set_pos(place(centre + uniform(-free, free)), batch_index=env_index)
        for target in self.world.landmarks:
            target.set_pos(
                place(uniform(-_WALL * self.half_width, _WALL * self.half_width)), batch_index=env_index
            )
            angle = uniform(0.0, 2 * torch.pi)[:, :1]
            heading = torch.cat([angle.cos(), angle.sin()], dim=-1)
            target.set_vel(place(self.target_speed * heading), batch_index=env_index)

    def pre_step(self) -> None:
        """Targets at a wall turn back."""
        for target in self.world.landmarks:
            outward = target.state.pos.sign() * target.state.vel > 0
            at_wall = target.state.pos.abs() > _WALL * self.half_width
            target.state.vel = torch.where(outward & at_wall, -target.state.vel, target.state.vel)

    def observation(self, agent: Agent) -> Tensor:
        """[envs, 4 + 4 targets + 2 neighbours]: own position and velocity; for each target its position relative
        to the agent and its velocity; the relative positions of the nearest agents, nearest first. Where there are
        fewer others than `NEIGHBOURS`, the rest are reported an arena's diagonal away.
        """
        targets = [
            values
            for target in self.world.landmarks
            for values in (target.state.pos - agent.state.pos, target.state.vel)
        ]
        return torch.cat([agent.state.pos, agent.state.vel, *targets, self._neighbours(agent)], dim=-1)

    def reward(self, agent: Agent) -> Tensor:
        """[envs], of this agent; or of all together, if they share it."""
        if agent is self.world.agents[0]:
            self.rewards = self._covering() - self.collision_penalty * self._crowding()
            if self.shared_reward:
                self.rewards = self.rewards.mean(-1, keepdim=True).expand_as(self.rewards)
        return self.rewards[:, self.world.agents.index(agent)]

    def _covering(self) -> Tensor:
        """[envs, agents]: for the targets that it is nearest to, how near and how fast an agent closes in."""
        agents, targets = self.world.agents, self.world.landmarks
        position, velocity = _stack(targets, "pos"), _stack(targets, "vel")
        nearest = torch.cdist(position, _stack(agents, "pos")).argmin(-1)
        chosen = nearest.unsqueeze(-1).expand_as(position)
        towards = position - _stack(agents, "pos").gather(1, chosen)
        distance = towards.norm(dim=-1)
        approach = _stack(agents, "vel").gather(1, chosen) - velocity
        closed_in = (approach * towards).sum(-1) / distance.clamp_min(1e-6) * self.world.dt
        paid = torch.exp(-distance / self.covering_distance) + self.shaping_factor * closed_in
        whole = torch.zeros(len(paid), len(agents), device=paid.device)
        return whole.scatter_add(1, nearest, paid) * len(agents) / len(targets)

    def _crowding(self) -> Tensor:
        """[envs, agents]: 0 with no other agent within the safe distance, 1 in the same place as another."""
        positions = _stack(self.world.agents, "pos")
        distances = torch.cdist(positions, positions)
        distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        return (1 - distances.amin(-1) / self.safe_distance).clamp_min(0)

    def _neighbours(self, agent: Agent) -> Tensor:
        """[envs, 2 neighbours]."""
        others = [other.state.pos - agent.state.pos for other in self.world.agents if other is not agent]
        nowhere = torch.full_like(agent.state.pos, 2 * self.half_width)
        relative = torch.stack(others + [nowhere] * (NEIGHBOURS - len(others)), dim=1)
        order = relative.norm(dim=-1).topk(NEIGHBOURS, largest=False).indices
        return relative.gather(1, order.unsqueeze(-1).expand(-1, -1, 2)).flatten(1)

    def _cell_width(self) -> float:
        return 2 * self.half_width / self.cells


class HeuristicPolicy(BaseHeuristicPolicy):
    """Go to the nearest target that no agent in sight is nearer to, keeping clear of the nearest agent."""

    def compute_action(self, observation: Tensor, u_range: float) -> Tensor:
        """[envs, features] -> [envs, 2]."""
        velocity = observation[:, 2:4]
        neighbours = observation[:, -2 * NEIGHBOURS :].unflatten(-1, (NEIGHBOURS, 2))
        targets = observation[:, 4 : -2 * NEIGHBOURS].unflatten(-1, (-1, 4))
        positions, velocities = targets[..., :2], targets[..., 2:]
        distance = positions.norm(dim=-1)  # [envs, targets]
        taken = torch.cdist(positions, neighbours).amin(-1) < distance
        choice = (distance + 1e3 * taken).argmin(-1)
        rows = torch.arange(len(choice), device=choice.device)
        towards = 2.0 * positions[rows, choice] + velocities[rows, choice] - velocity
        nearest = neighbours[:, 0]
        gap = nearest.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        away = -nearest / gap * (0.2 - gap).clamp_min(0.0) * 20.0
        return (towards * 3.0 + away).clamp(-u_range, u_range)


def _stack(entities: list[Any], quantity: str) -> Tensor:
    """[envs, entities, 2] of positions or velocities."""
    return torch.stack([getattr(entity.state, quantity) for entity in entities], dim=1)


def _at_least(bound: float, **argument: float) -> Any:
    ((name, value),) = argument.items()
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < bound:
        raise ValueError(f"{name} = {value!r}: must be a number of at least {bound:g}")
    return value
