"""The controller of Argo Workflows, as far as a pipeline needs it: it makes nodes from templates and retries them.

The code follows argoproj/argo-workflows workflow/controller/{operator,dag,workflowpod}.go of 4.0. Nothing runs by
itself: a test decides when and how a pod ends. Drivers do their work at once unless a test holds them. Messages
are those that were recorded. A comment marks messages that were not recorded but follow Argo's sources.
"""

import base64
import gzip
import json
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from tests.support.argo_templates import CONTAINER, CONTAINER_DRIVER, DAG_DRIVER, Names, Templates
from tests.support.kubeflow_driver import Driver, Produce, nothing_produced
from tests.support.kubeflow_rules import UNFINISHED, platform_of, rfc3339

# The retry strategies that the workflow controller's config map gives to every template: that of Kubeflow 2.17,
# that of earlier versions, and one that retries every failure.
STOCK: dict[str, str] | None = {"limit": "2", "retryPolicy": "OnError"}
BEFORE_2_17: dict[str, str] | None = None
ALWAYS: dict[str, str] | None = {"limit": "0", "retryPolicy": "Always"}

MAX_BYTES = 1024 * 1024  # maximum size of a workflow as JSON
_GZIP_LEVEL = 4  # Go's library packs less tightly than zlib; this level comes nearest to the recorded size
_RETRIED = {"OnError": {"Error"}, "OnFailure": {"Failed"}, "Always": {"Error", "Failed"}}
_FULFILLED = {"Succeeded", "Failed", "Error", "Skipped", "Omitted"}
_STATES = {
    "Pending": "PENDING",
    "Running": "RUNNING",
    "Succeeded": "SUCCEEDED",
    "Failed": "FAILED",
    "Error": "FAILED",
    "Skipped": "SKIPPED",
}
_REFERENCE = re.compile(
    r"\{\{(?:inputs\.parameters\.(?P<input>[\w-]+)|workflow\.parameters\.(?P<workflow>[\w-]+)"
    r"|tasks\.(?P<task>[\w-]+)\.outputs\.parameters\.(?P<output>[\w-]+)|(?P<item>item))\}\}"
)
_FIELDS = (  # the fields of a node, in the order in which Argo writes them
    *("id", "name", "displayName", "type", "templateName", "templateScope", "phase", "boundaryID", "message"),
    *("startedAt", "finishedAt", "progress", "resourcesDuration", "nodeFlag", "inputs", "outputs", "children"),
    *("outboundNodes", "hostNodeName", "taskResultSynced"),
)
_DEADLINE = "Step exceeded its deadline"

Node = dict[str, Any]


