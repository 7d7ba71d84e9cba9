"""The texts of times and numbers, the same in tables and on pages."""

from collections.abc import Collection, Sequence
from datetime import UTC, datetime


def moment(seconds: float) -> str:
    """Return a time, in seconds since 1970, as a date and a time in UTC; empty if it is no time of this world."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return ""


def age(seconds: float) -> str:
    """Return a duration in its largest unit, such as 5 min, 3 h or 12 d."""
    minutes = max(0.0, seconds) / 60
    if minutes < 1:
        return "now"
    for limit, divisor, unit in ((60, 1, "min"), (48 * 60, 60, "h")):
        if minutes < limit:
            return f"{minutes / divisor:.0f} {unit}"
    return f"{minutes / 1440:.0f} d"


def aligned(rows: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Return the lines of a table; columns are aligned to the right, but those of the indices in `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
