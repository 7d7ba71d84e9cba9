"""The test servers: one answers like the API server of Kubeflow Pipelines 2.17, one like that of Kubernetes.

Both servers hold their state in memory. Nothing runs by itself: a test decides when a run continues. The checks of
requests are in `kubeflow_rules`, Argo is in `argo`. The servers also play the gateway, which refuses users, and
the network, which fails. The recorded answers of a real server are in `data/kubeflow`; `test_recordings` compares
them with the answers of this server.
"""

import email
import email.policy
import functools
import json
import re
import secrets
import socket
import threading
import time
import uuid
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

import yaml

from tests.support.argo import MAX_BYTES, STOCK, Workflow, compact
from tests.support.kubeflow_driver import Produce, nothing_produced
from tests.support.kubeflow_rules import (
    HTTP,
    Listing,
    Refused,
    as_struct,
    check_cron,
    check_length,
    check_parameters,
    exists,
    internal,
    invalid,
    not_found,
    read_model,
    read_pipeline,
    read_source,
    rfc3339,
)

FINAL = {"SUCCEEDED", "FAILED", "SKIPPED", "CANCELED"}
NEVER = rfc3339(0)  # the finished_at of a run that has not finished
Answer = tuple[int, str, bytes, dict[str, str]]  # status, content type, body, further headers


