"""The stage that sends a message when a pipeline's run ends, and the messages of commands on this machine.

A message never fails what it reports. On Kubeflow, the stage is an exit handler. The status that Kubeflow passes
to an exit handler is `RUNNING` if the pipeline has a loop (kubeflow/pipelines issue 13321). So the stage reads how
the run ended from what its stages left beside their artifacts: ledgers with the reason of a failure, and reports.
"""

import csv
import io
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from pydantic import TypeAdapter

from mappo.errors import MappoError, Preempted, StageFailed, StoreError
from mappo.evaluation.comparison import ComparisonReport
from mappo.matrix.matrix import matrix_from_json
from mappo.promotion.promotion import Decision, parse_decision
from mappo.reporting.notification import Message, Outcome, headlines
from mappo.reporting.run_record import parse_evaluation
from mappo.reporting.terminal import say
from mappo.reporting.webhook import KUBEFLOW_URL_VARIABLE, URL_VARIABLE, Webhook
from mappo.runs.locations import open_store
from mappo.runs.owned_file import write_whole
from mappo.runs.store import Entry, Store
from mappo.runs.supervisor import parse_count
from mappo.stages.compare import comparison_metrics
from mappo.stages.evaluate import evaluation_metrics
from mappo.stages.promote import decision_metrics
from mappo.stages.readable_errors import readable_errors
from mappo.stages.report import gain_metrics
from mappo.stages.runtime import StageResult
from mappo.strict_json import parse_report
from mappo.tuning.study_config import study_name

_log = logging.getLogger(__name__)
LAST_RESULTS = {  # pipeline: the stage that ends it, and the artifact with its result
    "training": ("evaluate", "report"),
    "seeds": ("compare", "report"),
    "tuning": ("report", "comparison"),
    "matrix": ("summarise", "cells"),
}
_LEDGER = re.compile(r"(?P<stage>[a-z]+)/attempts-[0-9a-f]{12}\.json")
_COMPARISON = TypeAdapter(ComparisonReport)
_MAX_LEDGER_BYTES, _MAX_RESULT_BYTES = 100_000, 1 << 26
_STORE_SECONDS = 60.0
_INTERRUPTED_SECONDS = 3.0  # for a message after SIGTERM


def notify(pipeline: str, subject: str, folder: str, file: Path) -> StageResult:
    """Send a message about the run of a pipeline, and write it as JSON.

    `pipeline` is a name in `LAST_RESULTS`. `folder` is the location of the run's artifacts. The stage succeeds
    whatever happens to the message.
    """
    with readable_errors("notify"):
        try:
            webhook = Webhook.from_environment()
            message = run_message(pipeline, subject, folder)
        except (MappoError, OSError) as error:
            say("notify", f"warning: no message is sent: {error}")
            write_whole(file, "{}\n")
            return StageResult({})
        write_whole(file, json.dumps(asdict(message), indent=1) + "\n")
        if webhook is None:
            say("notify", f"warning: no message is sent: the secret holds no {URL_VARIABLE}")
        else:
            send(webhook, message)
        return StageResult({"outcome": message.outcome})


def subject_of(pipeline: str, name: str, edition: str) -> str:
    """Return what a message about a pipeline's run is about; `name` is that of the run or study, or a matrix."""
    if pipeline == "matrix":
        return f"matrix {matrix_from_json(name).name}"
    if pipeline == "tuning":
        return f"study {study_name(name, edition)}"
    return f"run {name or os.environ.get('MAPPO_PIPELINE_RUN', '')}"


def run_message(pipeline: str, subject: str, folder: str) -> Message:
    """Return the message about a run of a pipeline, from what its stages left in the folder of its artifacts."""
    run_id, url = os.environ.get("MAPPO_PIPELINE_RUN", ""), os.environ.get(KUBEFLOW_URL_VARIABLE, "")
    links = {"Kubeflow": f"{url.rstrip('/')}/#/runs/details/{run_id}"} if url else {}
    links |= {"pipeline run": run_id} if run_id else {}
    try:
        store = open_store(folder, _STORE_SECONDS)
        entries = sorted(store.entries(), key=lambda entry: entry.modified)

        def read(stage: str, name: str) -> bytes | None:
            return _newest(store, entries, stage, name)

        results = _results(pipeline, read)
        # The results of a matrix tell more than ledgers: which cells are missing, also if their pods were lost.
        is_summarised = pipeline == "matrix" and bool(results)
        failures = _missing_cells(read("summarise", "cells")) if is_summarised else _failures(store, entries)
    except StoreError as error:
        return Message(subject, "ended", f"how it ended is unknown: {error}", {}, links)
    links |= {"artifacts": folder}
    if not failures and results:
        return Message(subject, "succeeded", "", results, links)
    unknown = (
        "no stage left a reason: its pod was lost, or never started; `python -m pipelines runs show` tells more"
    )
    return Message(subject, "failed", "\n".join(failures) or unknown, results, links)


