"""The metrics of pipeline runs on a test server, for tests of dashboards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zoneinfo import ZoneInfo

from pipelines.compiling import read_compiled
from pipelines.kubeflow.api import Api
from pipelines.kubeflow.client import submit
from pipelines.kubeflow.connection import Connection
from pipelines.kubeflow.cron import Cron
from pipelines.kubeflow.schedules import Schedule, apply_schedule
from pipelines.kubeflow.submission import Submission
from pipelines.run_metrics import RunMetrics
from tests.support.kubeflow_server import KubeflowServer

_GOLDEN = Path(__file__).parents[1] / "golden" / "training.yaml"


@contextmanager
def exported_runs() -> Iterator[tuple[RunMetrics, Callable[[], None]]]:
    """Poll a test server that has a schedule; the context is the metrics, and a function that lets runs happen.

    The function polls after one run has succeeded, one has failed, and one waits.
    """
    submission = Submission(read_compiled(_GOLDEN))
    with KubeflowServer() as server:
        kubeflow = Api(Connection(endpoint=server.url))
        run_metrics = RunMetrics(ZoneInfo("UTC"))
        apply_schedule(kubeflow, Schedule("nightly", Cron.parse("@daily")), submission)
        run_metrics.poll(kubeflow, 60)

        def happen() -> None:
            succeeded, failed, waiting = (submit(kubeflow, submission).run_id for _ in range(3))
            server.finish(succeeded)
            server.fail_stage(failed, "train", reason="OOMKilled")
            server.reach(waiting, "train")
            run_metrics.poll(kubeflow, 60)

        yield run_metrics, happen