class FaultyServer:
    """A server on its own port that can be stopped and restarted, with faults on demand."""

    def __init__(self):
        self.port = 0
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []  # method, path, query, body
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self._faults: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen on a free port, or after `stop` on the same port as before."""
        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), functools.partial(_Handler, self))
        self._http.daemon_threads = True
        self._http.handle_error = lambda *_: None
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        """Close all connections and refuse new ones; keep the state."""
        if self._thread.is_alive():
            self._http.shutdown()
            self._thread.join()
            self._http.server_close()
            for connection in list(self.connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def fail(
        self,
        status: int,
        times: int = 1,
        method: str | None = None,
        path: str | None = None,
        body: str | bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        """Answer the next matching requests with this status, and do not carry the requests out.

        A request matches if it has this method, and `path` in its path; None matches all.
        """
        text = body.encode() if isinstance(body, str) else body
        answer = (
            (status, "text/html", text, headers or {}) if text is not None else _failure(status, headers or {})
        )
        self._fault(times, method, path, answer=answer)

    def delay(self, seconds: float, times: int = 1, method: str | None = None, path: str | None = None) -> None:
        """Delay the answers to the next matching requests."""
        self._fault(times, method, path, seconds=seconds)

    def drop(
        self, times: int = 1, method: str | None = None, path: str | None = None, after: bool = False
    ) -> None:
        """Close the connection of the next matching requests without an answer.

        after: carry the request out before the connection is closed.
        """
        self._fault(times, method, path, drop="after" if after else "before")

    def count(self, method: str, path: str = "") -> int:
        """Count the requests with this method and `path` in their path."""
        return sum(method == request[0] and path in request[1] for request in self.requests)

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, headers: Any) -> Answer:
        raise NotImplementedError

    def _fault(self, times: int, method: str | None, path: str | None, **effect: Any) -> None:
        self._faults.append({"times": times, "method": method, "path": path or "", **effect})

    def next_fault(self, method: str, path: str) -> dict[str, Any]:
        with self.lock:
            for fault in self._faults:
                if fault["times"] > 0 and fault["method"] in (None, method) and fault["path"] in path:
                    fault["times"] -= 1
                    return fault
        return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, owner: FaultyServer, *arguments: Any):
        self.owner = owner
        super().__init__(*arguments)

    def setup(self) -> None:
        super().setup()
        self.owner.connections.add(self.connection)

    def finish(self) -> None:
        self.owner.connections.discard(self.connection)
        super().finish()

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        address = urlsplit(self.path)
        path, query = unquote(address.path), dict(parse_qsl(address.query, keep_blank_values=True))
        with self.owner.lock:
            self.owner.requests.append((self.command, path, query, body))
        fault = self.owner.next_fault(self.command, path)
        time.sleep(fault.get("seconds", 0))
        if fault.get("drop") == "before":
            return self._close()
        answer = fault.get("answer")
        if not answer:
            with self.owner.lock:
                answer = self.owner.answer(self.command, path, query, body, self.headers)
        return self._close() if fault.get("drop") else self._send(*answer)

    do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = _serve  # noqa: N815

    def _send(self, status: int, kind: str, content: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _close(self) -> None:
        self.close_connection = True

    def log_message(self, format, *args):
        pass


class KubeflowServer(FaultyServer):
    """The API server, with Argo and the persistence agent behind it.

    template_defaults: the retry strategy that the workflow controller gives to every template: `STOCK`,
    `BEFORE_2_17` or `ALWAYS` of `argo`. v1beta1: whether the server has that version of the API. pipeline_root:
    the default root in kfp-launcher's config map. terminated_state: the final state of a terminated run. produce:
    a function that returns the outputs of stages, which later stages read. max_bytes: the size beyond which Argo
    compresses a workflow's nodes; Argo fails a workflow that is still larger then.
    """

    def __init__(
        self,
        multi_user: bool = False,
        namespaces: set[str] | None = None,
        tokens: set[str] | None = None,
        login_page: bool = False,
        terminated_state: str = "FAILED",
        template_defaults: dict[str, str] | None = STOCK,
        v1beta1: bool = True,
        pipeline_root: str = "",
        produce: Produce = nothing_produced,
        max_bytes: int = MAX_BYTES,
    ):
        super().__init__()
        self.prefix = ""  # the path under which the Kubernetes API forwards requests to this server
        self.multi_user, self.namespaces = multi_user, namespaces or {"team"}
        self.tokens, self.cookies, self.login_page = tokens, set[str](), login_page
        self.terminated_state, self.template_defaults, self.v1beta1 = terminated_state, template_defaults, v1beta1
        self.pipeline_root, self.produce, self.max_bytes = pipeline_root, produce, max_bytes
        self.experiments: dict[str, dict[str, Any]] = {}
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.recurring_runs: dict[str, dict[str, Any]] = {}
        self.logs: dict[str, str] = {}  # by the name of the pod
        self.workflows: dict[str, Workflow] = {}  # by the ID of the run
        self._persisted: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}  # manifest, task details
        self._deleted_pods: set[str] = set()  # their names
        self._scheduled: dict[str, str] = {}  # names of Kubernetes' ScheduledWorkflow objects, by recurring run
        self._indices: dict[str, int] = {}  # the number of the newest run of each recurring run
        if not multi_user:
            description = "All runs created without specifying an experiment will be grouped here."
            self._add_experiment({"display_name": "Default", "description": description})

    # --- actions of a test on the runs ---

    def advance(self, run_id: str) -> str:
        """Start all stages that can start, or finish the stage that runs longest; return the run's state."""
        with self.lock:
            run = self.runs[run_id]
            if run["state"] == "CANCELING":
                self._end_terminated(run_id)
            elif run["state"] not in FINAL:
                self._report(run_id, self.workflows[run_id].advance())
            return str(run["state"])

    def finish(self, run_id: str) -> str:
        """Advance the run to its end; return its state."""
        while self.advance(run_id) not in FINAL:
            pass
        return str(self.runs[run_id]["state"])

    def reach(self, run_id: str, stage: str) -> str:
        """Advance the run until this stage (in a loop `train[1]`) runs; return the name of its pod."""
        with self.lock:
            flow = self.workflows[run_id]
            pod = flow.pod_name(flow.reach(stage))
            self._report(run_id, "RUNNING")
            return pod

    def reach_driver(self, run_id: str, stage: str) -> str:
        """Advance the run until the driver of this stage is pending; return the name of the driver's pod."""
        with self.lock:
            flow = self.workflows[run_id]
            pod = flow.pod_name(flow.reach_driver(stage))
            self._report(run_id, "RUNNING")
            return pod

    def fail_stage(
        self,
        run_id: str,
        stage: str,
        message: str = "failed",
        attempts: int = 1,
        exit_code: int = 1,
        reason: str = "Error",
    ) -> str:
        """Fail a stage's container in consecutive attempts; return the run's state.

        message: appended to the log of each attempt, as on a real server. attempts: number of failed attempts.
        reason: Error, OOMKilled or DeadlineExceeded. Argo decides whether the stage is retried.
        """
        with self.lock:
            flow = self.workflows[run_id]
            for _ in range(attempts):
                self.write_log(run_id, stage, message + "\n")
                flow.fail(flow.reach(stage), exit_code, reason)
                self._report(run_id, flow.settle())
            return str(self.runs[run_id]["state"])

    def fail_driver(self, run_id: str, stage: str, message: str = "failed") -> str:
        """Fail a stage's driver with this message in its log; return the run's state."""
        with self.lock:
            flow = self.workflows[run_id]
            pod = flow.reach_driver(stage)
            self.logs[flow.pod_name(pod)] = message + "\n"
            flow.fail(pod)
            self._report(run_id, flow.settle())
            return str(self.runs[run_id]["state"])

    def delete_pod(self, run_id: str, stage: str) -> str:
        """Delete the pod of a stage; return the pod's name. The next attempt, if any, waits for its backoff."""
        with self.lock:
            flow = self.workflows[run_id]
            pod = flow.find(stage)
            name = flow.pod_name(pod)
            if flow.delete(pod):
                self._deleted_pods.add(name)
            self._report(run_id, flow.state)
            return name

    def wait_stage(self, run_id: str, stage: str, message: str = "") -> str:
        """Make a stage's pod wait with this message of Argo; return the name of the pod."""
        with self.lock:
            flow = self.workflows[run_id]
            pod = flow.find(stage)
            flow.wait(pod, message)
            self._report(run_id, "RUNNING")
            return flow.pod_name(pod)

    def retry_stage(self, run_id: str, stage: str, message: str = "failed") -> str:
        """End an attempt in a way that Argo retries, and start the next attempt; return the name of its pod."""
        with self.lock:
            self.write_log(run_id, stage, message + "\n")
            flow = self.workflows[run_id]
            if flow.retries_lost_pods:
                self.delete_pod(run_id, stage)
            else:
                flow.fail(flow.reach(stage))
            return self.reach(run_id, stage)

    def write_log(self, run_id: str, stage: str, text: str) -> str:
        """Append text to the log of a stage that runs; return the name of its pod."""
        with self.lock:
            pod = self.reach(run_id, stage)
            self.logs[pod] = self.logs.get(pod, "") + text
            return pod

    def remove_workflow(self, run_id: str) -> None:
        """Remove the workflow and its pods from Kubernetes, which Kubeflow does an hour after the end."""
        with self.lock:
            flow = self.workflows[run_id]
            self._deleted_pods |= {flow.pod_name(node) for node in flow.nodes.values()}

    def executor_input_of(self, run_id: str, stage: str) -> dict[str, Any]:
        """Return the executor input that a stage's newest driver wrote: inputs, and the URI of each output."""
        with self.lock:
            return self.workflows[run_id].executor_input(stage)

    def set_state(self, run_id: str, state: str) -> None:
        """Set the state of the run, and stop its workflow if the run ends."""
        with self.lock:
            if state in ("FAILED", "CANCELED"):
                self.workflows[run_id].stop()
            self._report(run_id, state)

    def fire(self, recurring_run_id: str, at: float | None = None) -> str | None:
        """Start a run of a schedule; return its ID, or None if the schedule is disabled or at its limit of runs.

        The controller of schedules creates the workflow itself and replaces nothing in the parameters.
        """
        with self.lock:
            job = self.recurring_runs[recurring_run_id]
            active = [
                run
                for run in self.runs.values()
                if run.get("recurring_run_id") == recurring_run_id and run["state"] not in FINAL
            ]
            if job["status"] != "ENABLED" or len(active) >= int(job["max_concurrency"]):
                return None
            at = time.time() if at is None else at
            self._indices[recurring_run_id] = index = self._indices.get(recurring_run_id, 0) + 1
            name = f"{self._scheduled[recurring_run_id]}-{index}-{secrets.randbits(32)}"
            keep = ("pipeline_spec", "pipeline_version_reference", "runtime_config", "experiment_id")
            run = {key: json.loads(json.dumps(job[key])) for key in keep if key in job}
            run |= {"run_id": str(uuid.uuid4()), "recurring_run_id": recurring_run_id, "display_name": name}
            self._add_run(run, scheduled=at, account=job["service_account"])
            return str(run["run_id"])

    # --- requests ---

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, headers: Any) -> Answer:
        """Answer a request below `prefix`: apply the gateway, then call the route."""
        if not path.startswith(self.prefix):
            return _json(404, {"kind": "Status", "status": "Failure", "code": 404})
        path = path.removeprefix(self.prefix)
        if refusal := self._gateway(path, headers):
            return refusal
        routes = ((re.fullmatch(pattern, path), name) for verb, pattern, name in _ROUTES if verb == method)
        match, name = next(((match, name) for match, name in routes if match), (None, ""))
        if not match or (name == "get_run_v1" and not self.v1beta1):
            return _json(404, {"code": 5, "message": "Not Found", "details": []})
        handler = getattr(self, f"_{name}")
        try:
            if name in ("upload", "upload_version"):
                return self._uploaded(handler, query, body, headers)
            if name == "log":
                return self._log(*match.groups())
            content = _body(body) if method == "POST" and body else {}
            return _json(200, handler(*match.groups(), **({"query": query} if "list" in name else {}), **content))
        except Refused as refused:
            status = {
                "@type": "type.googleapis.com/google.rpc.Status",
                "code": refused.code,
                "message": refused.external,
            }
            return _json(HTTP[refused.code], {"code": refused.code, "message": str(refused), "details": [status]})

    def _gateway(self, path: str, headers: Any) -> Answer | None:
        if path.startswith("/dex/"):
            return 200, "text/html; charset=utf-8", b"<!DOCTYPE html><html><title>dex</title>Log in</html>", {}
        if self.tokens is None:
            return None
        session = re.search(r"authservice_session=([^;]+)", headers.get("Cookie", ""))
        bearer = headers.get("Authorization", "").removeprefix("Bearer ")
        if bearer in self.tokens or (session and session[1] in self.cookies):
            return None
        if self.login_page:
            return (
                302,
                "text/html; charset=utf-8",
                b"",
                {"Location": "/dex/auth?client_id=kubeflow-oidc-authservice"},
            )
        cause = (
            "Request header error: there is no user identity header."  # the code is recorded, the words are not
        )
        return _json(401, {"code": 16, "message": f"Unauthenticated: {cause}: {cause}", "details": []})

    def _healthz(self) -> dict:
        return {"tag_name": "2.17.0", "multi_user": self.multi_user, "pipeline_store": "database"}

    def _allow(self, namespace: str, verb: str, resource: str, kind: str) -> None:
        """Refuse what a SubjectAccessReview refuses, if Kubeflow has several users."""
        if not self.multi_user:
            return
        if not namespace:
            raise invalid(f"{kind} cannot have an empty namespace in multi-user mode")
        if namespace not in self.namespaces:
            group = "Group:pipelines.kubeflow.org,Version:v1beta1"
            request = f"&ResourceAttributes{{Namespace:{namespace},Verb:{verb},{group},Resource:{resource},}}"
            text = f"User 'user@example.com' is not authorized with reason:  (request: {request})"
            raise Refused(7, f"PermissionDenied: {text}: unauthorized access", text).within(
                "Failed to authorize with API"
            )

    def _get(self, items: dict[str, dict], kind: str, key: str, action: str) -> dict[str, Any]:
        try:
            if key not in items:
                raise not_found(kind, key)
            if items is not self.pipelines and items is not self.versions:
                resource = {"Experiment": "experiments", "Run": "runs", "Job": "jobs"}[kind]
                self._allow(self._namespace(items[key]), "get", resource, kind)
        except Refused as refused:
            raise refused.within(f"Failed to {action}") from None
        return items[key]

    def _namespace(self, item: dict) -> str:
        experiment = self.experiments.get(item.get("experiment_id", ""), {})
        return str(item.get("namespace") or experiment.get("namespace", ""))

    # --- experiments ---

    def _create_experiment(self, **fields: Any) -> dict:
        experiment = read_model(fields, "V2beta1Experiment")
        if not experiment.get("display_name"):
            raise invalid("Experiment's name cannot be empty").within("Failed to create an experiment")
        namespace = experiment.get("namespace", "") if self.multi_user else ""
        self._allow(namespace, "create", "experiments", "An experiment")
        same = [e for e in self.experiments.values() if e["display_name"] == experiment["display_name"]]
        if any(e.get("namespace", "") == namespace for e in same):
            text = f"The name {experiment['display_name']} already exists. Please specify a new name"
            raise exists(f"Failed to create a new experiment. {text}").within("Failed to create an experiment")
        return self._add_experiment({**experiment, "namespace": namespace})

    def _add_experiment(self, experiment: dict) -> dict:
        added = {
            **{
                key: experiment[key] for key in ("display_name", "description", "namespace") if experiment.get(key)
            },
            "experiment_id": str(uuid.uuid4()),
            "created_at": rfc3339(time.time()),
            "storage_state": "AVAILABLE",
            "last_run_created_at": rfc3339(0),
        }
        self.experiments[added["experiment_id"]] = added
        return added

    def _list_experiments(self, query: dict[str, str]) -> dict:
        namespace = query.get("namespace", "") if self.multi_user else ""
        self._allow(namespace, "list", "experiments", "An experiment")
        return _EXPERIMENTS.page(
            [e for e in self.experiments.values() if e.get("namespace", "") == namespace], query
        )

    def _get_experiment(self, key: str) -> dict:
        return self._get(self.experiments, "Experiment", key, "get an experiment")

    def _archive_experiment(self, key: str, action: str) -> dict:
        """Archive or unarchive an experiment; archiving archives its runs and disables its schedules too."""
        self._get(self.experiments, "Experiment", key, f"{action} an experiment")
        self.experiments[key]["storage_state"] = "ARCHIVED" if action == "archive" else "AVAILABLE"
        if action == "archive":
            for run in self.runs.values():
                run["storage_state"] = "ARCHIVED" if run["experiment_id"] == key else run["storage_state"]
            for job in self.recurring_runs.values():
                if job["experiment_id"] == key:
                    job.update(status="DISABLED", mode="DISABLE")
        return {}

    def _delete_experiment(self, key: str) -> dict:
        self._get(self.experiments, "Experiment", key, "delete an experiment")
        del self.experiments[key]
        return {}

    # --- pipelines ---

    def _uploaded(self, handler: Any, query: dict[str, str], body: bytes, headers: Any) -> Answer:
        """Answer an upload of a pipeline or version; these routes are not gRPC and have errors of their own."""
        context = {"_upload": "Failed to create a pipeline and a pipeline version"}.get(handler.__name__)
        context = context or "Failed to create a pipeline version"
        try:
            name, content = _form_file(headers, body)
            spec = as_struct(read_source(content))
            return _json(200, handler(spec, query.get("name") or query.get("display_name") or name, query))
        except Refused as refused:
            message = refused.external if refused.code == 3 else context
            status = {3: 400, 6: 409, 7: 400}.get(refused.code, 400 if refused.code == 5 else 500)
            return _json(status, {"error_message": message, "error_details": message})

    def _upload(self, spec: dict, name: str, query: dict[str, str]) -> dict:
        pipeline = self._add_pipeline(name, query)
        self._add_version(pipeline["pipeline_id"], spec, name, query)
        return pipeline

    def _add_pipeline(self, name: str, query: dict[str, str]) -> dict:
        namespace = query.get("namespace", "") if self.multi_user else ""
        if namespace:
            self._allow(namespace, "create", "pipelines", "A pipeline")
        if any((p["name"], p.get("namespace", "")) == (name, namespace) for p in self.pipelines.values()):
            raise exists(
                f"Failed to create a new pipeline. The name {name} already exists. Please specify a new name"
            )
        if len(name) > 128:
            raise invalid(f"Pipeline.Name length cannot exceed 128, got {len(name)}")
        pipeline = {
            "pipeline_id": str(uuid.uuid4()),
            "name": name,
            "display_name": query.get("display_name") or name,
            "description": query.get("description"),
            "created_at": rfc3339(time.time()),
            "namespace": namespace,
        }
        self.pipelines[pipeline["pipeline_id"]] = pipeline = {
            key: value for key, value in pipeline.items() if value
        }
        return pipeline

    def _create_pipeline(self, **fields: Any) -> dict:
        """Create a pipeline that has no version yet."""
        pipeline = read_model(fields, "V2beta1Pipeline")
        query = {key: pipeline[key] for key in ("display_name", "description", "namespace") if pipeline.get(key)}
        name = pipeline.get("name") or pipeline.get("display_name")
        if not name:
            raise invalid("pipeline's name cannot be empty").within("Failed to create a pipeline")
        return self._add_pipeline(name, query)

    def _upload_version(self, spec: dict, name: str, query: dict[str, str]) -> dict:
        pipeline_id = query.get("pipelineid", "")
        if pipeline_id not in self.pipelines:
            raise not_found("Pipeline", pipeline_id)
        return self._add_version(pipeline_id, spec, name, query)

    def _add_version(self, pipeline_id: str, spec: dict, name: str, query: dict[str, str]) -> dict:
        if any((v["pipeline_id"], v["name"]) == (pipeline_id, name) for v in self.versions.values()):
            raise exists(
                f"Failed to create a new pipeline version. The name {name} already exists. Specify a new name"
            )
        version = {
            "pipeline_id": pipeline_id,
            "pipeline_version_id": str(uuid.uuid4()),
            "name": name,
            "display_name": query.get("display_name") or name,
            "description": query.get("description"),
            "created_at": rfc3339(time.time()),
            "pipeline_spec": spec,
        }
        self.versions[version["pipeline_version_id"]] = {key: value for key, value in version.items() if value}
        return self.versions[version["pipeline_version_id"]]

    def _list_pipelines(self, query: dict[str, str]) -> dict:
        namespace = query.get("namespace", "") if self.multi_user else ""
        if namespace:
            self._allow(namespace, "list", "pipelines", "A pipeline")
        return _PIPELINES.page([p for p in self.pipelines.values() if p.get("namespace", "") == namespace], query)

    def _get_pipeline(self, key: str) -> dict:
        return self._get(self.pipelines, "Pipeline", key, "get a pipeline")

    def _pipeline_by_name(self, name: str) -> dict:
        named = [pipeline for pipeline in self.pipelines.values() if pipeline["name"] == name]
        return (
            named[0]
            if named
            else self._get(self.pipelines, "Pipeline", name, "get a pipeline by name and namespace")
        )

    def _delete_pipeline(self, key: str) -> dict:
        """Delete a pipeline; refuse while it has versions, unless the client asks to cascade."""
        self._get(self.pipelines, "Pipeline", key, "delete a pipeline")
        versions = [version for version in self.versions.values() if version["pipeline_id"] == key]
        if versions and self.requests[-1][2].get("cascade") != "true":
            example = versions[-1]["pipeline_version_id"]
            raise invalid(
                f"Failed to delete pipeline with id {key} as it has existing pipeline versions (e.g. {example}). "
                "Set cascade=true to delete all versions"
            ).within("Failed to delete a pipeline")
        for version in versions:
            del self.versions[version["pipeline_version_id"]]
        del self.pipelines[key]
        return {}

    def _list_versions(self, key: str, query: dict[str, str]) -> dict:
        self._get(self.pipelines, "Pipeline", key, "list pipeline versions")
        return _VERSIONS.page([v for v in self.versions.values() if v["pipeline_id"] == key], query)

    def _get_version(self, _: str, key: str) -> dict:
        return self._get(self.versions, "PipelineVersion", key, "get a pipeline version")

    def _delete_version(self, _: str, key: str) -> dict:
        self._get(self.versions, "PipelineVersion", key, "delete a pipeline version")
        del self.versions[key]
        return {}

    def _source(self, item: dict, action: str) -> dict[str, Any]:
        """Return the pipeline of a run or schedule; answer every mistake in it with an internal error."""
        reference = item.get("pipeline_version_reference", {})
        key = reference.get("pipeline_version_id", "")
        try:
            if not key and reference.get("pipeline_id"):
                versions = [v for v in self.versions.values() if v["pipeline_id"] == reference["pipeline_id"]]
                if not versions:
                    raise not_found("PipelineVersion", "latest")
                key = versions[-1]["pipeline_version_id"]
                item["pipeline_version_reference"] = {**reference, "pipeline_version_id": key}
            if key:
                if key not in self.versions:
                    raise not_found("PipelineVersion", key)
                if reference.get("pipeline_id") not in (None, self.versions[key]["pipeline_id"]):
                    owner = self.versions[key]["pipeline_id"]
                    raise invalid(
                        f"Pipeline version {key} belongs to pipeline {owner} (not {reference['pipeline_id']})"
                    )
                return self.versions[key]["pipeline_spec"]
            if not item.get("pipeline_spec"):
                raise invalid("Failed to fetch a template with an empty pipeline spec manifest")
            read_pipeline(json.dumps(item["pipeline_spec"]))
            item["pipeline_spec"] = as_struct(item["pipeline_spec"])
            return item["pipeline_spec"]
        except Refused as refused:
            raise internal(action, refused) from None

    def _prepare(self, item: dict, resource: str, kind: str) -> None:
        """Check and complete the fields that runs and schedules share: a name, short parameters, an experiment."""
        if not item.get("display_name"):
            name = {"run": "Run name", "recurring run": "Recurring run's name"}[resource]
            detail = "run detail" if resource == "run" else resource
            context = f"Failed to convert a API {detail} to its internal representation"
            raise internal(context, invalid(f"{name} cannot be empty"))
        check_length(item.get("runtime_config", {}).get("parameters", {}))
        if not item.get("experiment_id"):
            if self.multi_user:
                raise invalid(f"{kind} cannot have an empty namespace in multi-user mode")
            item["experiment_id"] = next(iter(self.experiments))
        self._get(self.experiments, "Experiment", item["experiment_id"], f"create a {resource}")
        item["service_account"] = item.get("service_account") or (
            "default-editor" if self.multi_user else "pipeline-runner"
        )

    # --- runs ---

    def _create_run(self, **fields: Any) -> dict:
        run = read_model(fields, "V2beta1Run")
        if run.get("plugins_output"):
            text = "plugins_output is server-owned and populated exclusively via plugin lifecycle hooks"
            raise Refused(10, f"BadRequestError: {text}: plugins_output must not be set by the client", text)
        keep = ("display_name", "description", "experiment_id", "pipeline_spec", "pipeline_version_reference")
        keep += ("runtime_config", "service_account", "recurring_run_id", "run_id")
        try:
            return self._add_run({key: run[key] for key in keep if run.get(key)})
        except Refused as refused:
            raise refused.within("Failed to create a new run") from None

    def _add_run(self, run: dict, scheduled: float | None = None, account: str = "") -> dict:
        """Add a run. A run `scheduled` at some time starts at once, with its parameters unchanged."""
        self._prepare(run, "run", "A run")
        account = account or run["service_account"]
        spec = self._source(run, "Failed to create a run due to error fetching manifest")
        parameters = run.get("runtime_config", {}).get("parameters", {})
        try:
            pipeline = spec.get("pipeline_spec", spec)
            check_parameters(pipeline, parameters)
        except Refused as refused:
            raise refused.within("Failed to generate the ExecutionSpec", "invalid pipeline job inputs") from None
        run_id, now = run.get("run_id") or str(uuid.uuid4()), rfc3339(time.time())
        run = {"run_id": run_id, "created_at": now, "scheduled_at": now, "finished_at": NEVER, **run}
        self.runs[run_id] = {**run, "storage_state": "AVAILABLE", "state_history": []}
        name, labels = f"{pipeline['pipelineInfo']['name']}-{secrets.token_hex(3)[:5]}", {}
        if scheduled is None:
            parameters = _expanded(parameters, run_id)
        else:
            self.runs[run_id]["scheduled_at"] = rfc3339(scheduled)
            del self.runs[run_id]["service_account"]
            name, labels = run["display_name"], self._schedule_labels(run, scheduled)
        self.workflows[run_id] = Workflow(
            name,
            run_id,
            spec,
            parameters,
            template_defaults=self.template_defaults,
            display=run["display_name"],
            namespace=self._namespace(run) or "kubeflow",
            service_account=account,
            labels=labels,
            scheduled=scheduled,
            root=run.get("runtime_config", {}).get("pipeline_root", "") or self.pipeline_root,
            produce=self.produce,
            max_bytes=self.max_bytes,
        )
        self.experiments[run["experiment_id"]]["last_run_created_at"] = now
        self._report(run_id, "PENDING" if scheduled is None else self.workflows[run_id].settle())
        return self._show(run_id)

    def _schedule_labels(self, run: dict, scheduled: float) -> dict[str, str]:
        job = run["recurring_run_id"]
        labels = {
            "isOwnedByScheduledWorkflow": "true",
            "scheduledWorkflowName": self._scheduled[job],
            "workflowEpoch": str(int(scheduled)),
            "workflowIndex": str(self._indices[job]),
        }
        return {f"scheduledworkflows.kubeflow.org/{name}": value for name, value in labels.items()}

    def _report(self, run_id: str, state: str) -> None:
        """Update the run from its current workflow, as the persistence agent does from time to time."""
        run, flow = self.runs[run_id], self.workflows[run_id]
        if flow.nodes and self._persist(run_id):
            state = flow.state
        if run.get("state") != state:
            run["state"] = state
            run["state_history"].append({"update_time": rfc3339(time.time()), "state": state})
        run["finished_at"] = rfc3339(time.time()) if state in FINAL else NEVER

    def _persist(self, run_id: str) -> bool:
        """Store the manifest and the task details; the task details no longer change once nodes are compressed.

        Return whether the workflow has failed because it is too large for Kubernetes.
        """
        flow = self.workflows[run_id]
        manifest, (last, details) = flow.manifest(), self._persisted.get(run_id, ({}, []))
        flow.check_size(manifest)
        if flow.too_large:
            status = last.get("status", {"nodes": {}}) | {"phase": flow.phase, "message": flow.message}
            manifest = {**manifest, "status": status}
        is_readable = "nodes" in manifest["status"]
        self._persisted[run_id] = manifest, flow.details() if is_readable else details
        return flow.too_large

    def _show(self, run_id: str) -> dict:
        details = self._persisted.get(run_id, ({}, []))[1]
        return {**self.runs[run_id], **({"run_details": {"task_details": details}} if details else {})}

    def _end_terminated(self, run_id: str) -> None:
        self.workflows[run_id].stop()
        self._report(run_id, self.terminated_state)

    def _list_runs(self, query: dict[str, str]) -> dict:
        runs = self._owned(self.runs, query, "runs", "A run")
        return _RUNS.page([self._show(run["run_id"]) for run in runs], query)

    def _owned(self, items: dict[str, dict], query: dict[str, str], resource: str, kind: str) -> list[dict]:
        """Return the items of the experiment or the namespace that a list asks for."""
        if experiment := query.get("experiment_id"):
            self._get(self.experiments, "Experiment", experiment, f"list {resource}")
            return [item for item in items.values() if item["experiment_id"] == experiment]
        namespace = query.get("namespace", "") if self.multi_user else ""
        try:
            self._allow(namespace, "list", resource, kind)
        except Refused as refused:
            raise refused.within(f"Failed to list {resource}") from None
        return [item for item in items.values() if self._namespace(item) == namespace]

    def _get_run(self, key: str) -> dict:
        """Return a run; a run that is being terminated has ended after the first such answer."""
        self._get(self.runs, "Run", key, f"get a run: Failed to fetch run {key}")
        answer = self._show(key)
        if answer["state"] == "CANCELING":
            self._end_terminated(key)
        return answer

    def _get_run_v1(self, key: str) -> dict:
        """Return a run as v1beta1 does, with the whole workflow that the persistence agent stored last."""
        run = self._get(self.runs, "Run", key, f"get a run: Failed to fetch run {key}")
        flow = self.workflows[key]
        manifest = {"pipeline_manifest": yaml.safe_dump_all(_documents(flow.source))}
        if parameters := run.get("runtime_config", {}).get("parameters"):
            manifest["runtime_config"] = {"parameters": parameters}
        owner = {"type": "EXPERIMENT", "id": run["experiment_id"]}
        answer = {
            "id": key,
            "name": run["display_name"],
            "pipeline_spec": manifest,
            "resource_references": [{"key": owner, "relationship": "OWNER"}],
            **{name: run[name] for name in ("service_account", "created_at", "scheduled_at") if name in run},
            "finished_at": run["finished_at"],
            "status": {"CANCELING": "Terminating"}.get(run["state"], flow.phase),
        }
        runtime = {"pipeline_manifest": compact(flow.manifest(with_status=False))}
        if key in self._persisted:
            runtime["workflow_manifest"] = compact(self._persisted[key][0])
        return {"run": {name: value for name, value in answer.items() if value}, "pipeline_runtime": runtime}

    def _terminate_run(self, key: str) -> dict:
        run = self._get(self.runs, "Run", key, f"terminate a run: Failed to terminate run {key}")
        if run["state"] not in ("PENDING", "RUNNING", "PAUSED"):
            text = f"Failed to terminate a run {key}. Row not found"
            raise invalid(text).within("Failed to terminate a run", f"Failed to terminate run {key}")
        self._report(key, "CANCELING")
        return {}

    def _retry_run(self, key: str) -> dict:
        run = self._get(self.runs, "Run", key, f"retry a run: Failed to retry run {key}")
        context = ("Failed to retry a run", f"Failed to retry run {key}")
        if not self.workflows[key].nodes:
            text = f"{context[1]} due to error fetching workflow manifest"
            cause = "Invalid input error: Workflow manifest cannot be empty"
            raise Refused(10, f"BadRequestError: {text}: {cause}", text).within(context[0])
        if run["state"] not in ("FAILED", "CANCELED"):
            text = "Workflow must be Failed/Error to retry"
            raise Refused(10, f"BadRequestError: {text}: workflow cannot be retried", text).within(*context)
        self.workflows[key].retry()
        self._report(key, "RUNNING")
        return {}

    def _archive_run(self, key: str, action: str) -> dict:
        run = self._get(self.runs, "Run", key, f"{action} a run")
        if action == "unarchive" and self.experiments[run["experiment_id"]]["storage_state"] == "ARCHIVED":
            text = f"Failed to unarchive run {key} as experiment {run['experiment_id']} must be un-archived first"
            raise Refused(9, text)
        run["storage_state"] = "ARCHIVED" if action == "archive" else "AVAILABLE"
        return {}

    def _delete_run(self, key: str) -> dict:
        self._get(self.runs, "Run", key, "delete a run")
        del self.runs[key], self.workflows[key]
        self._persisted.pop(key, None)
        return {}

    def _log(self, run_id: str, key: str) -> Answer:
        """Return the log of a pod by the pod's name; return an archived log by the pod's name or the node's ID.

        Errors have the same form as those of uploads.
        """
        failed = f"BadRequestError: Failed to read logs for run {run_id}"
        if run_id not in self.runs:
            message = f"{failed} due to run fetching error: ResourceNotFoundError: Run {run_id} not found"
            return _json(500, {"error_message": message, "error_details": message})
        flow = self.workflows[run_id]
        pods = [node for node in flow.nodes.values() if node["type"] == "Pod"]
        pod = next((node for node in pods if key in (node["id"], flow.pod_name(node))), None)
        name = flow.pod_name(pod) if pod else key
        is_present = pod and key == name and name not in self._deleted_pods
        if pod and (pod["finishedAt"] or (is_present and pod["phase"] == "Running")):
            return 200, "text/plain", self.logs.get(name, "").encode(), {"Cache-Control": "no-cache, private"}
        cause = f'pods "{key}" not found'
        if is_present:
            cause = f'container "main" in pod "{key}" is waiting to start: PodInitializing'
        reading = f"InternalServerError: Failed to read logs from pod {key} due to error opening log stream"
        message = f"{failed}: {reading}: {cause}"
        return _json(500, {"error_message": message, "error_details": message})

    # --- recurring runs ---

    def _create_recurring_run(self, **fields: Any) -> dict:
        job = read_model(fields, "V2beta1RecurringRun")
        try:
            self._prepare(job, "recurring run", "A recurring run")
            self._check_schedule(job)
            spec = self._source(job, "Failed to create a recurring run with an invalid pipeline spec manifest")
            try:
                parameters = job.get("runtime_config", {}).get("parameters", {})
                check_parameters(spec.get("pipeline_spec", spec), parameters)
            except Refused as refused:
                context = "Failed to create a recurring run during scheduled workflow creation"
                raise refused.within(context, "invalid pipeline job inputs") from None
        except Refused as refused:
            raise refused.within("Failed to create a recurring run") from None
        enabled = job.get("mode") in ("ENABLE", 1)
        now = rfc3339(time.time())
        job |= {"recurring_run_id": str(uuid.uuid4()), "created_at": now, "updated_at": now}
        job |= {"max_concurrency": str(job["max_concurrency"]), "namespace": self._namespace(job) or "kubeflow"}
        job |= {"status": "ENABLED", "mode": "ENABLE"} if enabled else {"status": "DISABLED", "mode": "DISABLE"}
        if periodic := job["trigger"].get("periodic_schedule"):
            periodic["interval_second"] = str(periodic["interval_second"])
        if not any(job.get("runtime_config", {}).values()):
            job.pop("runtime_config", None)
        stem = re.sub(r"[^a-z0-9-]", "", job["display_name"].lower())[:25]
        self._scheduled[job["recurring_run_id"]] = stem + secrets.token_hex(3)[:5]
        self.recurring_runs[job["recurring_run_id"]] = {key: value for key, value in job.items() if value}
        return self.recurring_runs[job["recurring_run_id"]]

    def _check_schedule(self, job: dict) -> None:
        limit = int(job.get("max_concurrency", 0))
        if not 1 <= limit <= 10:
            raise invalid(f"Max concurrency of a recurring run must be at leas 1 and at most 10. Received {limit}")
        trigger = job.get("trigger", {})
        if not trigger:
            raise invalid("Recurring run's trigger cannot be empty")
        if "cron_schedule" in trigger:
            check_cron(trigger["cron_schedule"].get("cron", ""))
        elif (seconds := int(trigger["periodic_schedule"].get("interval_second", 0))) < 1:
            raise invalid(f"Found invalid period schedule interval {seconds}. Set at interval to least 1 second")

    def _list_recurring_runs(self, query: dict[str, str]) -> dict:
        if not self.multi_user and not query.get("experiment_id"):
            return _RECURRING.page(list(self.recurring_runs.values()), query)
        return _RECURRING.page(self._owned(self.recurring_runs, query, "jobs", "A recurring run"), query)

    def _get_recurring_run(self, key: str) -> dict:
        return self._get(self.recurring_runs, "Job", key, "get a recurring run")

    def _switch_recurring_run(self, key: str, action: str) -> dict:
        job = self._get(self.recurring_runs, "Job", key, f"{action} a recurring run")
        job.update(mode=action.upper(), status=f"{action.upper()}D", updated_at=rfc3339(time.time()))
        return {}

    def _delete_recurring_run(self, key: str) -> dict:
        """Delete a schedule; unless the client asks to orphan its workflows, Kubernetes ends the running ones.

        Source: kubeflow/pipelines #12573 and #12574; not recorded.
        """
        self._get(self.recurring_runs, "Job", key, "delete a recurring run")
        if self.requests[-1][2].get("propagation_policy") != "ORPHAN":
            for run_id, run in self.runs.items():
                if run.get("recurring_run_id") == key and run["state"] not in FINAL:
                    self.set_state(run_id, "FAILED")
        del self.recurring_runs[key]
        return {}


