"""Run commands in this process, each with outputs that cannot be written; print their exit statuses as JSON.

The argument is a JSON list of (kind of output, program, arguments). Start this file as a program of its own, since
it replaces the descriptors of its process.
"""

import importlib
import json
import os
import sys


def lost_output(kind: str) -> int:
    """Open an output that cannot be written: a full device, a pipe without a reader, a file that is only read."""
    if kind == "full":
        return os.open("/dev/full", os.O_WRONLY)
    if kind == "read-only":
        return os.open(os.devnull, os.O_RDONLY)
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def main() -> None:
    """Run all commands; only their error streams are those of this process."""
    statuses, original = [], os.dup(1)
    for kind, program, arguments in json.loads(sys.argv[1]):
        command = importlib.import_module(f"{program}.__main__").main
        os.dup2(lost_output(kind), 1)
        statuses.append(command(arguments))
    os.dup2(original, 1)
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