def results_of_files(pipeline: str, files: Mapping[str, Path]) -> dict[str, str]:
    """Return the headline numbers of a pipeline's run on this machine. `files`: its artifacts, by name."""
    names = {
        "evaluate/report": "evaluation_report",
        "promote/decision": "decision",
        "summarise/cells": "cell_results",
    }

    def read(stage: str, name: str) -> bytes | None:
        file = files.get(names.get(f"{stage}/{name}", "comparison_report"))
        return file.read_bytes() if file and file.is_file() else None

    return _results(pipeline, read)


def send(webhook: Webhook, message: Message, deadline_seconds: float = 30.0) -> None:
    """Send a message. If it is not delivered, print a warning."""
    reason = webhook.post(message.body(webhook), deadline_seconds)
    say("notify", f"warning: the message is not delivered: {reason}" if reason else "the message is sent")


def notifying(
    webhook: Webhook | None, subject: str, links: Mapping[str, str], action: Callable[[], StageResult]
) -> Callable[[], StageResult]:
    """Return an action that also sends a message when it ends, except by Ctrl-C: then its user is here."""
    if webhook is None:
        return action

    def tell(outcome: Outcome, reason: str = "", results: Mapping[str, str] | None = None) -> None:
        seconds = _INTERRUPTED_SECONDS if outcome == "interrupted" else 30.0
        send(webhook, Message(subject, outcome, reason, results or {}, links), seconds)

    def act() -> StageResult:
        try:
            result = action()
        except Preempted:
            tell("interrupted", "SIGTERM ended the process; the same command resumes it")
            raise
        except Exception as error:
            tell("failed", str(error) if isinstance(error, StageFailed) else f"{type(error).__name__}: {error}")
            raise
        tell("succeeded", "", headlines(result.metrics))
        return result

    return act


def _failures(store: Store, entries: list[Entry]) -> list[str]:
    """Return the reasons of the stages that have no attempt left, from their ledgers."""
    reasons = []
    for entry in entries:
        match = _LEDGER.fullmatch(entry.key)
        count = parse_count(store.read(entry.key, _MAX_LEDGER_BYTES)) if match else None
        if match and count and count.failure:
            reasons.append(f"{match['stage']}: {count.failure}")
    return reasons


def _newest(store: Store, entries: list[Entry], stage: str, name: str) -> bytes | None:
    keys = [entry.key for entry in entries if re.fullmatch(rf"{stage}/[^/]+/{name}", entry.key)]
    return store.read(keys[-1], _MAX_RESULT_BYTES) if keys else None


def _results(pipeline: str, read: Callable[[str, str], bytes | None]) -> dict[str, str]:
    """Return the headline numbers of a pipeline's last result; empty if there is none.

    read: returns the content of an artifact, or None; takes its stage and its name.
    """
    stage, name = LAST_RESULTS[pipeline]
    content = read(stage, name)
    if content is None:
        return {}
    if pipeline == "training":
        return headlines(evaluation_metrics(parse_evaluation(name, content)))
    if pipeline == "matrix":
        num_cells = len(_cells(content))
        return {"cells done": f"{num_cells - len(_missing_cells(content))} of {num_cells}"}
    comparison = parse_report(_COMPARISON, name, content, "a comparison")
    if pipeline == "seeds":
        return headlines(comparison_metrics(comparison))
    decision = parse_decision("decision", read("promote", "decision") or b"")
    promoted = decision_metrics(decision) if isinstance(decision, Decision) else {}
    return headlines(gain_metrics(comparison) | promoted)


def _cells(content: bytes | None) -> list[dict[str, str]]:
    """Return the rows of a matrix's results."""
    return list(csv.DictReader(io.StringIO((content or b"").decode(errors="replace"))))


def _missing_cells(content: bytes | None) -> list[str]:
    """Return a line for each cell of a matrix without a result: its name, its state, and the reason if known."""
    return [
        f"{row['task']}-{row['algorithm']}-{row['seed']}: "
        + ": ".join(part for part in (row["state"], row["reason"]) if part)
        for row in _cells(content)
        if row["state"] != "done"
    ]