class KubernetesServer(FaultyServer):
    """A Kubernetes API with objects by their paths, such as /api/v1/namespaces/team/secrets/s3.

    tokens: the bearer tokens that may read; None allows everybody.
    """

    def __init__(self, tokens: set[str] | None = None, namespaces: set[str] | None = None):
        super().__init__()
        self.tokens = tokens
        self.objects: dict[str, dict[str, Any]] = {}
        self.forbidden: list[str] = []  # the user may not read paths that contain one of these
        for namespace in namespaces or {"team"}:
            self.add(f"/api/v1/namespaces/{namespace}")

    def add(self, path: str, labels: dict[str, str] | None = None, **content: Any) -> None:
        """Add an object; the path determines its kind."""
        name = path.rpartition("/")[2]
        self.objects[path] = {"metadata": {"name": name, "labels": labels or {}}, **content}

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, headers: Any) -> Answer:
        bearer = headers.get("Authorization", "").removeprefix("Bearer ")
        if self.tokens is not None and bearer not in self.tokens and path != "/version":
            return self._status(401, "Unauthorized", "Unauthorized")
        kind = re.sub(r"^/api/v1/(namespaces/[^/]+/)?", "", path).partition("/")[0]
        if any(part in path for part in self.forbidden):
            verb = "get" if path in self.objects else "list"
            return self._status(
                403,
                "Forbidden",
                f'{kind} is forbidden: User "user@example.com" cannot {verb} resource "{kind}" in API group ""',
            )
        if path == "/version":
            return _json(200, {"major": "1", "minor": "33", "gitVersion": "v1.33.1", "platform": "linux/amd64"})
        if path in self.objects:
            return _json(200, {"apiVersion": "v1", "kind": kind, **self.objects[path]})
        if path.rpartition("/")[2] in ("pods", "nodes", "secrets", "configmaps", "serviceaccounts", "namespaces"):
            return _json(
                200, {"apiVersion": "v1", "kind": "List", "metadata": {}, "items": self._items(path, query)}
            )
        return self._status(404, "NotFound", f'{kind} "{path.rpartition("/")[2]}" not found')

    def _items(self, path: str, query: dict[str, str]) -> list[dict]:
        wanted = [term.partition("=") for term in query.get("labelSelector", "").split(",") if term]
        items = [item for key, item in self.objects.items() if key.rpartition("/")[0] == path]
        return [
            item
            for item in items
            if all(
                key in item["metadata"]["labels"]
                and (not equals or item["metadata"]["labels"][key] == value.lstrip("="))
                for key, equals, value in wanted
            )
        ]

    @staticmethod
    def _status(code: int, reason: str, message: str) -> Answer:
        status = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        return _json(code, {**status, "message": message, "reason": reason, "code": code})


