"""The settings of monitoring, read from environment variables."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mappo.config import require_run_name
from mappo.errors import ConfigError
from mappo.monitoring import metrics
from mappo.runs.supervisor import COUNT_VARIABLE

_URL = re.compile(r"https?://([^\s/@:\[\]]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?(/[^\s@]*)?")


@dataclass(frozen=True)
class MonitorSettings:
    """The settings of a stage's monitoring.

    port: port on which training serves its metrics; 0 for any free port, None to serve nothing.
    pushgateway: URL of a Pushgateway, or empty for none.
    linger_seconds: how long a stage waits at its end for a scrape; a little more than the scrape interval.
    study: name of the study to which the run belongs.
    attempts: number of attempts of the stage so far, this process included.
    """

    port: int | None = None
    pushgateway: str = ""
    linger_seconds: float = metrics.SCRAPE_SECONDS + 5.0
    study: str = "none"
    attempts: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "MonitorSettings":
        """Read MAPPO_METRICS_PORT, MAPPO_PUSHGATEWAY, MAPPO_LINGER_SECONDS, MAPPO_STUDY and MAPPO_ATTEMPTS.

        An empty variable counts as not set.

        Raises:
            ConfigError: a variable has a value that is not allowed.
        """
        port = environment.get("MAPPO_METRICS_PORT", "")
        if port and (not port.isdecimal() or int(port) > 65535):
            raise ConfigError(f"MAPPO_METRICS_PORT = {port!r}: must be a port from 0 to 65535 (0: any free port)")
        pushgateway = environment.get("MAPPO_PUSHGATEWAY", "")
        if pushgateway and not _URL.fullmatch(pushgateway):
            raise ConfigError(
                "MAPPO_PUSHGATEWAY: must be a URL such as http://pushgateway:9091, without a password"
            )
        linger = environment.get("MAPPO_LINGER_SECONDS", "") or str(cls.linger_seconds)
        if not re.fullmatch(r"\d+(\.\d+)?", linger) or float(linger) > 3600:
            raise ConfigError(f"MAPPO_LINGER_SECONDS = {linger!r}: must be a number of seconds from 0 to 3600")
        try:
            study = require_run_name(environment.get("MAPPO_STUDY", "") or cls.study)
        except ConfigError as error:
            raise ConfigError(f"MAPPO_STUDY: {error}") from None
        attempts = environment.get(COUNT_VARIABLE, "") or "1"
        if not attempts.isdecimal():
            raise ConfigError(f"{COUNT_VARIABLE} = {attempts!r}: must be a number of attempts")
        return cls(int(port) if port else None, pushgateway, float(linger), study, int(attempts))
