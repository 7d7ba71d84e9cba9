"""A scenario whose heuristic policy gives too few numbers."""

from tests.support.scenarios import Endless


class TooFewActions(Endless):
    """Agents have two action values each."""


class HeuristicPolicy:
    def __init__(self, continuous_action):
        pass

    def compute_action(self, observation, u_range):
        return observation[:, :1]
