"""The exit handler of a pipeline, which sends a message when a run ends. Only a site with a webhook has it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from kfp import dsl, kubernetes

from components.notify import notify
from mappo.reporting.webhook import FORMAT_VARIABLE, KUBEFLOW_URL_VARIABLE, URL_VARIABLE
from pipelines.site import Site

STAGE = "notify"
SECRET_KEYS = {"url": URL_VARIABLE, "format": FORMAT_VARIABLE}  # of the secret of the webhook; format is optional


def notify_task(site: Site, pipeline: str, arguments: Mapping[str, Any], scheduled_at: str) -> dsl.PipelineTask:
    """Create the task of the message. Only its pod gets the webhook's secret."""
    names = {
        "tuning": {"run": arguments.get("study"), "edition": arguments.get("edition")},
        "matrix": {"run": arguments.get("matrix")},
    }
    name = names.get(pipeline) or {"run": arguments["run"]}
    task = notify(pipeline=pipeline, scheduled_at=scheduled_at, **name)
    assert site.notify_secret is not None  # a site without it has no such task
    # Optional: without the secret, the stage prints a warning. Else its pod, and so the run, would wait for ever.
    kubernetes.use_secret_as_env(task, site.notify_secret, SECRET_KEYS, optional=True)
    if site.kubeflow_url:
        task.set_env_variable(KUBEFLOW_URL_VARIABLE, site.kubeflow_url)
    return task


def exit_handler(task: dsl.PipelineTask) -> AbstractContextManager[Any]:
    """Run a task when the tasks in the block have ended, whether they failed or not."""
    handler: AbstractContextManager[Any] = dsl.ExitHandler(exit_task=task)
    return handler
