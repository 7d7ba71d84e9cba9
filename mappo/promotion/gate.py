"""The gate: what a candidate must show to become the champion."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from mappo.errors import ConfigError
from mappo.strict_json import STRICT


@dataclass(frozen=True, config=STRICT)
class Gate:
    """What a candidate must show."""

    margin: Annotated[float, Field(ge=0, description="how much more return an episode it must earn")] = 0.0
    confidence: Annotated[
        float, Field(gt=0.5, lt=1, description="how sure that must be; 0.95: of equals, 1 in 20 would pass")
    ] = 0.95
    num_seeds: Annotated[int, Field(ge=1, le=1000, description="gate seeds, drawn afresh for each decision")] = 10
    episodes_per_seed: Annotated[int, Field(ge=1, le=10_000, description="episodes of each policy per seed")] = 20

    def __post_init__(self) -> None:
        """A test needs some values."""
        if self.num_seeds * self.episodes_per_seed < 20:
            raise ConfigError(
                f"num_seeds = {self.num_seeds}, episodes_per_seed = {self.episodes_per_seed}: at least 20 episodes"
            )
