"""Find a moment at which a schedule can be replaced, so that every time of it starts exactly one run.

The server starts a run up to half a minute after its time. A schedule starts no run for a time before its own
creation. So a replacement is exact if no time lies shortly before it, whose run the old schedule may still have to
start, or in the moment in which both schedules exist, whose run both would start.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from pipelines.kubeflow.cron import Cron

_LATENCY = timedelta(seconds=45)  # a run starts 15 to 25 s after its time; the controller looks every 30 s
_OVERLAP = timedelta(
    seconds=10
)  # the two requests of a replacement take less; with both, every minute has 5 s left
_LONGEST_WAIT = timedelta(minutes=3)


def quiet_delay(crons: Sequence[Cron], now: datetime) -> timedelta | None:
    """Return how long to wait for a moment with no time of a schedule around it; None if there is none soon.

    `crons` are the schedules before and after the replacement. The time zone of `now` is that of the server.
    """
    start = now
    while start - now <= _LONGEST_WAIT:
        upcoming = [time for cron in crons for time in cron.next(start - _LATENCY, 1)]
        near = [time for time in upcoming if time <= start + _OVERLAP]
        if not near:
            return start - now
        start = max(near) + _LATENCY
    return None
