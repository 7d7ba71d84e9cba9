"""The tags and the comment that people attach to a run; they lie beside its checkpoints and decide nothing."""

import json
from collections.abc import Collection
from dataclasses import asdict
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as strict_dataclass

from mappo.errors import KeyMissing
from mappo.runs.store import Store
from mappo.strict_json import checked, parse_report

TAGS = "tags.json"  # the key in the store of a run
MAX_BYTES = 20_000
_STRICT = ConfigDict(strict=True, extra="forbid")


@strict_dataclass(frozen=True, config=_STRICT)
class Tags:
    """The tags of a run, sorted, and its comment."""

    tags: Annotated[
        tuple[Annotated[str, Field(pattern="^[a-z0-9][a-z0-9._-]{0,39}$")], ...], Field(max_length=50)
    ] = ()
    comment: Annotated[str, Field(max_length=2000)] = ""

    def changed(self, add: Collection[str], remove: Collection[str], comment: str | None) -> "Tags":
        """Return these tags with some more and some less, and with another comment unless it is None.

        Raises:
            ConfigError: a tag or the comment is not allowed.
        """
        tags = sorted({*self.tags, *add} - {*remove})
        return checked(Tags, {"tags": tags, "comment": self.comment if comment is None else comment})


_TAGS = TypeAdapter(Tags)


def parse_tags(location: str, content: bytes) -> Tags:
    """Return the tags that JSON holds. `location` names the file in errors.

    Raises:
        ConfigError: the content is not that of tags.
    """
    return parse_report(_TAGS, location, content, "the tags of a run")


def read_tags(store: Store) -> Tags:
    """Return the tags of the run in a store; none if nobody has attached any.

    Raises:
        ConfigError: the file of the tags was damaged.
        StoreError: the store does not answer.
    """
    try:
        return parse_tags(f"{store.location}/{TAGS}", store.read(TAGS, MAX_BYTES))
    except KeyMissing:
        return Tags()


def write_tags(store: Store, tags: Tags) -> None:
    """Replace the tags of the run in a store.

    Raises:
        StoreError: the store does not accept them.
    """
    store.write(TAGS, (json.dumps(asdict(tags), indent=1) + "\n").encode())
