"""When a schedule fires: cron as Kubeflow's server reads it, which is not how crontab does.

The server reads six fields, seconds first. Five are taken too, and mean seconds to month: a schedule that was to
run at 02:30 then runs every hour. Source: robfig/cron 1.2, `Parse`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from croniter import CroniterBadDateError, croniter

from mappo.config import ConfigError

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
_PART = re.compile(r"(?P<low>[*?]|\w+)(-(?P<high>\w+))?(/(?P<step>\d+))?")


@dataclass(frozen=True)
class Cron:
    """A schedule. `expression` has six fields, seconds first, as the server wants it."""

    expression: str
    _expanded: str  # for croniter: lists of numbers
    _is_either_day: bool  # the day of month or of week may match; else both must

    @classmethod
    def parse(cls, text: str) -> "Cron":
        """Read five fields, as in crontab, or six, seconds first, or a name such as `@daily`.

        Raises:
            ConfigError: naming the field that the server would refuse, or that no day ever matches.
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
        is_either = not (is_star["day of month"] or is_star["day of week"])
        if is_either and any(_is_all(name, numbers[name]) for name in ("day of month", "day of week")):
            numbers |= {name: _all(name) for name in ("day of month", "day of week")}
        expanded = " ".join(_listed(name, numbers[name]) for name in _FIELDS)
        cron = cls(" ".join(fields), expanded, is_either)
        try:
            next(cron.times(datetime(2024, 1, 1)))
        except CroniterBadDateError:
            raise ConfigError(f"cron {text!r}: no such day ever comes") from None
        return cron

    @classmethod
    def stored(cls, text: str) -> "Cron | None":
        """What a schedule on the server says, as the server reads it; None for what is not known here (`@every`).

        Five fields are seconds to month there, since somebody else may have stored them.
        """
        try:
            return cls.parse(f"{text} *" if len(text.split()) == 5 else text)
        except ConfigError:
            return None

    def next(self, after: datetime, count: int) -> list[datetime]:
        """The next times at which it fires, in the time zone of `after`."""
        return list(islice(self.times(after), count))

    def times(self, after: datetime) -> Iterator[datetime]:
        """All times at which it fires, in the time zone of `after`."""
        schedule = croniter(
            self._expanded, after, second_at_beginning=True, day_or=self._is_either_day, ret_type=datetime
        )
        while True:
            yield schedule.get_next()


def _read(text: str, name: str, field: str) -> tuple[set[int], bool]:
    """The numbers that a field means, and whether it begins with a star, however many that leaves out."""
    numbers: set[int] = set()
    is_star = False
    for part in field.split(","):
        match = _PART.fullmatch(part)
        if not match:
            raise ConfigError(f"cron {text!r}: {name} {part!r}: must be numbers, names, *, -, / and commas")
        lowest, highest = _FIELDS[name]
        step = int(match["step"] or 1)
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
    if not word.isdecimal() or not word.isascii():
        raise ConfigError(f"cron {text!r}: {name} {word!r}: must be a number{' or a name' if known else ''}")
    return int(word)


def _all(name: str) -> set[int]:
    lowest, highest = _FIELDS[name]
    return set(range(lowest, highest + 1))


def _is_all(name: str, numbers: set[int]) -> bool:
    return numbers == _all(name)


def _listed(name: str, numbers: set[int]) -> str:
    return "*" if _is_all(name, numbers) else ",".join(map(str, sorted(numbers)))