class Workflow:
    """A workflow: its nodes by ID, in Argo's own form."""

    def __init__(
        self,
        name: str,
        run_id: str,
        source: dict[str, Any],
        parameters: dict[str, Any],
        *,
        template_defaults: dict[str, str] | None = STOCK,
        display: str = "",
        namespace: str = "kubeflow",
        service_account: str = "pipeline-runner",
        labels: Mapping[str, str] | None = None,
        scheduled: float | None = None,
        root: str = "",
        produce: Produce = nothing_produced,
        max_bytes: int = MAX_BYTES,
    ):
        pipeline = source.get("pipeline_spec", source)
        self.name, self.run_id, self.source = name, run_id, source
        self.namespace, self.account = namespace, service_account
        self.defaults, self.display, self.created = template_defaults, display or name, int(time.time())
        self.labels = {"pipeline/runid": run_id, **(labels or {})}
        defined = pipeline["root"].get("inputDefinitions", {}).get("parameters", {})
        values = {key: item["defaultValue"] for key, item in defined.items() if "defaultValue" in item}
        title = pipeline["pipelineInfo"]["name"]
        executors = platform_of(source).get("executors", {})
        names = Names(run_id, title, self.display)
        templates = Templates(names, pipeline, executors, values | parameters)
        self.templates, self.parameters = templates.by_name, templates.parameters
        self.driver = Driver(run_id, title, root, self._placeholders(scheduled), produce)
        self.nodes: dict[str, Node] = {}
        self.phase, self.message = "", ""
        self.finished = UNFINISHED
        self.max_bytes, self.too_large = max_bytes, False
        self._uid = str(uuid.uuid4())
        self._deadline: int | None = None  # the deadline of the whole workflow; cancelling sets it into the past
        self._is_retried = False
        self._held_step = ""  # the step whose driver stays pending
        self._passed_backoffs: set[tuple[str, int]] = set()  # by the ID of the retry and the number of attempts
        self._tasks: dict[str, str] = {}  # task IDs of v2beta1 by node

    def _placeholders(self, scheduled: float | None) -> dict[str, str]:
        times = {"create": self.created, "schedule": self.created if scheduled is None else scheduled}
        return {
            "{{$.pipeline_job_uuid}}": self.run_id,
            "{{$.pipeline_job_name}}": self.display,
            "{{$.pipeline_job_resource_name}}": self.name,
            **{f"{{{{$.pipeline_job_{kind}_time_utc}}}}": rfc3339(moment) for kind, moment in times.items()},
        }

    # --- actions of a test ---

    def advance(self) -> str:
        """Start all pods that can start, or finish the pod that runs longest; return the workflow's state."""
        running = next(self.pods(), None) if self.nodes else None
        if running:
            self.succeed(running)
        return self.settle()

    def settle(self) -> str:
        """Let the controller work and backoffs pass until nothing changes; return the workflow's state."""
        self.operate()
        while self._pass_backoffs():
            self.operate()
        return self.state

    @property
    def retries_lost_pods(self) -> bool:
        """Return whether the policy retries a deleted pod."""
        return "Error" in _RETRIED[(self.defaults or {}).get("retryPolicy", "OnFailure")]

    @property
    def state(self) -> str:
        return _STATES.get(self.phase, "PENDING")

    def find(self, step: str) -> Node:
        """Advance the workflow until a stage has a pod, and return that pod. Pods of earlier stages succeed."""
        self.settle()
        while not (wanted := next((pod for pod in self.pods() if _is(pod, step)), None)):
            if self.phase in _FULFILLED:
                raise ValueError(f"no stage {step} left to run in {self.name}")
            self.advance()
        return wanted

    def reach(self, step: str) -> Node:
        """Advance the workflow until a stage runs; return the stage's pod."""
        pod = self.find(step)
        self._start(pod)
        return pod

    def reach_driver(self, step: str) -> Node:
        """Advance the workflow until the driver of a task is pending; return the driver's pod."""
        self._held_step = step
        self.settle()
        while not (wanted := next((pod for pod in self._drivers() if self._holds(pod)), None)):
            if self.phase in _FULFILLED:
                raise ValueError(f"no driver of {step} left to run in {self.name}")
            self.advance()
        self._held_step = ""
        return wanted

    def succeed(self, pod: Node) -> None:
        self._start(pod)
        self._end(pod, "Succeeded")
        pod["outputs"] = {**pod.get("outputs", {}), "artifacts": [self._log_artifact(pod)], "exitCode": "0"}

    def fail(self, pod: Node, exit_code: int = 1, reason: str = "Error") -> None:
        """Fail a pod's container. A pod that exceeds its deadline gets the kubelet's message."""
        self._start(pod)
        message = f"main: {reason} (exit code {exit_code})"
        if reason == "DeadlineExceeded":  # not recorded: the kubelet's message
            message = "Pod was active on the node longer than the specified deadline"
        self._end(pod, "Failed", message)
        pod["outputs"] = {"artifacts": [self._log_artifact(pod)], "exitCode": str(exit_code)}
        self.operate()

    def delete(self, pod: Node) -> bool:
        """Delete a pod; return whether the attempt is lost. A pending pod is recreated under its name instead."""
        is_lost = pod["phase"] == "Running"
        if is_lost:
            self._end(pod, "Error", "pod deleted")
            pod["outputs"] = {"artifacts": [self._log_artifact(pod)]}
            self.operate()
        return is_lost

    def wait(self, pod: Node, message: str) -> None:
        """Make a pod wait with this message: for a node, for its image, or gated by a queue (no message)."""
        pod["phase"] = "Pending"
        pod.pop("hostNodeName", None)
        pod.pop("message", None)
        if message:
            pod["message"] = message
        if message.startswith(("ImagePullBackOff", "ErrImagePull")):  # a node pulls the image
            pod["hostNodeName"] = "node1"

    def stop(self) -> None:
        """End all pods at once, as activeDeadlineSeconds 0 does."""
        if not self.nodes:
            self.reach_driver("root")
        self._deadline = self._started()
        for pod in [node for node in self.nodes.values() if node["type"] == "Pod" and not _fulfilled(node)]:
            self._end(pod, "Failed", _DEADLINE)
        self.operate()

    def retry(self) -> None:
        """Retry the whole workflow as Kubeflow does: keep successful nodes, and run failed DAGs again."""
        kept = {}
        for identity, node in self.nodes.items():
            if node["phase"] in ("Failed", "Error") and node["type"] == "DAG":
                node |= {"phase": "Running", "finishedAt": None}
                node.pop("outboundNodes", None)
            elif node["phase"] not in ("Succeeded", "Skipped"):
                continue
            kept[identity] = node
        for node in kept.values():
            node["children"] = [child for child in node["children"] if child in kept]
        self.nodes, self._passed_backoffs, self._is_retried = kept, set(), True
        self.phase, self.message, self.finished, self._deadline = "Running", "", UNFINISHED, None
        self.operate()

    # --- queries of a test or the server ---

    def pods(self) -> Iterator[Node]:
        """Return the pods of stages that wait or run, oldest first."""
        return (node for node in self.nodes.values() if _is_stage_pod(node) and not _fulfilled(node))

    def pod_name(self, node: Node) -> str:
        return f"{self.name}-{node['templateName']}-{node['id'].rpartition('-')[2]}"

    def executor_input(self, step: str) -> dict[str, Any]:
        """Return the executor input that a stage's newest driver wrote."""
        for node in reversed(self.nodes.values()):
            outputs = _values(node.get("outputs", {}))
            if node["type"] == "Pod" and "pod-spec-patch" in outputs and _is(node, step, "-driver"):
                command = json.loads(outputs["pod-spec-patch"])["containers"][0]["command"]
                return json.loads(command[command.index("--executor_input") + 1])
        raise ValueError(f"no driver of a stage {step} has run in {self.name}")

    def details(self) -> list[dict[str, Any]]:
        """Return the nodes as v2beta1 lists them: without names, messages and pods, sorted by random IDs."""
        return sorted((self._detail(node) for node in self.nodes.values()), key=lambda task: task["task_id"])

    def _detail(self, node: Node) -> dict[str, Any]:
        task = {
            "run_id": self.run_id,
            "task_id": self._tasks.setdefault(node["id"], str(uuid.uuid4())),
            "display_name": node["displayName"],
            "create_time": rfc3339(self.created),
            "start_time": node["startedAt"],
            "end_time": node["finishedAt"] or rfc3339(UNFINISHED),
            "state": _STATES.get(node["phase"]),
            "child_tasks": [{"pod_name": child} for child in node["children"]],
        }
        return {key: value for key, value in task.items() if value}

    def manifest(self, with_status: bool = True) -> dict[str, Any]:
        """Return the workflow as JSON values, with compressed nodes if it is larger than `max_bytes`."""
        workflow: dict[str, Any] = {"metadata": self._metadata(), "spec": self._spec(), "status": {}}
        if not with_status:
            return workflow
        below = self._pods_below()
        succeeded = sum(below[pod["id"]] for pod in self._all_pods() if pod["phase"] == "Succeeded")
        nodes = {
            identity: self._written(node, below[identity], succeeded)
            for identity, node in sorted(self.nodes.items())
        }
        workflow["status"] = self._status() | {"nodes": nodes}
        if len(compact(workflow)) > self.max_bytes:
            del workflow["status"]["nodes"]
            packed = gzip.compress(compact(nodes).encode(), _GZIP_LEVEL, mtime=0)
            workflow["status"]["compressedNodes"] = base64.b64encode(packed).decode()
        return workflow

    def check_size(self, manifest: Mapping[str, Any]) -> None:
        """Fail the workflow if it is too large even when compressed, with the message of Argo's sources."""
        size = len(compact(manifest))
        if size > self.max_bytes and not self.too_large:
            self.too_large = True
            large = (
                f"workflow is longer than maximum allowed size. compressed size {size} > maxSize {self.max_bytes}"
            )
            error = f"{large}Tried to offload but encountered error: offload node status is not supported"
            self._finish("Error", error)

    # --- the controller ---

    def operate(self) -> None:
        """Let the controller process all nodes until nothing changes; drivers that are not held do their work."""
        while self.phase not in _FULFILLED:
            if not self.nodes:
                self.phase = "Running"
            top = self._template(self.name, "entrypoint", None, "")
            ready = [node for node in self._drivers() if not self._holds(node)]
            for node in ready:
                self._drive(node)
            if _fulfilled(top):
                self._finish(top["phase"], top.get("message", ""))
            elif not ready:
                return

    def _finish(self, phase: str, message: str) -> None:
        self.phase, self.message, self.finished = phase, message, int(time.time())

    def _template(self, name: str, key: str, scope: Any, boundary: str) -> Node:
        """Run a template under this name, inside a retry if the template has a retry strategy.

        key: name of the template. scope: the calling DAG's node, task and inputs, and the item of a loop; None for
        the entrypoint. boundary: ID of the DAG's node.
        """
        template, node = self.templates[key], self._named(name)
        if node and _fulfilled(node):
            return node
        inputs = node["inputs"] if node else self._inputs(template, scope)
        strategy = self._strategy(template, inputs)
        if strategy is None:
            return self._attempt(name, template, inputs, boundary)
        parent = node or self._add(name, "Retry", template, inputs, boundary)
        while self._continues(parent, strategy):
            last = self._last(parent)
            attempt = last["name"] if last and not _fulfilled(last) else f"{name}({len(parent['children'])})"
            child = self._attempt(attempt, template, inputs, boundary, parent)
            if not _fulfilled(child):
                break
        return parent

    def _attempt(self, name: str, template: Any, inputs: Any, boundary: str, parent: Node | None = None) -> Node:
        """Run a template's DAG or pod once, as an attempt of a retry or by itself."""
        node = self._named(name)
        kind = "DAG" if "dag" in template else "Pod"
        if not node:
            node = self._add(name, kind, template, inputs, boundary, {"retried": True} if parent else None)
            if kind == "Pod":
                self._create(node)
        if parent:
            _link(parent, node)
        if kind == "DAG":
            self._dag(node, template, inputs)
        return node

    def _create(self, pod: Node) -> None:
        """Create a pod: a driver's pod waits until the driver does its work, a stage's pod runs at once."""
        pod["phase"] = "Pending"
        if self._deadline is not None:
            self._end(pod, "Failed", _DEADLINE)
        elif _is_stage_pod(pod):
            self._start(pod)

    def _strategy(self, template: Any, inputs: Any) -> dict[str, Any] | None:
        """Return a template's retry strategy merged over the defaults, or None; Argo's own policy is OnFailure."""
        declared = template.get("retryStrategy")
        if declared is None and self.defaults is None:
            return None
        text = json.dumps({"retryPolicy": "OnFailure", **(self.defaults or {}), **(declared or {})})
        values = _values(inputs)
        merged: dict[str, Any] = json.loads(_REFERENCE.sub(lambda match: values[match["input"]], text))
        return merged

    def _continues(self, parent: Node, strategy: Any) -> bool:
        """Return whether a retry has an attempt to continue or to start; end the retry if it has none.

        The last attempt decides.
        """
        last = self._last(parent)
        if last is None or not _fulfilled(last):
            return True
        if last["phase"] not in ("Failed", "Error"):
            parent["outputs"] = last.get("outputs", {})
            self._end(parent, "Succeeded")
        elif self._deadline is not None:
            moment = time.strftime("%Y-%m-%d %H:%M:%S +0000 UTC", time.gmtime(self._deadline))
            self._end(parent, last["phase"], f"retry exceeded workflow deadline {moment}")
        elif self._backs_off(parent, strategy):
            return False
        elif last["phase"] not in _RETRIED[strategy["retryPolicy"]]:
            self._end(parent, last["phase"], last.get("message", ""))
        elif len(parent["children"]) > int(strategy["limit"]):
            # This message was not recorded for DAGs, but their code is the same.
            self._end(parent, last["phase"], "No more retries left")
        else:
            return True
        return False

    def _backs_off(self, parent: Node, strategy: Any) -> bool:
        """Return whether a retry waits before its next attempt. Argo decides only afterwards if there is one.

        The message was recorded for 5 seconds; for longer waits it follows Argo's sources.
        """
        tries = len(parent["children"])
        parent.pop("message", None)
        if "backoff" not in strategy or (parent["id"], tries) in self._passed_backoffs:
            return False
        backoff = strategy["backoff"]
        seconds = int(int(backoff["duration"]) * max(float(backoff["factor"]), 1) ** (tries - 1))
        if seconds:
            parent["message"] = f"Backoff for {_words(seconds)}"
        return bool(seconds)

    def _pass_backoffs(self) -> bool:
        """End all waits for a next attempt; return whether there was one."""
        waiting = [node for node in self.nodes.values() if node.get("message", "").startswith("Backoff for")]
        self._passed_backoffs |= {(node["id"], len(node["children"])) for node in waiting}
        return bool(waiting)

    def _dag(self, node: Node, template: Any, inputs: Any) -> None:
        tasks = {task["name"]: task for task in template["dag"]["tasks"]}
        visited: set[str] = set()
        for name in tasks:
            self._dag_task(node, template, tasks, name, inputs, visited)
        phase = self._dag_phase(node, tasks)
        if phase != "Running":
            ends = [self._under(node, name) for name in _targets(tasks)]
            node["outboundNodes"] = [identity for end in ends if end for identity in self._outbound(end)]
            self._end(node, phase)

    def _dag_task(self, node: Node, template: Any, tasks: Any, name: str, inputs: Any, visited: set[str]) -> None:
        """Run one task of a DAG after the tasks that it needs; omit the task if one of them did not succeed."""
        if name in visited:
            return
        visited.add(name)
        task, needed = tasks[name], []
        for other in _needs(task):
            self._dag_task(node, template, tasks, other, inputs, visited)
            needed.append(self._under(node, other))
        if any(other is None or not _fulfilled(other) for other in needed):
            return
        full, task_template = f"{node['name']}.{name}", self.templates[task["template"]]
        child = self._named(full)
        if not child and any(other["phase"] != "Succeeded" for other in needed):
            child = self._add(full, "Skipped", task_template, None, node["id"], {})
            self._end(child, "Omitted", "omitted: depends condition not met")
        if not child or not _fulfilled(child):
            if "withSequence" in task:
                child = self._task_group(node, template, task, full, inputs)
            else:
                child = self._template(full, task["template"], (node, task, inputs, ""), node["id"])
        for parent in [self.nodes[last] for other in needed for last in self._outbound(other)] or [node]:
            _link(parent, child)
        hook = task.get("hooks", {}).get("exit")
        if hook and child["phase"] in ("Succeeded", "Failed", "Error"):
            on_exit = self._template(f"{full}.onExit", hook["template"], (node, hook, inputs, ""), node["id"])
            on_exit |= {"nodeFlag": {"hooked": True}, "displayName": f"{name}.onExit"}
            _link(child, on_exit)

    def _task_group(self, node: Node, template: Any, task: Any, full: str, inputs: Any) -> Node:
        """Run the items of a loop, at most as many at once as its iterator allows."""
        count = int(self._resolve(task["withSequence"]["count"], (node, task, inputs, "")))
        task_template = self.templates[task["template"]]
        if not count:
            skipped = self._named(full) or self._add(full, "Skipped", task_template, None, node["id"], {})
            self._end(skipped, "Skipped", "Skipped, empty params")  # not recorded
            return skipped
        group = self._named(full) or self._add(full, "TaskGroup", task_template, None, node["id"], {})
        limit = template.get("parallelism", count)
        items: list[Node] = []
        for index in range(count):
            name = f"{full}({index}:{index})"
            if not self._named(name) and sum(not _fulfilled(item) for item in items) >= limit:
                return group
            items.append(self._template(name, task["template"], (node, task, inputs, str(index)), node["id"]))
            _link(group, items[-1])
        if all(_fulfilled(item) for item in items):
            failed = [item["phase"] for item in items if item["phase"] in ("Failed", "Error")]
            self._end(group, failed[-1] if failed else "Succeeded")
        return group

    def _dag_phase(self, node: Node, tasks: Any) -> str:
        """Return the phase of the first failed branch; an omitted task has the phase of a task that it needs."""
        hooks = [f"{name}.onExit" for name in tasks if self._under(node, f"{name}.onExit")]
        if any(not (child := self._under(node, name)) or not _fulfilled(child) for name in [*tasks, *hooks]):
            return "Running"

        def branch(name: str) -> str:
            phase = str(self._under(node, name)["phase"])  # type: ignore[index]
            if phase not in ("Omitted", "Skipped"):
                return phase
            phases = [branch(other) for other in _needs(tasks[name])]
            return next((phase for phase in phases if phase != "Succeeded"), "Succeeded")

        ends = [branch(name) for name in _targets(tasks)]
        return next((phase for phase in ends if phase != "Succeeded"), "Succeeded")

    def _outbound(self, node: Node) -> list[str]:
        """Return the IDs of the last nodes below a node; tasks that need this node become their children."""
        if node["type"] == "Retry" and (last := self._last(node)):
            return [last["id"]]
        if node["type"] == "TaskGroup" and node["children"]:
            return [last for child in node["children"] for last in self._outbound(self.nodes[child])]
        if node["type"] == "DAG":
            return [
                last
                for end in node.get("outboundNodes", [])
                for last in ([end] if self.nodes[end]["type"] == "Pod" else self._outbound(self.nodes[end]))
            ]
        return [str(node["id"])]

    # --- drivers ---

    def _drivers(self) -> Iterator[Node]:
        names = (DAG_DRIVER, CONTAINER_DRIVER)
        pods = (node for node in self.nodes.values() if node["type"] == "Pod" and node["templateName"] in names)
        return (node for node in pods if not _fulfilled(node))

    def _holds(self, driver: Node) -> bool:
        return bool(self._held_step) and _is(driver, self._held_step, "-driver")

    def _drive(self, node: Node) -> None:
        drive = self.driver.dag if node["templateName"] == DAG_DRIVER else self.driver.container
        values = drive(_values(node["inputs"]))
        template = self.templates[node["templateName"]]
        parameters = [
            {"name": output["name"], "value": values[output["name"]], "valueFrom": output["valueFrom"]}
            for output in template["outputs"]["parameters"]
        ]
        node["outputs"] = {"parameters": parameters}
        self.succeed(node)

    # --- nodes ---

    def _named(self, name: str) -> Node | None:
        return self.nodes.get(self._id(name))

    def _under(self, node: Node, task: str) -> Node | None:
        return self._named(f"{node['name']}.{task}")

    def _last(self, node: Node) -> Node | None:
        attempts = [child for child in node["children"] if not (self.nodes[child]["nodeFlag"] or {}).get("hooked")]
        return self.nodes[attempts[-1]] if attempts else None

    def _id(self, name: str) -> str:
        return self.name if name == self.name else f"{self.name}-{_fnv32a(name)}"

    def _add(self, name: str, kind: str, template: Any, inputs: Any, boundary: str, flag: Any = None) -> Node:
        node = {
            "id": self._id(name),
            "name": name,
            "displayName": name if name in (self.name, f"{self.name}(0)") else name.rpartition(".")[2],
            "type": kind,
            "templateName": template["name"],
            "templateScope": f"local/{self.name}",
            "phase": "Running",
            "boundaryID": boundary,
            "startedAt": rfc3339(time.time()),
            "finishedAt": None,
            "nodeFlag": flag,
            "inputs": inputs or {},
            "children": [],
        }
        self.nodes[node["id"]] = node
        return node

    def _start(self, pod: Node) -> None:
        pod |= {"phase": "Running", "hostNodeName": "node1"}
        pod.pop("message", None)

    def _end(self, node: Node, phase: str, message: str = "") -> None:
        node |= {"phase": phase, "finishedAt": rfc3339(time.time())}
        node.pop("message", None)
        if message:
            node["message"] = message

    def _inputs(self, template: Any, scope: Any) -> dict[str, Any]:
        """Return a template's parameters with the values of a task's arguments."""
        arguments = _values(scope[1]["arguments"]) if scope else {}
        parameters = []
        for parameter in template["inputs"].get("parameters", []):
            name = parameter["name"]
            value = self._resolve(arguments[name], scope) if name in arguments else parameter["default"]
            parameters.append({**parameter, "value": value})
        return {"parameters": parameters} if parameters else {}

    def _resolve(self, text: str, scope: Any) -> str:
        """Replace the references in a text, such as `{{item}}`, by their values."""
        node, _, inputs, item = scope
        values = _values(inputs)

        def value(match: re.Match[str]) -> str:
            if match["task"]:
                producer = self._under(node, match["task"])
                outputs = producer["outputs"]["parameters"] if producer else []
                return next(str(output["value"]) for output in outputs if output["name"] == match["output"])
            if match["workflow"]:
                return self.parameters[match["workflow"]]
            return item if match["item"] else str(values[match["input"]])

        return _REFERENCE.sub(value, text)

    def _log_artifact(self, pod: Node) -> dict[str, Any]:
        day = time.strftime("%Y/%m/%d", time.gmtime(self.created))
        key = f"private-artifacts/{self.namespace}/{self.name}/{day}/{self.pod_name(pod)}/main.log"
        return {"name": "main-logs", "s3": {"key": key}}

    # --- the manifest ---

    def _started(self) -> int:
        return self.created

    def _metadata(self) -> dict[str, Any]:
        is_completed = self.phase in _FULFILLED
        state = {"workflows.argoproj.io/phase": self.phase} if self.phase else {}
        if is_completed or (self.phase and not self._is_retried):
            state["workflows.argoproj.io/completed"] = str(is_completed).lower()
        return {
            "name": self.name,
            "generateName": self.name.rpartition("-")[0] + "-",
            "namespace": self.namespace,
            "uid": self._uid,
            "creationTimestamp": rfc3339(self.created),
            "labels": self.labels | state,
            "annotations": {
                "pipelines.kubeflow.org/run_name": self.display,
                "workflows.argoproj.io/pod-name-format": "v2",
            },
        }

    def _spec(self) -> dict[str, Any]:
        component = {"pipelines.kubeflow.org/v2_component": "true"}
        spec: dict[str, Any] = {
            "templates": list(self.templates.values()),
            "entrypoint": "entrypoint",
            "arguments": {"parameters": [{"name": key, "value": value} for key, value in self.parameters.items()]},
            "serviceAccountName": self.account,
            "ttlStrategy": {f"secondsAfter{when}": 3600 for when in ("Completion", "Success", "Failure")},
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "podMetadata": {"annotations": component, "labels": {"pipeline/runid": self.run_id, **component}},
        }
        if self._deadline is not None:
            spec["activeDeadlineSeconds"] = 0
        if self.defaults is not None:
            empty: dict[str, Any] = {"inputs": {}, "outputs": {}, "metadata": {}}
            spec["templateDefaults"] = empty | {"retryStrategy": self.defaults}
        return spec

    def _status(self) -> dict[str, Any]:
        ended = self.phase in _FULFILLED
        conditions = [{"type": "PodRunning", "status": str(not ended)}]
        if ended:
            conditions.append({"type": "Completed", "status": "True"})
        status = {
            "phase": self.phase,
            "startedAt": rfc3339(self._started()),
            "finishedAt": rfc3339(self.finished) if ended else None,
            "progress": f"{sum(pod['phase'] == 'Succeeded' for pod in self._all_pods())}/{len(self._all_pods())}",
            "conditions": conditions,
            "artifactRepositoryRef": {"default": True},
            "artifactGCStatus": {"notSpecified": True},
        }
        return status | ({"message": self.message} if self.message else {})

    def _written(self, node: Node, below: int, succeeded: int) -> Node:
        """Return a node as Argo writes it: without empty fields, and with sums over the pods below it.

        below, succeeded: sets of pods as bits: those below the node, and those of the workflow that succeeded.
        """
        written = {key: value for key, value in node.items() if value or key in ("finishedAt", "nodeFlag")}
        if node["nodeFlag"] is None:
            del written["nodeFlag"]
        if node["type"] != "Skipped":
            pods = below.bit_count()
            written["progress"] = f"{(below & succeeded).bit_count()}/{pods}"
            if node["phase"] == "Succeeded":
                written["resourcesDuration"] = {"cpu": 15 * pods, "memory": 579 * pods}
        if node["type"] == "Pod" and _fulfilled(node):
            written["taskResultSynced"] = True
        return {key: written[key] for key in _FIELDS if key in written}

    def _pods_below(self) -> dict[str, int]:
        """Return the pods below each node as a set of bits; a pod's set holds the pod alone."""
        bits = {pod["id"]: 1 << index for index, pod in enumerate(self._all_pods())}
        below: dict[str, int] = {}

        def visit(identity: str) -> int:
            if identity not in below:
                below[identity] = bits.get(identity, 0)
                for child in self.nodes[identity]["children"]:
                    below[identity] |= visit(child)
            return below[identity]

        for identity in self.nodes:
            visit(identity)
        return below | bits

    def _all_pods(self) -> list[Node]:
        return [node for node in self.nodes.values() if node["type"] == "Pod"]


