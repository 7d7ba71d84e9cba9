"""Run one component in its pod: `python -m components STAGE` starts the stage's process, again if it ends badly.

The command of every compiled pipeline is this one, so that no source of a component travels with each step.
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mappo.runs.supervisor import Ledger, RetryPolicy, supervise


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise one stage; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m components", description=__doc__)
    parser.add_argument("stage", help="the component's file and function, such as train")
    parser.add_argument("--retries", type=int, default=0, help="how often it is tried again (default: 0)")
    parser.add_argument("--backoff-seconds", type=float, default=30.0, help="wait before a retry (default: 30)")
    parser.add_argument("--backoff-factor", type=float, default=2.0, help="growth of that wait (default: 2)")
    parser.add_argument("--executor_input", required=True, help="inputs and outputs as JSON, from Kubeflow")
    arguments = parser.parse_args(argv)
    given = json.loads(arguments.executor_input)
    announce = partial(_say, arguments.stage)
    location, key = ledger_place(given)
    ledger = Ledger(location, key, os.environ, announce)
    policy = RetryPolicy(arguments.retries, arguments.backoff_seconds, arguments.backoff_factor)
    command = [sys.executable, "-m", "components.executor", *("--function_to_execute", arguments.stage)]
    command += ["--component_module_path", str(Path(__file__).with_name(f"{arguments.stage}.py"))]
    return supervise(
        arguments.stage, [*command, "--executor_input", arguments.executor_input], policy, ledger, announce
    )


def ledger_place(executor_input: Mapping[str, Any]) -> tuple[str, str]:
    """Return where a stage counts its attempts: a location, and a key below it.

    Output artifacts are at ROOT/PIPELINE/RUN/STAGE/EXECUTION/NAME. The count is one level above the execution,
    since a retry of a whole pipeline has other executions. Its name comes from the inputs, which tell the items of
    a loop apart.
    """
    artifacts = executor_input["outputs"]["artifacts"]
    uri = next(each["artifacts"][0]["uri"] for each in artifacts.values()).partition("?")[0]
    location = "/".join(uri.rstrip("/").split("/")[:-2])
    inputs = executor_input.get("inputs", {}).get("parameterValues", {})
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    return location, f"attempts-{digest}.json"


def _say(stage: str, message: str) -> None:
    print(f"[{stage}] {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
