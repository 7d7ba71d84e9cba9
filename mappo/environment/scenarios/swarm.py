"""A task for a homogeneous swarm of any size: cover moving targets and avoid collisions.

Targets drift through a square arena at constant speed and bounce off its walls. In every frame, the nearest
agent of each target earns exp(-d / covering_distance), where d is its distance to the target, and a reward
for its approach (negative when the distance grows). An agent pays a penalty when another agent is too near.
Rewards for targets are scaled so that their mean over agents equals their mean over targets: 100 frames with
an agent on every target return 100. The positions and velocities of the entities are the whole state.
"""

from typing import Any

import torch
from torch import Tensor
from vmas.simulator.core import Agent, Landmark, Sphere, World
from vmas.simulator.heuristic_policy import BaseHeuristicPolicy
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.utils import Color, ScenarioUtils

NEIGHBOURS = 3  # number of other agents that an agent observes: the nearest ones
_WALL = 0.95  # position of the walls for targets, as a share of the arena's half width


class Scenario(BaseScenario):
    """The task, with the following arguments (defaults in brackets).

    n_agents (4), n_targets (3): numbers of agents and targets, at least 1.
    half_width (1.0): half the side of the square arena, in metres.
    target_speed (0.1): speed of targets in metres per second; a frame is 0.1 s, and agents reach about 0.3 m/s.
    covering_distance (0.3): distance in metres at which a target pays 1/e of its reward at distance 0.
    shaping_factor (10.0): reward for each metre by which the nearest agent approaches its target.
    collision_penalty (2.0): cost of a frame at the position of another agent; it falls to 0 at `safe_distance`.
    safe_distance (0.2): distance in metres to the nearest agent without penalty; spheres touch at 0.1.
    shared_reward (false): pay all agents the mean of their rewards. The mean return is the same either way.
    """

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        """Build the world: agents first, then targets.

        Raises:
            ValueError: an argument is out of range, or the agents do not fit into the arena.
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
        self.cells = int(num_agents**0.5 - 1e-9) + 1  # cells along a side of the square grid on which agents start
        if self._cell_width() < 2 * self.agent_radius:
            raise ValueError(
                f"n_agents = {num_agents}: they do not fit an arena with half_width = {self.half_width}; "
                f"half_width must be at least {self.cells * self.agent_radius:.2f}"
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
        """Place each agent at random in its own cell, and targets at random with random headings."""
        rows = self.world.batch_dim if env_index is None else 1

        def uniform(low: float, high: float) -> Tensor:
            return torch.empty(rows, 2, device=self.world.device).uniform_(low, high)

        def shaped(values: Tensor) -> Tensor:  # VMAS takes [2] for one environment, [envs, 2] for all
            return values if env_index is None else values[0]

        free = max(self._cell_width() / 2 - self.agent_radius, 0.0)
        for index, agent in enumerate(self.world.agents):
            cell = torch.tensor([index % self.cells, index // self.cells], device=self.world.device)
            centre = (cell + 0.5) * self._cell_width() - self.half_width
            agent.set_pos(shaped(centre + uniform(-free, free)), batch_index=env_index)
        for target in self.world.landmarks:
            target.set_pos(
                shaped(uniform(-_WALL * self.half_width, _WALL * self.half_width)), batch_index=env_index
            )
            angle = uniform(0.0, 2 * torch.pi)[:, :1]
            heading = torch.cat([angle.cos(), angle.sin()], dim=-1)
            target.set_vel(shaped(self.target_speed * heading), batch_index=env_index)

    def pre_step(self) -> None:
        """Turn back the targets that are at a wall."""
        for target in self.world.landmarks:
            outward = target.state.pos.sign() * target.state.vel > 0
            at_wall = target.state.pos.abs() > _WALL * self.half_width
            target.state.vel = torch.where(outward & at_wall, -target.state.vel, target.state.vel)

    def observation(self, agent: Agent) -> Tensor:
        """Return the agent's observation [envs, 4 + 4 targets + 2 neighbours].

        The features are the agent's position and velocity, the relative position and the velocity of each
        target, and the relative positions of the nearest agents, nearest first. If there are fewer other
        agents than `NEIGHBOURS`, the missing ones are reported an arena's diagonal away.
        """
        targets = [
            values
            for target in self.world.landmarks
            for values in (target.state.pos - agent.state.pos, target.state.vel)
        ]
        return torch.cat([agent.state.pos, agent.state.vel, *targets, self._neighbours(agent)], dim=-1)

    def reward(self, agent: Agent) -> Tensor:
        """Return the reward [envs] of this agent, or the mean of all agents if `shared_reward` is set."""
        if agent is self.world.agents[0]:
            self.rewards = self._covering() - self.collision_penalty * self._crowding()
            if self.shared_reward:
                self.rewards = self.rewards.mean(-1, keepdim=True).expand_as(self.rewards)
        return self.rewards[:, self.world.agents.index(agent)]

    def _covering(self) -> Tensor:
        """Return rewards [envs, agents] for the distance and the approach of each target's nearest agent."""
        agents, targets = self.world.agents, self.world.landmarks
        position, velocity = _stack(targets, "pos"), _stack(targets, "vel")
        nearest = torch.cdist(position, _stack(agents, "pos")).argmin(-1)
        index = nearest.unsqueeze(-1).expand_as(position)
        towards = position - _stack(agents, "pos").gather(1, index)
        distance = towards.norm(dim=-1)
        relative_velocity = _stack(agents, "vel").gather(1, index) - velocity
        approach = (relative_velocity * towards).sum(-1) / distance.clamp_min(1e-6) * self.world.dt  # metres
        target_rewards = torch.exp(-distance / self.covering_distance) + self.shaping_factor * approach
        agent_rewards = torch.zeros(len(target_rewards), len(agents), device=target_rewards.device)
        return agent_rewards.scatter_add(1, nearest, target_rewards) * len(agents) / len(targets)

    def _crowding(self) -> Tensor:
        """Return the crowding [envs, agents]: 0 from the safe distance on, 1 at another agent's position."""
        positions = _stack(self.world.agents, "pos")
        distances = torch.cdist(positions, positions)
        distances.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
        return (1 - distances.amin(-1) / self.safe_distance).clamp_min(0)

    def _neighbours(self, agent: Agent) -> Tensor:
        """Return the relative positions of the nearest other agents, [envs, 2 neighbours]."""
        others = [other.state.pos - agent.state.pos for other in self.world.agents if other is not agent]
        missing = torch.full_like(agent.state.pos, 2 * self.half_width)
        relative = torch.stack(others + [missing] * (NEIGHBOURS - len(others)), dim=1)
        order = relative.norm(dim=-1).topk(NEIGHBOURS, largest=False).indices
        return relative.gather(1, order.unsqueeze(-1).expand(-1, -1, 2)).flatten(1)

    def _cell_width(self) -> float:
        return 2 * self.half_width / self.cells


class HeuristicPolicy(BaseHeuristicPolicy):
    """The heuristic: go to the nearest target that no observed agent is nearer to; avoid the nearest agent."""

    def compute_action(self, observation: Tensor, u_range: float) -> Tensor:
        """Return the actions [envs, 2] for observations [envs, features]."""
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
    """Stack positions or velocities of entities to [envs, entities, 2]."""
    return torch.stack([getattr(entity.state, quantity) for entity in entities], dim=1)


def _at_least(bound: float, **argument: float) -> Any:
    ((name, value),) = argument.items()
    if not isinstance(value, (int, float)) or isinstance(value, bool) or value < bound:
        raise ValueError(f"{name} = {value!r}: must be a number of at least {bound:g}")
    return value
