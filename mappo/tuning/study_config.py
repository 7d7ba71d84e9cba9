"""The settings of a study."""

from dataclasses import dataclass, field

from mappo.config import require_run_name
from mappo.errors import ConfigError
from mappo.promotion.gate import Gate


@dataclass(frozen=True)
class Budget:
    """How much is tried: trials that a session asks for, and hours after which none is started; 0 for no limit."""

    num_trials: int = 20
    hours: float = 0.0

    def __post_init__(self) -> None:
        """Something must be tried."""
        if self.num_trials < 1:
            raise ConfigError(f"trials = {self.num_trials}: must be 1 or more")
        if not 0 <= self.hours < 10_000:
            raise ConfigError(f"hours = {self.hours}: must be 0 or more")


@dataclass(frozen=True)
class Retraining:
    """What becomes of a study on this machine once its trials are done.

    num_seeds: how often the best configuration and the default are trained again; champions: where the best is to
    be promoted, if the gate says so; empty for nowhere.
    """

    num_seeds: int = 3
    champions: str = ""
    gate: Gate = field(default_factory=Gate)

    def __post_init__(self) -> None:
        """One training alone has no interval."""
        if self.num_seeds < 2:
            raise ConfigError(f"retraining seeds = {self.num_seeds}: at least 2, or there is no interval")


def study_name(series: str, edition: str) -> str:
    """Return the name of a study: that of its series, or of one edition of it, as a schedule makes them.

    Raises:
        ConfigError: the name is not allowed.
    """
    name = f"{series}-{edition}" if edition else series
    return require_run_name(name, "study")
