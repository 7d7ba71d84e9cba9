"""The constraints on measurements: limits that a policy must keep, whatever its return is."""

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from mappo.environment.reductions import MAX_MEASUREMENTS, MeasurementName
from mappo.errors import ConfigError
from mappo.strict_json import STRICT


@dataclass(frozen=True, config=STRICT)
class Constraint:
    """A limit of the mean of a measurement over episodes: `at_most` or `at_least`."""

    at_most: Annotated[float | None, Field(description="highest mean over episodes that is allowed")] = None
    at_least: Annotated[float | None, Field(description="lowest mean over episodes that is allowed")] = None
    largest_event: Annotated[
        float,
        Field(
            gt=0,
            description="the most that rare events, such as collisions, change the measurement of one episode; 1 "
            "suits flags; the bound allows for such events that the episodes do not show",
        ),
    ] = 1.0

    def __post_init__(self) -> None:
        """Require one limit."""
        if (self.at_most is None) == (self.at_least is None):
            raise ConfigError(
                f"at_most = {self.at_most}, at_least = {self.at_least}: a constraint has one of these limits; "
                'give {"at_most": X} or {"at_least": X}'
            )

    @property
    def sign(self) -> int:
        """The direction of bad values: 1 if high values are bad, or -1 if low values are."""
        return 1 if self.at_least is None else -1

    @property
    def limit(self) -> float:
        """The limit of the mean."""
        limit = self.at_most if self.at_least is None else self.at_least
        assert limit is not None
        return limit

    def excess(self, mean: float) -> float:
        """Return how far a mean lies beyond the limit; 0 or less if the mean keeps the limit."""
        return self.sign * (mean - self.limit)

    def __str__(self) -> str:
        """Return the limit, as in `at most 0.1`."""
        return f"at {'most' if self.at_least is None else 'least'} {self.limit:.4g}"


Constraints = Annotated[
    dict[MeasurementName, Constraint],
    Field(
        max_length=MAX_MEASUREMENTS,
        description="limits of what info() measures, as a JSON object by name, such as "
        '{"agent_collisions": {"at_most": 0.1}} or {"rescued": {"at_least": 0.9}}',
    ),
]
