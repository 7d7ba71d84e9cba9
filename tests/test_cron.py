from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from mappo.config import ConfigError
from pipelines.kubeflow.cron import Cron
from tests.kubeflow_rules import check_cron

MONDAY = datetime(2026, 11, 23, 12, tzinfo=ZoneInfo("UTC"))


def times(text: str, count: int = 3, after: datetime = MONDAY) -> list[str]:
    return [when.strftime("%m-%d %H:%M:%S") for when in Cron.parse(text).next(after, count)]


def test_five_fields_mean_what_crontab_means():
    """The server would read them as second to month: at second 30 of minute 2 of every hour."""
    assert Cron.parse("30 2 * * *").expression == "0 30 2 * * *"
    assert times("30 2 * * *") == ["11-24 02:30:00", "11-25 02:30:00", "11-26 02:30:00"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("15 30 2 * * *", ["11-24 02:30:15", "11-25 02:30:15"]),
        ("@daily", ["11-24 00:00:00", "11-25 00:00:00"]),
        ("@weekly", ["11-29 00:00:00", "12-06 00:00:00"]),
        ("*/20 9-17/4 * * MON-fri", ["11-23 13:00:00", "11-23 13:20:00"]),
        ("5/25 * * * ?", ["11-23 12:05:00", "11-23 12:30:00"]),
        ("0 0 1 * 1", ["11-30 00:00:00", "12-01 00:00:00"]),  # a Monday, or the first
        ("0 0 */2 * 1", ["12-07 00:00:00", "12-21 00:00:00"]),  # a star is in it: a Monday, and an odd day
        ("0 0 1-31 * 1", ["11-24 00:00:00", "11-25 00:00:00"]),  # no star: a Monday, or any day
        ("0 0 1 JAN,jul *", ["01-01 00:00:00", "07-01 00:00:00"]),
    ],
)
def test_it_fires_when_the_servers_library_fires(text, expected):
    """By hand, from the rules of robfig/cron 1.2."""
    assert times(text, 2) == expected


def test_it_fires_in_the_time_zone_that_is_asked_for():
    before_summer = datetime(2026, 3, 28, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    found = Cron.parse("0 4 * * *").next(before_summer, 2)
    assert [when.isoformat() for when in found] == ["2026-03-29T04:00:00+02:00", "2026-03-30T04:00:00+02:00"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("61 * * * *", "minute '61': must lie within 0 and 59"),
        ("* * * * 7", "Sunday is 0"),
        ("* * * *", "must be 5 fields"),
        ("", "must be 5 fields"),
        ("* * * * * * *", "must be 5 fields"),
        ("@every 1h", "must be 5 fields"),
        ("0 0 L * *", "day of month 'L'"),
        ("0 0 * * 1#2", "day of week '1#2'"),
        ("30-10 * * * *", "minute '30-10'"),
        ("*/0 * * * *", "minute '*/0'"),
        ("x * * * *", "minute 'x'"),
        ("٣ * * * *", "must be a number"),
        ("0 0 31 2 *", "no such day"),
        ("0 0 30 feb *", "no such day"),
    ],
)
def test_what_the_server_would_refuse_or_never_fire_is_refused_naming_the_field(text, reason):
    with pytest.raises(ConfigError) as error:
        Cron.parse(text)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "text", ["30 2 * * *", "@hourly", "*/15 * * * mon-fri", "0 5/10 8-20 1,15 jan-jun ?", "* * * * *"]
)
def test_what_is_taken_is_taken_by_the_server_too(text):
    check_cron(Cron.parse(text).expression)
