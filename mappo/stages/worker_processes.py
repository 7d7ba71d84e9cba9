"""The further worker processes of a study or a matrix on this machine."""

import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mappo.reporting.terminal import say


@contextmanager
def worker_processes(
    stage: str, command: Sequence[str], number: int, directory: Path, *, good: Collection[int], ending: str
) -> Iterator[None]:
    """Start workers, each a process of `mappo COMMAND` with its own log; wait for them when the block ends.

    A worker whose exit status is not `good` is a warning, which says that it `ending`: the others have done its
    work when the block ends. If the block raises, the workers are terminated.
    """
    if number:
        directory.mkdir(parents=True, exist_ok=True)
    logs = [directory / f"worker-{index + 2}.log" for index in range(number)]
    with ExitStack() as files:
        processes = [
            subprocess.Popen([sys.executable, "-m", "mappo", *command], stdout=file, stderr=subprocess.STDOUT)
            for file in (files.enter_context(log.open("a")) for log in logs)
        ]
        for log in logs:
            say(stage, f"another worker logs to {log}")
        try:
            yield
        except BaseException:
            for process in processes:
                process.terminate()
            raise
        finally:
            statuses = [process.wait() for process in processes]
    failed = [str(log) for log, status in zip(logs, statuses, strict=True) if status not in good]
    if failed:
        say(stage, f"warning: a worker {ending}, see {', '.join(failed)}")