def _fulfilled(node: Node) -> bool:
    return node["phase"] in _FULFILLED


def _is_stage_pod(node: Node) -> bool:
    return node["type"] == "Pod" and str(node["templateName"]).endswith(CONTAINER)


def _values(side: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of parameters by name; side: the inputs or outputs of a node, or a task's arguments."""
    return {parameter["name"]: parameter["value"] for parameter in side.get("parameters", [])}


def _is(pod: Node, step: str, suffix: str = "") -> bool:
    """Return whether a pod belongs to a step: `train`, in a loop `train[1]`, or the end of a full name."""
    name = re.sub(r"\(\d+\)$", "", str(pod["name"]))
    name = re.sub(r"\(\d+\)$", "", name.removesuffix(".executor")).removesuffix(suffix)
    task = re.sub(r"\(\d+\)$", "", name.rpartition(".")[2])
    index = "".join(f"[{number}]" for number in re.findall(r"iteration-iterations\((\d+):", name))
    return step in (task, task + index) or name.endswith("." + step)


def _link(parent: Node, child: Node) -> None:
    if child["id"] not in parent["children"]:
        parent["children"].append(child["id"])


def _needs(task: Any) -> list[str]:
    return re.findall(r"([\w-]+)\.Succeeded", task.get("depends", ""))


def _targets(tasks: Mapping[str, Any]) -> list[str]:
    """Return the tasks of a DAG that no other task needs."""
    needed = {other for task in tasks.values() for other in _needs(task)}
    return [name for name in tasks if name not in needed]


def _words(seconds: int) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes} minutes {rest} seconds" if minutes else f"{rest} seconds"


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _fnv32a(text: str) -> int:
    digest = 0x811C9DC5
    for byte in text.encode():
        digest = (digest ^ byte) * 0x01000193 % 2**32
    return digest
