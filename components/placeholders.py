"""The placeholder [[ScheduledTime]] in names, which a run replaces by its own time."""

import re
from datetime import UTC, datetime

from mappo.errors import ConfigError

SCHEDULED_TIME = "[[ScheduledTime]]"
_PLACEHOLDER = re.compile(r"\[\[[A-Za-z][^\]]*(\]\]?)?")


def has_placeholder(text: str) -> bool:
    """Return whether the text holds a placeholder, known or unknown."""
    return bool(_PLACEHOLDER.search(text))


def fill(text: str, scheduled_at: str) -> str:
    """Replace `[[ScheduledTime]]` by the time of a run, as YYYYMMDDHHMMSS in UTC.

    `scheduled_at` is that time in the format of RFC 3339. Text without a placeholder is returned unchanged.

    Raises:
        ConfigError: the text holds another placeholder, or holds this one and `scheduled_at` is not a time.
    """
    require_known(text)
    if SCHEDULED_TIME not in text:
        return text
    return text.replace(SCHEDULED_TIME, _moment(text, scheduled_at).strftime("%Y%m%d%H%M%S"))


def require_known(text: str) -> None:
    """Check that the text holds no placeholder but `[[ScheduledTime]]`.

    Raises:
        ConfigError: the text holds another placeholder.
    """
    for match in _PLACEHOLDER.finditer(text):
        if match[0] != SCHEDULED_TIME:
            raise ConfigError(f"{text!r}: nothing replaces {match[0]}; write {SCHEDULED_TIME}")


def _moment(text: str, scheduled_at: str) -> datetime:
    try:
        moment = datetime.fromisoformat(scheduled_at)
    except ValueError:
        moment = datetime.min
    if moment.tzinfo is None:
        raise ConfigError(
            f"{text!r}: {SCHEDULED_TIME} needs the time of the run, and {scheduled_at!r} is not a time such as "
            "2026-11-28T20:48:00Z"
        )
    return moment.astimezone(UTC)
