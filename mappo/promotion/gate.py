"""The gate: the test that a candidate must pass to become the champion."""

import dataclasses
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from mappo.errors import ConfigError
from mappo.evaluation.constraints import Constraints
from mappo.strict_json import STRICT


@dataclass(frozen=True, config=STRICT)
class Gate:
    """The settings of the test that a candidate must pass."""

    margin: Annotated[
        float, Field(ge=0, description="mean return per episode by which the candidate must beat the champion")
    ] = 0.0
    confidence: Annotated[
        float,
        Field(
            gt=0.5,
            lt=1,
            description="confidence of the one-sided test; at 0.95, 1 in 20 equally good candidates passes",
        ),
    ] = 0.95
    num_seeds: Annotated[
        int, Field(ge=2, le=1000, description="number of gate seeds, which are drawn anew for each decision")
    ] = 10
    episodes_per_seed: Annotated[
        int, Field(ge=1, le=10_000, description="number of episodes of each policy per seed")
    ] = 20
    constraints: Constraints = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Require enough episodes for the test."""
        if self.num_seeds * self.episodes_per_seed < 20:
            raise ConfigError(
                f"num_seeds = {self.num_seeds}, episodes_per_seed = {self.episodes_per_seed}: the gate needs at "
                "least 20 episodes; increase one of these numbers"
            )
