"""The settings of monitoring, from the environment."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mappo.config import require_run_name
from mappo.errors import ConfigError
from mappo.monitoring import metrics
from mappo.runs.supervisor import COUNT_VARIABLE


@dataclass(frozen=True)
class MonitorSettings:
    """How a stage can be watched.

    port: where training serves its metrics; 0 is any free port, None not at all. pushgateway: a URL, or empty.
    linger_seconds: a little more than the time between two scrapes. study: to which study a run belongs. attempts:
    those of the stage so far, with this process.
    """

    port: int | None = None
    pushgateway: str = ""
    linger_seconds: float = metrics.SCRAPE_SECONDS + 5.0
    study: str = "none"
    attempts: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "MonitorSettings":
        """Read MAPPO_METRICS_PORT, MAPPO_PUSHGATEWAY, MAPPO_LINGER_SECONDS, MAPPO_STUDY and MAPPO_ATTEMPTS.

        An empty variable is as one that is not set.

        Raises:
            ConfigError: one of them is not what it must be.
        """
        port = environment.get("MAPPO_METRICS_PORT", "")
        if port and (not port.isdecimal() or int(port) > 65535):
            raise ConfigError(f"MAPPO_METRICS_PORT = {port!r}: must be a port, 0 to 65535 (0: any free one)")
        pushgateway = environment.get("MAPPO_PUSHGATEWAY", "")
        if pushgateway and not re.fullmatch(r"https?://[^\s/@]+(/[^\s@]*)?", pushgateway):
            raise ConfigError(
                "MAPPO_PUSHGATEWAY: must be a URL such as http://pushgateway:9091, without a password"
            )
        linger = environment.get("MAPPO_LINGER_SECONDS", "") or str(cls.linger_seconds)
        if not re.fullmatch(r"\d+(\.\d+)?", linger) or float(linger) > 3600:
            raise ConfigError(f"MAPPO_LINGER_SECONDS = {linger!r}: must be a number of seconds, 0 to 3600")
        try:
            study = require_run_name(environment.get("MAPPO_STUDY", "") or cls.study)
        except ConfigError as error:
            raise ConfigError(f"MAPPO_STUDY: {error}") from None
        attempts = environment.get(COUNT_VARIABLE, "") or "1"
        if not attempts.isdecimal():
            raise ConfigError(f"{COUNT_VARIABLE} = {attempts!r}: must be a number of attempts")
        return cls(int(port) if port else None, pushgateway, float(linger), study, int(attempts))
