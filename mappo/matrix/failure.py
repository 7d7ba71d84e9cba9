"""The record of why a cell failed, kept beside its run until the cell is tried again."""

import json
from dataclasses import asdict
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as strict_dataclass

from mappo.errors import one_line
from mappo.strict_json import parse_report

FAILURE = "failure.json"  # its key in the store of the run
_MAX_REASON = 500


@strict_dataclass(frozen=True, config=ConfigDict(strict=True, extra="ignore"))
class Failure:
    """The last failure of a cell.

    is_final: another try would fail alike. config_hash: that of the cell's configuration. seconds: when it
    happened, since 1970. version: that of mappo.
    """

    reason: Annotated[str, Field(min_length=1)]
    is_final: bool
    config_hash: str
    seconds: Annotated[float, Field(allow_inf_nan=False)]
    version: str


_FAILURE = TypeAdapter(Failure)


def failure_json(failure: Failure) -> bytes:
    """Return a record of a failure as JSON; its reason is one short line."""
    return json.dumps({**asdict(failure), "reason": one_line(failure.reason, _MAX_REASON)}, indent=1).encode()


def parse_failure(location: str, content: bytes) -> Failure:
    """Return a record of a failure from its JSON.

    Raises:
        ConfigError: the content is no such record.
    """
    failure = parse_report(_FAILURE, f"{location}/{FAILURE}", content, "a record of a failure")
    return Failure(**{**asdict(failure), "reason": one_line(failure.reason, _MAX_REASON)})