_V2 = "/apis/v2beta1"
_ID = r"([^/:]+)"
_ROUTES = [
    ("GET", rf"{_V2}/healthz", "healthz"),
    ("POST", rf"{_V2}/experiments", "create_experiment"),
    ("GET", rf"{_V2}/experiments", "list_experiments"),
    ("GET", rf"{_V2}/experiments/{_ID}", "get_experiment"),
    ("POST", rf"{_V2}/experiments/{_ID}:(archive|unarchive)", "archive_experiment"),
    ("DELETE", rf"{_V2}/experiments/{_ID}", "delete_experiment"),
    ("POST", rf"{_V2}/pipelines", "create_pipeline"),
    ("POST", rf"{_V2}/pipelines/upload", "upload"),
    ("POST", rf"{_V2}/pipelines/upload_version", "upload_version"),
    ("GET", rf"{_V2}/pipelines", "list_pipelines"),
    ("GET", rf"{_V2}/pipelines/names/{_ID}", "pipeline_by_name"),
    ("GET", rf"{_V2}/pipelines/{_ID}", "get_pipeline"),
    ("DELETE", rf"{_V2}/pipelines/{_ID}", "delete_pipeline"),
    ("GET", rf"{_V2}/pipelines/{_ID}/versions", "list_versions"),
    ("GET", rf"{_V2}/pipelines/{_ID}/versions/{_ID}", "get_version"),
    ("DELETE", rf"{_V2}/pipelines/{_ID}/versions/{_ID}", "delete_version"),
    ("POST", rf"{_V2}/runs", "create_run"),
    ("GET", rf"{_V2}/runs", "list_runs"),
    ("GET", rf"{_V2}/runs/{_ID}", "get_run"),
    ("GET", rf"/apis/v1beta1/runs/{_ID}", "get_run_v1"),
    ("POST", rf"{_V2}/runs/{_ID}:terminate", "terminate_run"),
    ("POST", rf"{_V2}/runs/{_ID}:retry", "retry_run"),
    ("POST", rf"{_V2}/runs/{_ID}:(archive|unarchive)", "archive_run"),
    ("DELETE", rf"{_V2}/runs/{_ID}", "delete_run"),
    ("POST", rf"{_V2}/recurringruns", "create_recurring_run"),
    ("GET", rf"{_V2}/recurringruns", "list_recurring_runs"),
    ("GET", rf"{_V2}/recurringruns/{_ID}", "get_recurring_run"),
    ("POST", rf"{_V2}/recurringruns/{_ID}:(enable|disable)", "switch_recurring_run"),
    ("DELETE", rf"{_V2}/recurringruns/{_ID}", "delete_recurring_run"),
    ("GET", rf"/apis/v1alpha1/runs/{_ID}/nodes/{_ID}/log", "log"),
]
_COMMON = ("display_name", "created_at", "description", "namespace")
_EXPERIMENTS = Listing("experiments", "experiment_id", *_COMMON, "storage_state", "last_run_created_at")
_PIPELINES = Listing("pipelines", "pipeline_id", *_COMMON)
_VERSIONS = Listing("pipeline_versions", "pipeline_version_id", *_COMMON)
_RUNS = Listing(
    "runs",
    "run_id",
    *_COMMON,
    "state",
    "storage_state",
    "experiment_id",
    "scheduled_at",
    "finished_at",
    "recurring_run_id",
)
_RECURRING = Listing("recurringRuns", "recurring_run_id", *_COMMON, "status", "experiment_id", "updated_at")


