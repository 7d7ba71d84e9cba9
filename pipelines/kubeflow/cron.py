"""Read cron as Kubeflow's server does, which is not how crontab does, and tell when a schedule fires.

The server reads six fields, seconds first. It takes five too and reads them as seconds to month: a schedule that
was to run at 02:30 then runs every hour. The server uses robfig/cron 1.2.0 (the same code as 1.1.0); `Cron.times`
searches as its `SpecSchedule.Next` does, because every library treats changes of the clock differently.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice

from mappo.errors import ConfigError

_FIELDS = {
    "second": (0, 59),
    "minute": (0, 59),
    "hour": (0, 23),
    "day of month": (1, 31),
    "month": (1, 12),
    "day of week": (0, 6),
}
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_DAYS = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"]
_NAMES = {
    "month": {name: number for number, name in enumerate(_MONTHS, 1)},
    "day of week": {name: number for number, name in enumerate(_DAYS)},
}
_DESCRIPTORS = {
    "@yearly": "0 0 0 1 1 *",
    "@annually": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 0",
    "@daily": "0 0 0 * * *",
    "@midnight": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}
_LONGEST_NUMBER = 9  # digits; longer ones are out of range anyway, and Python refuses to read very long ones
_LONGEST_SHOWN = 80
_YEARS = 5  # the server looks no further ahead
_PART = re.compile(r"(?P<low>[*?]|\w+)(-(?P<high>\w+))?(/(?P<step>[0-9]+))?")


@dataclass(frozen=True)
class Cron:
    """A schedule. `expression` has six fields, seconds first, as the server wants it."""

    expression: str
    _numbers: dict[str, set[int]]
    _is_either_day: bool  # the day of month or of week may match; else both must

    @classmethod
    def parse(cls, text: str) -> "Cron":
        """Read five fields, as in crontab, or six, seconds first, or a name such as `@daily`.

        Raises:
            ConfigError: the server would refuse a field, which the message names, or the schedule never fires.
        """
        fields = _DESCRIPTORS.get(text.strip().lower(), text).split()
        if len(fields) == 5:
            fields = ["0", *fields]
        if len(fields) != 6:
            raise ConfigError(
                f"cron {text!r}: must be 5 fields (minute hour day month weekday), 6 (seconds first) or one of "
                f"{', '.join(_DESCRIPTORS)}"
            )
        numbers, is_star = {}, {}
        for (name, _), field in zip(_FIELDS.items(), fields, strict=True):
            numbers[name], is_star[name] = _read(text, name, field)
        cron = cls(" ".join(fields), numbers, not (is_star["day of month"] or is_star["day of week"]))
        if not cron.next(datetime.now(UTC), 1):
            raise ConfigError(f"cron {text!r}: no such day comes within {_YEARS} years")
        return cron

    @classmethod
    def stored(cls, text: str) -> "Cron | None":
        """Read a schedule on the server as the server does; None for what is not known here (`@every`).

        Five fields are seconds to month there, since somebody else may have stored them.
        """
        try:
            return cls.parse(f"{text} *" if len(text.split()) == 5 else text)
        except ConfigError:
            return None

    def next(self, after: datetime, count: int) -> list[datetime]:
        """Return the next times at which it fires, in the time zone of `after`."""
        return list(islice(self.times(after), count))

    def times(self, after: datetime) -> Iterator[datetime]:
        """Yield the times at which it fires, in the time zone of `after`."""
        while (moment := self._next(after)) is not None:
            yield moment
            after = moment

    def _next(self, after: datetime) -> datetime | None:
        moment, is_reset = _plus(after.replace(microsecond=0), timedelta(seconds=1)), False
        limit = moment.year + _YEARS
        while moment.year <= limit:
            for field in _SEARCH:
                moment, is_reset, has_wrapped = self._search(field, moment, is_reset)
                if has_wrapped:  # a larger field has changed: check that one again
                    break
            else:
                return moment
        return None

    def _search(self, field: "_Field", moment: datetime, is_reset: bool) -> tuple[datetime, bool, bool]:
        """Step until a field matches or wraps around; smaller fields restart at 0 before the very first step."""
        while not self._matches(field.name, moment):
            moment = field.step(moment if is_reset else field.reset(moment))
            is_reset = True
            if field.has_wrapped(moment):
                return moment, is_reset, True
        return moment, is_reset, False

    def _matches(self, name: str, moment: datetime) -> bool:
        if name != "day":
            return getattr(moment, name) in self._numbers[name]
        matches = (
            moment.day in self._numbers["day of month"],
            moment.isoweekday() % 7 in self._numbers["day of week"],
        )
        return any(matches) if self._is_either_day else all(matches)


@dataclass(frozen=True)
class _Field:
    """A field of the search: reset all smaller ones, go one step on, and tell whether it begins anew."""

    name: str
    reset: Callable[[datetime], datetime]
    step: Callable[[datetime], datetime]
    has_wrapped: Callable[[datetime], bool]


def _plus(moment: datetime, duration: timedelta) -> datetime:
    """Add a duration that really passes, also where the clock changes."""
    return (moment.astimezone(UTC) + duration).astimezone(moment.tzinfo)


def _at(clock: datetime, zone: tzinfo | None) -> datetime:
    """Return the moment at which a clock shows a time; if it never does or does twice, the one that Go chooses.

    Go takes the offset at that time in UTC; if it is not in force at the moment that follows from it, Go takes the
    offset that is.
    """
    assert zone is not None
    naive, offset = clock.replace(tzinfo=None, fold=0), clock.replace(tzinfo=UTC).astimezone(zone).utcoffset()
    assert offset is not None
    moment = (naive - offset).replace(tzinfo=UTC).astimezone(zone)
    if (actual := moment.utcoffset()) is not None and actual != offset:
        moment = (naive - actual).replace(tzinfo=UTC).astimezone(zone)
    return moment


def _start_of_day(moment: datetime, day: int) -> datetime:
    return _at(moment.replace(day=day, hour=0, minute=0, second=0), moment.tzinfo)


def _next_month(moment: datetime) -> datetime:
    first = moment.replace(year=moment.year + moment.month // 12, month=moment.month % 12 + 1, day=1, tzinfo=None)
    return _at(first + timedelta(days=moment.day - 1), moment.tzinfo)


_SEARCH = (
    _Field("month", lambda at: _start_of_day(at, 1), _next_month, lambda at: at.month == 1),
    _Field(
        "day",
        lambda at: _start_of_day(at, at.day),
        lambda at: _at(at.replace(tzinfo=None) + timedelta(days=1), at.tzinfo),
        lambda at: at.day == 1,
    ),
    _Field(
        "hour",
        lambda at: _at(at.replace(minute=0, second=0), at.tzinfo),
        lambda at: _plus(at, timedelta(hours=1)),
        lambda at: at.hour == 0,
    ),
    _Field(
        "minute",
        lambda at: at.replace(second=0),
        lambda at: _plus(at, timedelta(minutes=1)),
        lambda at: at.minute == 0,
    ),
    _Field("second", lambda at: at, lambda at: _plus(at, timedelta(seconds=1)), lambda at: at.second == 0),
)


def _read(text: str, name: str, field: str) -> tuple[set[int], bool]:
    """The numbers that a field means, and whether it begins with a star, however many that leaves out."""
    numbers: set[int] = set()
    is_star = False
    for part in field.split(","):
        match = _PART.fullmatch(part)
        if not match:
            raise ConfigError(f"cron {text!r}: {name} {part!r}: must be numbers, names, *, -, / and commas")
        lowest, highest = _FIELDS[name]
        step = _number(text, name, match["step"] or "1")
        if match["low"] in "*?":
            low, high = lowest, highest
            is_star = True
        else:
            low = _number(text, name, match["low"])
            high = _number(text, name, match["high"]) if match["high"] else highest if match["step"] else low
        if not lowest <= low <= high <= highest or not step:
            hint = "; Sunday is 0" if name == "day of week" and high == 7 else ""
            raise ConfigError(f"cron {text!r}: {name} {part!r}: must lie within {lowest} and {highest}{hint}")
        numbers.update(range(low, high + 1, step))
    return numbers, is_star


def _number(text: str, name: str, word: str) -> int:
    known = _NAMES.get(name, {})
    if word.lower() in known:
        return known[word.lower()]
    if not word.isdecimal() or not word.isascii() or len(word) > _LONGEST_NUMBER:
        kind = f"a number{' or a name' if known else ''}"
        raise ConfigError(f"cron {_cut(text)!r}: {name} {_cut(word)!r}: must be {kind}")
    return int(word)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
