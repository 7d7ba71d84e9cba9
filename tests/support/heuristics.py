"""A scenario whose heuristic policy returns too few action values."""

from tests.support.scenarios import Endless


class TooFewActions(Endless):
    """A task whose agents have two action values."""


class HeuristicPolicy:
    def __init__(self, continuous_action):
        pass

    def compute_action(self, observation, u_range):
        return observation[:, :1]
