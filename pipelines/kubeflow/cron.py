"""Read cron expressions as Kubeflow's server does, unlike crontab, and compute when a schedule fires.

The server reads six fields, seconds first. It accepts five fields too, but reads them as seconds to month: a
schedule meant for 02:30 then fires every hour. The server uses robfig/cron 1.2.0 (the same code as 1.1.0).
`Cron.times` searches as robfig's `SpecSchedule.Next` does, because libraries differ when the clock changes.
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
_MAX_DIGITS = 9  # longer numbers are out of range anyway, and Python refuses to read very long ones
_MAX_QUOTED = 80  # characters of an expression that an error message quotes
_MAX_YEARS = 5  # the server searches no further ahead
_PART = re.compile(r"(?P<low>[*?]|\w+)(-(?P<high>\w+))?(/(?P<step>[0-9]+))?")


@dataclass(frozen=True)
class Cron:
    """A cron schedule. `expression` has six fields, seconds first, as the server expects."""

    expression: str
    _numbers: dict[str, set[int]]
    _is_either_day: bool  # whether one match, of day of month or day of week, suffices; otherwise both must match

    @classmethod
    def parse(cls, text: str) -> "Cron":
        """Read five fields as in crontab, six fields with seconds first, or a name such as `@daily`.

        Raises:
            ConfigError: the server would refuse a field, or the schedule never fires; the message names the field.
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
            raise ConfigError(f"cron {text!r}: never fires: there is no such day within {_MAX_YEARS} years")
        return cron

    @classmethod
    def stored(cls, text: str) -> "Cron | None":
        """Read an expression that the server stores, as the server does; return None for an unsupported `@every`.

        Five fields mean seconds to month here, unlike in `parse`: another client may have stored them.
        """
        try:
            return cls.parse(f"{text} *" if len(text.split()) == 5 else text)
        except ConfigError:
            return None

    def next(self, after: datetime, count: int) -> list[datetime]:
        """Return the next `count` times at which the schedule fires, in the time zone of `after`."""
        return list(islice(self.times(after), count))

    def times(self, after: datetime) -> Iterator[datetime]:
        """Yield the times at which the schedule fires, in the time zone of `after`."""
        while (moment := self._next(after)) is not None:
            yield moment
            after = moment

    def _next(self, after: datetime) -> datetime | None:
        moment, is_reset = _plus(after.replace(microsecond=0), timedelta(seconds=1)), False
        limit = moment.year + _MAX_YEARS
        while moment.year <= limit:
            for field in _SEARCH:
                moment, is_reset, has_wrapped = self._search(field, moment, is_reset)
                if has_wrapped:  # a larger field has changed: check the larger fields again
                    break
            else:
                return moment
        return None

    def _search(self, field: "_Field", moment: datetime, is_reset: bool) -> tuple[datetime, bool, bool]:
        """Advance a field until it matches or wraps around; reset smaller fields before the search's first step.

        Return the moment, whether smaller fields have been reset, and whether the field has wrapped around.
        """
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
    """A field of the search.

    reset: set all smaller fields to their minimum. step: advance the field by one. has_wrapped: return whether the
    field has wrapped around to its minimum.
    """

    name: str
    reset: Callable[[datetime], datetime]
    step: Callable[[datetime], datetime]
    has_wrapped: Callable[[datetime], bool]


def _plus(moment: datetime, duration: timedelta) -> datetime:
    """Add a duration of elapsed time, which stays exact when the clock changes."""
    return (moment.astimezone(UTC) + duration).astimezone(moment.tzinfo)


def _at(clock: datetime, zone: tzinfo | None) -> datetime:
    """Return the moment at which a clock in a zone shows a time; resolve skipped and repeated times as Go does.

    Go first applies the zone's offset at the same time in UTC. If another offset is in force at the resulting
    moment, Go applies that offset instead.
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
    _Field("month", lambda moment: _start_of_day(moment, 1), _next_month, lambda moment: moment.month == 1),
    _Field(
        "day",
        lambda moment: _start_of_day(moment, moment.day),
        lambda moment: _at(moment.replace(tzinfo=None) + timedelta(days=1), moment.tzinfo),
        lambda moment: moment.day == 1,
    ),
    _Field(
        "hour",
        lambda moment: _at(moment.replace(minute=0, second=0), moment.tzinfo),
        lambda moment: _plus(moment, timedelta(hours=1)),
        lambda moment: moment.hour == 0,
    ),
    _Field(
        "minute",
        lambda moment: moment.replace(second=0),
        lambda moment: _plus(moment, timedelta(minutes=1)),
        lambda moment: moment.minute == 0,
    ),
    _Field(
        "second",
        lambda moment: moment,
        lambda moment: _plus(moment, timedelta(seconds=1)),
        lambda moment: moment.second == 0,
    ),
)


def _read(text: str, name: str, field: str) -> tuple[set[int], bool]:
    """Return the numbers that a field matches, and whether the field has a star, even one with a step (`*/2`)."""
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
    if not word.isdecimal() or not word.isascii() or len(word) > _MAX_DIGITS:
        kind = f"a number{' or a name' if known else ''}"
        raise ConfigError(f"cron {_cut(text)!r}: {name} {_cut(word)!r}: must be {kind}")
    return int(word)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_QUOTED else f"{text[:_MAX_QUOTED]}..."
