"""Run one attempt of a stage: start Kubeflow's executor, and report a failure to the supervisor."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from components import IN_POD

os.environ[IN_POD] = "true"  # must be set before kfp is imported

from kfp.dsl.executor_main import executor_main

from mappo.compute.standard_streams import dropped_output
from mappo.errors import StageFailed
from mappo.runs.supervisor import FINAL_STATUS, REASON_VARIABLE
from mappo.stages.readable_errors import readable_errors


def main() -> int:
    """Run the component that the arguments name; return the exit status."""
    stage = sys.argv[sys.argv.index("--function_to_execute") + 1]
    try:
        with dropped_output(), readable_errors(stage):
            executor_main()
    except StageFailed as error:
        _report_reason(str(error.__cause__ or error))
        return FINAL_STATUS if error.is_final else 1
    except Exception as error:
        _report_reason(f"{type(error).__name__}: {error}")
        raise
    return 0


def _report_reason(reason: str) -> None:
    if path := os.environ.get(REASON_VARIABLE):
        with suppress(OSError):  # on a full disk, the supervisor reports the exit status alone
            Path(path).write_text(reason)


if __name__ == "__main__":
    sys.exit(main())
