"""The groups of a task: agents that see and do alike, and have a policy and a critic of their own.

One tensor holds all agents, [..., agents, features]. Where agents differ, the shorter observations and actions are
padded with zeros. A group cuts its own agents and features out of such a tensor, so that no network sees padding.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mappo.config import MAX_GROUP_NAME, MAX_GROUPS
from mappo.errors import ConfigError

ALL_AGENTS = "agents"  # the name of the group if all agents are equal
Shape = tuple[int, int | None, tuple[int, ...]]  # the last three fields of a group


@dataclass(frozen=True)
class Group:
    """The agents of a task that have observations and actions of equal shapes, and share a policy or not.

    agents: their indices among all agents, in order. num_features: the features of an observation.
    num_components: the components of an action; None if an action is a single choice. choices: the number of
    choices of each component; empty if actions are continuous. counts: whether its agents' rewards are a part of
    the return of an episode.
    """

    name: str
    agents: tuple[int, ...]
    num_features: int
    num_components: int | None
    choices: tuple[int, ...] = ()
    counts: bool = True

    def rows(self, tensor: Tensor, dim: int = -2) -> Tensor:
        """Return the group's share of a tensor that has all agents on the axis `dim`, which is negative."""
        if tensor.shape[dim] == len(self.agents):
            return tensor
        return torch.stack([tensor.select(dim, agent) for agent in self.agents], dim)

    def observations(self, observation: Tensor) -> Tensor:
        """Return the group's observations [..., agents of the group, features], without padding."""
        return _first(self.rows(observation), self.num_features)

    def actions(self, action: Tensor) -> Tensor:
        """Return the group's actions [..., agents of the group(, components)], without padding."""
        if self.num_components is None:
            return self.rows(action, -1)
        return _first(self.rows(action), self.num_components)

    @property
    def shape(self) -> Shape:
        """The shape of the observations and actions of each agent."""
        return self.num_features, self.num_components, self.choices

    @property
    def action_axis(self) -> int:
        """The axis of the agents in a tensor of actions."""
        return -1 if self.num_components is None else -2


def merged(groups: Sequence[Group], parts: Sequence[Tensor], dim: int = -2) -> Tensor:
    """Return a tensor of all agents from one tensor of each group; the agents are on the axis `dim` (-1 or -2).

    If an axis of features follows, shorter ones are padded with zeros.
    """
    if len(groups) == 1:
        return parts[0]
    shares = parts if dim == -1 else padded(parts)
    rows = {
        agent: row
        for group, share in zip(groups, shares, strict=True)
        for agent, row in zip(group.agents, share.unbind(dim), strict=True)
    }
    return torch.stack([rows[agent] for agent in range(len(rows))], dim)


def mean_reward(groups: Sequence[Group], rewards: Tensor) -> Tensor:
    """Return the mean of rewards or returns [..., agents] over the agents that count for the return."""
    if all(group.counts for group in groups):
        return rewards.mean(-1)
    return torch.cat([group.rows(rewards, -1) for group in groups if group.counts], -1).mean(-1)


def padded(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors with zeros at the end of their last axis, as many as make them equally long."""
    width = max(tensor.shape[-1] for tensor in tensors)
    return [
        tensor if tensor.shape[-1] == width else torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
        for tensor in tensors
    ]


def find_groups(
    shapes: Mapping[str, Shape], requested: Mapping[str, Sequence[str]], counting: Sequence[str] = ()
) -> tuple[Group, ...]:
    """Return the groups of a task, in the order of their first agents.

    shapes: the shape of each agent's observations and actions, by the agent's name, in order. requested: the names
    of the agents of each group, by the group's name. If it is empty, equal agents are one group. Unequal agents
    are grouped by their shapes and their team, which is the agent's name without the number at its end. counting:
    the names of the groups that count for the return; if it is empty, all count.

    Raises:
        ConfigError: the requested groups are not groups of these agents, there are too many groups, or a group
            that should count does not exist.
    """
    members = _requested_members(shapes, requested) if requested else _found_members(shapes)
    if len(members) > MAX_GROUPS:
        raise ConfigError(
            f"environment.groups: the agents form {len(members)} groups ({', '.join(members)}), more than "
            f"{MAX_GROUPS}; pad observations or actions in the scenario, so that more agents are alike"
        )
    if unknown := [name for name in counting if name not in members]:
        raise ConfigError(
            f"environment.return_groups: there is no group {', '.join(unknown)}; groups: {', '.join(members)}"
        )
    indices = {name: index for index, name in enumerate(shapes)}
    groups = [
        Group(
            name,
            tuple(sorted(indices[agent] for agent in agents)),
            *shapes[agents[0]],
            counts=name in (counting or members),
        )
        for name, agents in members.items()
    ]
    return tuple(sorted(groups, key=lambda group: group.agents))


def _found_members(shapes: Mapping[str, Shape]) -> dict[str, list[str]]:
    if len(set(shapes.values())) == 1:
        return {ALL_AGENTS: [*shapes]}
    members: dict[tuple[str, Shape], list[str]] = {}
    for agent, shape in shapes.items():
        members.setdefault((_team(agent), shape), []).append(agent)
    named: dict[str, list[str]] = {}
    for (team, _), agents in members.items():
        numbers = range(2, len(members) + 2)
        names = [team, *(f"{team[: MAX_GROUP_NAME - 2]}_{number}" for number in numbers)]
        named[next(name for name in names if name not in named)] = agents
    return named


def _team(agent: str) -> str:
    """Return the team of an agent, such as `adversary` of `adversary_0`, as the name of a group."""
    without_number = re.sub(r"[\W_]*\d+$", "", agent) or agent
    team = re.sub(r"[^A-Za-z0-9_-]", "_", without_number)
    return (team if team[0].isalnum() else f"team{team}")[:MAX_GROUP_NAME]


def _requested_members(
    shapes: Mapping[str, Shape], requested: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    group_of: dict[str, str] = {}
    for name, agents in requested.items():
        for agent in agents:
            if agent not in shapes:
                raise ConfigError(
                    f"environment.groups.{name}: there is no agent {agent!r}; agents: {', '.join(shapes)}"
                )
            if agent in group_of:
                raise ConfigError(
                    f"environment.groups.{name}: {agent} is in {group_of[agent]}, too; name each agent once"
                )
            group_of[agent] = name
        if len({shapes[agent] for agent in agents}) > 1:
            listing = "; ".join(f"{agent}: {described(shapes[agent])}" for agent in agents)
            raise ConfigError(
                f"environment.groups.{name}: the agents of a group need observations and actions of the same "
                f"shape, but the shapes differ: {listing}; put agents that differ into different groups"
            )
    if missing := [agent for agent in shapes if agent not in group_of]:
        raise ConfigError(f"environment.groups: {', '.join(missing)} is in no group; name each agent once")
    return {name: [*agents] for name, agents in requested.items()}


def described(shape: Shape) -> str:
    """Return the shape of an agent's observations and actions in words."""
    num_features, num_components, choices = shape
    actions = f"{' x '.join(map(str, choices))} actions" if choices else f"{num_components} action values"
    return f"{num_features} observation features and {actions}"


def _first(tensor: Tensor, width: int) -> Tensor:
    return tensor if tensor.shape[-1] == width else tensor[..., :width].contiguous()
