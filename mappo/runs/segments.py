"""The earlier rows of a history, in files that many checkpoints share.

A checkpoint holds the last rows of the history itself: at most `SEGMENT_ROWS`. The rows before them are in
segments, files of `SEGMENT_ROWS` rows each, which never change. An index lists segments, and earlier indexes;
a manifest names one index. So a save writes the same number of bytes however long the run is. The index is
written only after a new segment; after a restart, a new index lists the index of the attempt before.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as strict_dataclass

from mappo.errors import CheckpointError

SEGMENT_ROWS = 1000
_MAX_FILE_BYTES = 1 << 26

Read = Callable[[str, int, str], bytes]
"""A function that returns the verified bytes of a key; its other arguments: the largest size, the SHA-256."""


@strict_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class SharedFile:
    """A file with rows of a history (.csv), or an index of such files (.json). `num_rows` counts all its rows."""

    key: Annotated[str, Field(pattern=r"^blobs/[0-9]{4,9}-[0-9a-f]{8}/[0-9a-f]{64}\.(csv|json)$")]
    size_bytes: Annotated[int, Field(ge=1, le=_MAX_FILE_BYTES)]
    num_rows: Annotated[int, Field(ge=1)]

    @property
    def is_index(self) -> bool:
        """Return whether this file lists other files."""
        return self.key.endswith(".json")

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file, in hexadecimal, which is its name."""
        return self.key.rpartition("/")[2].partition(".")[0]


_INDEX = TypeAdapter(list[SharedFile])


@dataclass(eq=False)
class Segment:
    """The rows of a segment of a running training. The saver drops the text once the file is saved."""

    text: str
    num_rows: int
    saved: SharedFile | None = None

    def mark_saved(self, file: SharedFile) -> None:
        """Keep the name of the file that holds the rows, and drop their text."""
        self.saved, self.text = file, ""


def index_bytes(files: list[SharedFile]) -> bytes:
    """Return an index as JSON."""
    return _INDEX.dump_json(files)


def walk(
    index: SharedFile | None, read: Read, on_damage: Callable[[CheckpointError], None]
) -> Iterator[SharedFile]:
    """Yield an index, and then all files below it, the oldest rows first.

    An index that cannot be read is passed to `on_damage`, and the walk continues without the files below it.
    """
    waiting = [index] if index else []
    while waiting:
        file = waiting.pop()
        yield file
        if not file.is_index:
            continue
        try:
            waiting += reversed(_files_of(file, read))
        except CheckpointError as error:
            on_damage(error)


def read_rows(index: SharedFile | None, read: Read, on_damage: Callable[[CheckpointError], None]) -> Iterator[str]:
    """Yield the earlier rows of a history as CSV without a header, segment by segment, the oldest first.

    Files that cannot be read are left out; each is passed to `on_damage`.
    """
    for file in walk(index, read, on_damage):
        if file.is_index:
            continue
        try:
            yield _rows_of(file, read)
        except CheckpointError as error:
            on_damage(error)


def _files_of(index: SharedFile, read: Read) -> list[SharedFile]:
    try:
        files = _INDEX.validate_json(read(index.key, index.size_bytes, index.sha256))
    except ValidationError:
        raise CheckpointError(f"{index.key}: not an index of the history") from None
    if (
        sum(file.num_rows for file in files) != index.num_rows
    ):  # so that no index has more files below it than rows
        raise CheckpointError(f"{index.key}: the index does not have {index.num_rows} rows")
    return files


def _rows_of(file: SharedFile, read: Read) -> str:
    content = read(file.key, file.size_bytes, file.sha256)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = ""
    if text.count("\n") != file.num_rows or not text.endswith("\n"):
        raise CheckpointError(f"{file.key}: the file does not have {file.num_rows} rows")
    return text
