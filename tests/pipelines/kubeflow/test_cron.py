from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from mappo.errors import ConfigError
from pipelines.kubeflow.cron import Cron
from tests.support.kubeflow_rules import check_cron

MONDAY = datetime(2026, 11, 23, 12, tzinfo=ZoneInfo("UTC"))


def times(text: str, count: int = 3, after: datetime = MONDAY) -> list[str]:
    return [moment.strftime("%m-%d %H:%M:%S") for moment in Cron.parse(text).next(after, count)]


def test_five_fields_mean_the_same_as_in_crontab():
    """The server alone reads five fields as second to month: at second 30 of minute 2 of every hour."""
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
        ("0 0 */2 * 1", ["12-07 00:00:00", "12-21 00:00:00"]),  # with a star: a Monday and an odd day
        ("0 0 1-31 * 1", ["11-24 00:00:00", "11-25 00:00:00"]),  # without a star: a Monday, or any day
        ("0 0 1 JAN,jul *", ["01-01 00:00:00", "07-01 00:00:00"]),
    ],
)
def test_a_schedule_fires_when_the_servers_library_fires(text, expected):
    """The expected times were derived by hand from the rules of robfig/cron 1.2."""
    assert times(text, 2) == expected


@pytest.mark.parametrize(
    ("text", "zone", "after", "expected"),
    [
        ("0 30 2 * * *", "Europe/Berlin", "2027-03-27T12:00Z", "27-03-29T02:30+0200 27-03-30T02:30+0200"),
        ("0 30 2 * * *", "Europe/Berlin", "2027-10-30T12:00Z", "27-10-31T02:30+0200 27-10-31T02:30+0100"),
        ("0 */30 * * * *", "Europe/Berlin", "2027-03-28T00:20Z", "27-03-28T01:30+0100 27-03-28T03:00+0200"),
        ("0 0 * * * *", "America/New_York", "2027-11-07T04:30Z", "27-11-07T01:00-0400 27-11-07T01:00-0500"),
        ("0 0 0 * * 0", "America/Santiago", "2027-08-30T12:00Z", "27-09-12T00:00-0300 27-09-19T00:00-0300"),
        ("0 0 5 * * 0", "America/Santiago", "2027-09-04T12:00Z", "27-09-12T05:00-0300 27-09-19T05:00-0300"),
        ("0 0 0 * * *", "America/Santiago", "2027-09-04T12:00Z", "27-09-06T00:00-0300 27-09-07T00:00-0300"),
        ("0 30 1 * * 6", "America/Santiago", "2027-09-04T06:00Z", "27-09-05T01:30-0300 27-09-18T01:30-0300"),
        ("0 30 23 * * *", "America/Santiago", "2027-04-03T12:00Z", "27-04-03T23:30-0300 27-04-03T23:30-0400"),
        ("0 0 0 1 * *", "Africa/Cairo", "2027-04-29T12:00Z", "27-06-01T00:00+0300 27-07-01T00:00+0300"),
        ("0 0 0 * * 5", "Africa/Cairo", "2027-04-29T12:00Z", "27-05-07T00:00+0300 27-05-14T00:00+0300"),
        ("0 15 2 * * *", "Australia/Lord_Howe", "2027-10-02T00:00Z", "27-10-04T02:15+1100 27-10-05T02:15+1100"),
        ("0 0 9 * * 1-5", "Asia/Kolkata", "2027-03-26T12:00Z", "27-03-29T09:00+0530 27-03-30T09:00+0530"),
        ("0 0 0 29 2 *", "UTC", "2026-11-23T12:00Z", "28-02-29T00:00+0000 32-02-29T00:00+0000"),
        ("0 0 0 */2 * 1", "Europe/London", "2026-11-23T12:00Z", "26-12-07T00:00+0000 26-12-21T00:00+0000"),
        ("0 0 0 1-31 * 1", "UTC", "2026-11-23T12:00Z", "26-11-24T00:00+0000 26-11-25T00:00+0000"),
    ],
)
def test_times_around_changes_of_the_clock_are_those_of_the_servers_library(text, zone, after, expected):
    """A Go program with the search of robfig/cron 1.2.0 printed the expected times."""
    moments = Cron.parse(text).next(datetime.fromisoformat(after).astimezone(ZoneInfo(zone)), 2)
    assert [moment.strftime("%y-%m-%dT%H:%M%z") for moment in moments] == expected.split()


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
        ("9" * 5000 + " * * * *", "minute '999"),
        ("*/" + "9" * 5000 + " * * * *", "minute '999"),
        ("*/٣ * * * *", "minute '*/٣'"),
        ("0 0 30 feb *", "no such day"),
    ],
)
def test_expressions_that_the_server_refuses_or_never_fires_are_refused_naming_the_field(text, reason):
    with pytest.raises(ConfigError) as error:
        Cron.parse(text)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "text", ["30 2 * * *", "@hourly", "*/15 * * * mon-fri", "0 5/10 8-20 1,15 jan-jun ?", "* * * * *"]
)
def test_accepted_expressions_are_accepted_by_the_server_too(text):
    check_cron(Cron.parse(text).expression)