def _body(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body)
    except ValueError as error:
        raise Refused(3, f"proto: syntax error (line 1:1): {error}") from None
    if not isinstance(content, dict):
        raise Refused(3, f"proto: syntax error (line 1:1): unexpected token {body[:20].decode(errors='replace')}")
    return content


def _expanded(parameters: dict[str, Any], run_id: str) -> dict[str, Any]:
    """Return the parameters of a run that is not scheduled, with the placeholders that the server replaces."""
    replacements = {"[[RunUUID]]": run_id, "[[CurrentTime]]": time.strftime("%Y%m%d%H%M%S", time.gmtime())}

    def expand(value: str) -> str:
        return re.sub(r"\[\[\w+\]\]", lambda match: replacements.get(match[0], match[0]), value)

    return {name: expand(value) if isinstance(value, str) else value for name, value in parameters.items()}


def _documents(source: dict[str, Any]) -> list[dict[str, Any]]:
    return [source[key] for key in ("pipeline_spec", "platform_spec") if key in source] or [source]


def _form_file(headers: Any, body: bytes) -> tuple[str, str]:
    """Return the name and content of the file in a form's part `uploadfile`."""
    head = f"Content-Type: {headers.get('Content-Type', '')}\r\n\r\n".encode()
    form = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    for part in form.iter_parts() if form.is_multipart() else ():
        if part.get_param("name", header="content-disposition") == "uploadfile":
            name = part.get_filename() or ""
            if not name.endswith((".yaml", ".yml")):
                raise invalid("Unexpected pipeline file format. Support .zip, .tar.gz, .json or YAML")
            return name, part.get_payload(decode=True).decode()
    raise invalid("Failed to read pipeline from file")


def _failure(status: int, headers: dict[str, str]) -> Answer:
    """Return an error in the form in which the server itself reports it."""
    code = {429: 8, 409: 10, 502: 14, 503: 14, 504: 4, 401: 16, 403: 7, 404: 5, 400: 3}.get(status, 13)
    answer = _json(status, {"code": code, "message": f"the test wants {status}", "details": []})
    return *answer[:3], headers


def _json(status: int, content: Any) -> Answer:
    return status, "application/json", json.dumps(content).encode(), {}
