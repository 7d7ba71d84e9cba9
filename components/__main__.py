"""Run one component in its pod: `python -m components STAGE` starts the stage's process, and retries if it fails.

Every stage of a compiled pipeline has this command, so that the YAML does not hold the components' source.
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

from mappo.compute.standard_streams import dropped_output
from mappo.reporting.terminal import say
from mappo.runs.supervisor import Ledger, RetryPolicy, supervise


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage under the supervisor; return the exit status."""
    with dropped_output():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m components", description=__doc__)
    parser.add_argument("stage", help="name of the component and of its file, such as train")
    parser.add_argument("--retries", type=int, default=0, help="maximum number of retries (default: 0)")
    parser.add_argument("--backoff-seconds", type=float, default=30.0, help="time before a retry (default: 30)")
    parser.add_argument("--backoff-factor", type=float, default=2.0, help="growth of that time (default: 2)")
    parser.add_argument("--executor_input", required=True, help="inputs and outputs as JSON, from Kubeflow")
    arguments = parser.parse_args(argv)
    announce = partial(say, arguments.stage)
    location, key = ledger_location(json.loads(arguments.executor_input))
    ledger = Ledger(location, key, os.environ, announce)
    policy = RetryPolicy(arguments.retries, arguments.backoff_seconds, arguments.backoff_factor)
    command = [sys.executable, "-m", "components.executor", *("--function_to_execute", arguments.stage)]
    command += ["--component_module_path", str(Path(__file__).with_name(f"{arguments.stage}.py"))]
    command += ["--executor_input", arguments.executor_input]
    return supervise(arguments.stage, command, policy, ledger, announce)


def ledger_location(executor_input: Mapping[str, Any]) -> tuple[str, str]:
    """Return location and key of the ledger, in which a stage counts its attempts.

    Output artifacts are at ROOT/PIPELINE/RUN/STAGE/EXECUTION/NAME. The ledger is one level above the execution,
    since a retry of a whole pipeline has other executions. The key contains a hash of the inputs, which differ
    between the iterations of a loop.
    """
    artifacts = executor_input["outputs"]["artifacts"]
    uri = next(output["artifacts"][0]["uri"] for output in artifacts.values()).partition("?")[0]
    location = "/".join(uri.rstrip("/").split("/")[:-2])
    inputs = executor_input.get("inputs", {}).get("parameterValues", {})
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:12]
    return location, f"attempts-{digest}.json"


if __name__ == "__main__":
    sys.exit(main())
