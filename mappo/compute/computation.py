"""The parts of a run that are compiled, as configurations, checkpoints and logs name them. It imports no torch."""

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

Simulation = Literal["plain", "fast"]
Way = Literal["plain", "fast", "mixed"]  # traced; traced and compiled; compiled, with products in bfloat16


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class Computation:
    """The parts of a run that are compiled: `collection.simulation` and `learner.update` without `auto`.

    selection: the simulation in which evaluations during training play.
    """

    simulation: Simulation
    update: Way
    selection: Simulation = "plain"

    def __str__(self) -> str:
        """Return the values, as a line of the log has them."""
        selection = ", also in evaluations during training" if self.selection == "fast" else ""
        return f"simulation {self.simulation}{selection}, update {self.update}"


PLAIN = Computation("plain", "plain")
