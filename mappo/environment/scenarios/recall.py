"""A task that needs memory: remember a cue that is seen in the first frame only.

The first frame of an episode shows all agents the same cue, left (-1) or right (1). A gate holds the agents at the
middle line for some frames, so that their positions and velocities cannot keep the cue. Afterwards, each agent
earns an equal share of 1 for every frame that it spends on the cue's side. An agent that remembers can return 1.
Without memory nothing tells the sides apart, so that no policy returns more than 0.5 on average.
"""

from typing import Any

import torch
from torch import Tensor
from vmas.simulator.core import Agent, Landmark, Line, Sphere, World
from vmas.simulator.heuristic_policy import BaseHeuristicPolicy
from vmas.simulator.scenario import BaseScenario
from vmas.simulator.utils import Color, ScenarioUtils

_CUE = slice(4, 5)  # the feature of an observation that shows the cue


class Scenario(BaseScenario):
    """The task, with the following arguments (defaults in brackets), whole numbers of at least 1.

    n_agents (2): number of agents.
    hold_frames (5): frames in which the gate holds the agents; the cue is seen in the first of them.
    free_frames (10): frames after that, which are rewarded; the time limit of an episode is best the sum of both.
    """

    def make_world(self, batch_dim: int, device: torch.device, **kwargs: Any) -> World:
        """Build the world: the agents, one below the other, and the middle line.

        Raises:
            ValueError: an argument is out of range.
        """
        num_agents = _at_least_one(n_agents=kwargs.pop("n_agents", 2))
        self.hold_frames = _at_least_one(hold_frames=kwargs.pop("hold_frames", 5))
        self.free_frames = _at_least_one(free_frames=kwargs.pop("free_frames", 10))
        ScenarioUtils.check_kwargs_consumed(kwargs)
        world = World(batch_dim, device, x_semidim=1.0, y_semidim=1.0)
        for index in range(num_agents):
            world.add_agent(Agent(name=f"agent_{index}", shape=Sphere(0.05), collide=False))
        line = Landmark(name="middle", shape=Line(length=2.0), color=Color.GRAY, collide=False)
        world.add_landmark(line)
        self.cue = torch.ones(batch_dim, 1, device=device)
        self.frame = torch.zeros(batch_dim, 1, device=device)
        return world

    def reset_world_at(self, env_index: int | None = None) -> None:
        """Place the agents on the middle line and draw a cue."""
        rows = self.world.batch_dim if env_index is None else 1
        heights = torch.linspace(-0.8, 0.8, len(self.world.agents) + 2)[1:-1].tolist()
        for agent, height in zip(self.world.agents, heights, strict=True):
            agent.set_pos(torch.tensor([0.0, height], device=self.world.device), batch_index=env_index)
        upright = torch.full((1,), torch.pi / 2, device=self.world.device)
        self.world.landmarks[0].set_rot(upright, batch_index=env_index)
        drawn = torch.empty(rows, 1, device=self.world.device).uniform_(-1.0, 1.0)
        cue = torch.where(drawn < 0, -1.0, 1.0)
        if env_index is None:
            self.cue, self.frame = cue, torch.zeros_like(cue)
        else:
            self.cue[env_index], self.frame[env_index] = cue[0], 0.0

    def process_action(self, agent: Agent) -> None:
        """Let actions have no effect while the gate is closed."""
        agent.action.u = torch.where(self.frame < self.hold_frames, 0.0, agent.action.u)

    def post_step(self) -> None:
        """Count the frames of the episode."""
        self.frame = self.frame + 1

    def observation(self, agent: Agent) -> Tensor:
        """Return the observation [envs, 6]: position, velocity, the cue or 0, whether the gate is closed."""
        cue = torch.where(self.frame == 0, self.cue, 0.0)
        is_held = (self.frame < self.hold_frames).float()
        return torch.cat([agent.state.pos, agent.state.vel, cue, is_held], dim=-1)

    def reward(self, agent: Agent) -> Tensor:
        """Return the reward [envs]: 1 / free_frames on the cue's side, 0 elsewhere and at other times."""
        is_right = agent.state.pos[:, :1] * self.cue > 0
        is_free = (self.frame > self.hold_frames) & (self.frame <= self.hold_frames + self.free_frames)
        return (is_right & is_free).float().squeeze(-1) / self.free_frames


class HeuristicPolicy(BaseHeuristicPolicy):
    """The heuristic: remember the cue and go to its side."""

    def __init__(self, continuous_action: bool):
        super().__init__(continuous_action)
        self._cue: Tensor | None = None

    def compute_action(self, observation: Tensor, u_range: float) -> Tensor:
        """Return the actions [envs, 2] for observations [envs, features]; all agents see the same cue."""
        shown = observation[:, _CUE]
        self._cue = shown if self._cue is None else torch.where(shown == 0, self._cue, shown)
        return torch.cat([self._cue * u_range, torch.zeros_like(shown)], dim=-1)


def _at_least_one(**argument: Any) -> int:
    ((name, value),) = argument.items()
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} = {value!r}: must be a whole number of at least 1")
    return value
