"""The monitoring of training with a real Prometheus, as on a cluster, from discovery by pods to every panel."""

import csv
import json
import re
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from mappo.config import ExperimentConfig, override, to_json
from mappo.environment.validation import Check, ValidationReport
from mappo.evaluation.evaluation import evaluate
from mappo.monitoring.metric_set import CONTENT_TYPE
from mappo.monitoring.monitor import Monitor
from mappo.monitoring.server import MetricsServer, Page
from mappo.monitoring.settings import MonitorSettings
from mappo.runs.saver import SaveResult
from mappo.stages.evaluate import evaluate as evaluate_stage
from mappo.stages.prepare import prepare
from mappo.stages.train import train
from mappo.stages.tune import work_on_study
from mappo.stages.validate import validate
from mappo.training.history import Progress, TrainingStarted
from tests.support.exported_runs import exported_runs
from tests.support.prometheus import (
    DASHBOARDS,
    GRAFANA,
    ROOT,
    eventually,
    get,
    prometheus,
    pushgateway,
    query,
    require,
    without_data,
)
from tests.support.runs import train_here
from tests.support.services import free_ports

HISTORY_SECONDS = 7200
DCGM = {"DCGM_FI_DEV_GPU_UTIL": 40, "DCGM_FI_DEV_FB_USED": 2000, "DCGM_FI_DEV_POWER_USAGE": 120}
GROUPS = {"environment": {"scenario": "simple_tag", "scenario_kwargs": {}}}  # adversaries and agents
RECORDED = ("run:mappo_run_active:max", "run:mappo_frames:rate5m", "run:mappo_gpu_utilisation:ratio")


def test_a_real_training_is_found_by_its_pod_and_fills_every_panel(tiny, tmp_path, monkeypatch):
    """Scrape and push the metrics of validation, training and evaluation, with our PodMonitor's relabelling."""
    (port,) = free_ports(1)
    config = override(tiny, {"collection": {"total_frames": 2400}, "selection": {"interval_iterations": 5}})
    pods = tmp_path / "pods.json"
    pods.write_text(json.dumps(_pods(port)))
    dcgm = MetricsServer(0, {"/metrics": lambda: Page(200, "text/plain; version=0.0.4", _dcgm_page())})
    with (
        closing(dcgm) as gpus,
        pushgateway(tmp_path / "pushgateway") as gateway,
        exported_runs() as (run_metrics, happen),
        closing(MetricsServer(0, {"/metrics": lambda: Page(200, CONTENT_TYPE, run_metrics.text())})) as exporter,
    ):
        jobs = [
            {
                "job_name": "podMonitor/n/mappo-training/0",
                "file_sd_configs": [{"files": [str(pods)]}],
                "relabel_configs": _relabelling(),
            },
            {
                "job_name": "pushgateway",
                "honor_labels": True,
                "static_configs": [_static(gateway.removeprefix("http://"), "n")],
            },
            {"job_name": "dcgm-exporter", "static_configs": [_static(f"127.0.0.1:{gpus.port}", "gpu-operator")]},
            {"job_name": "exporter", "static_configs": [_static(f"127.0.0.1:{exporter.port}", "n")]},
        ]
        with prometheus(tmp_path / "prometheus", jobs) as url:
            eventually(lambda: get(f"{url}/api/v1/targets")["data"]["activeTargets"], 30, "no targets")
            for name, value in (
                ("MAPPO_METRICS_PORT", str(port)),
                ("MAPPO_PUSHGATEWAY", gateway),
                ("MAPPO_LINGER_SECONDS", "2"),
                ("MAPPO_PIPELINE_RUN", "pipeline-run"),
                ("MAPPO_DATABASE", f"sqlite:///{tmp_path}/studies.db"),
            ):
                monkeypatch.setenv(name, value)
            start = time.time()
            _run_all_stages(config, tmp_path / "run")
            happen()
            seconds = int(time.time() - start) + 1

            targets = {(target["labels"]["job"], target["labels"].get("pod")) for target in _targets(url)}
            assert targets == {
                ("podMonitor/n/mappo-training/0", "train-abc"),
                ("pushgateway", None),
                ("dcgm-exporter", None),
                ("exporter", None),
            }
            (info,) = query(url, f"last_over_time(mappo_run_info[{seconds}s])")
            assert (
                info["metric"].items()
                >= {
                    "namespace": "n",
                    "pod": "train-abc",
                    "run": "pipeline-run",
                    "study": "none",
                    "device": "cpu",
                }.items()
            )
            history = list(csv.DictReader((tmp_path / "run" / "history.csv").read_text().splitlines()))
            for metric, column in (
                ("mappo_run_frames", "frames"),
                ("mappo_episode_return_mean", "episode_return_mean"),
                ("mappo_entropy_nats", "entropy"),
            ):
                assert _last(url, metric, seconds) == float(history[-1][column]), metric
            assert _last(url, 'mappo_run_state{state="finished"}', seconds) == 1
            for stage in ("validate", "train", "evaluate"):
                assert _last(url, f'mappo_stage_success{{stage="{stage}"}}', seconds) == 1
            success, push_time = (
                query(url, f'last_over_time({name}{{stage="validate"}}[{seconds}s])')[0]["metric"]
                for name in ("mappo_stage_success", "push_time_seconds")
            )
            assert {**success, "__name__": ""} == {**push_time, "__name__": ""}, "alerts join these two series"
            assert _metrics_of(gateway) == [], "stages delete their pushed metrics"
            monkeypatch.setenv("MAPPO_PIPELINE_RUN", "run-of-groups")
            _run_all_stages(override(config, GROUPS), tmp_path / "groups")
            _run_a_study(override(config, {"collection": {"total_frames": 1200}}), tmp_path)
            seconds = int(time.time() - start) + 1
            counts = query(url, f'last_over_time(mappo_study_trials{{study="s"}}[{seconds}s])')
            trials = {series["metric"]["state"]: float(series["value"][1]) for series in counts}
            assert trials == {"waiting": 0, "running": 0, "complete": 2, "pruned": 0, "failed": 0}
            assert _last(url, 'mappo_run_state{study="s", run="s-0000-0", state="finished"}', seconds) == 1
            for dashboard in DASHBOARDS:
                assert without_data(url, dashboard, seconds, time.time()) == [], dashboard.name


def test_two_hours_of_history_fill_every_panel(tiny, tmp_path, monkeypatch):
    """Backfill the series of a real monitor for three runs, in steps of 15 s."""
    monkeypatch.setitem(GRAFANA, "__rate_interval", "1m")
    end = int(time.time()) // 60 * 60
    history = tmp_path / "history.txt"
    alike, groups = _exposed(tiny, tmp_path / "alike"), _exposed(override(tiny, GROUPS), tmp_path / "groups")
    history.write_text(_history(end, [alike, alike, groups]))
    blocks = ["promtool", "tsdb", "create-blocks-from", "openmetrics", str(history), str(tmp_path / "data")]
    require("promtool")
    result = subprocess.run(blocks, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    with prometheus(tmp_path, []) as url:
        for dashboard in DASHBOARDS:
            assert without_data(url, dashboard, HISTORY_SECONDS, end, step=15) == [], dashboard.name
        (hours,) = query(url, f"sum(sum_over_time(mappo_run_gpus[{HISTORY_SECONDS}s:15s])) * 15 / 3600", end)
        assert float(hours["value"][1]) == pytest.approx(6, rel=0.01), "three GPUs for two hours"


def _run_a_study(config: ExperimentConfig, directory: Path) -> None:
    """Run two trials, as a worker's pod would."""
    study_config = json.dumps({"budget": {"num_trials": 2}, "tuning": {"pruner": "none"}})
    prepare(to_json(config), "s", str(directory / "runs"), study_config)
    work_on_study("s")


def _run_all_stages(config: ExperimentConfig, directory: Path) -> None:
    text = to_json(config)
    validate(text, directory / "validation.json")
    train(text, directory, directory / "history.csv")
    evaluate_stage(text, directory, directory / "evaluation.json")


def _static(address: str, namespace: str) -> dict:
    return {"targets": [address], "labels": {"namespace": namespace}}


def _pods(port: int) -> list[dict]:
    """Return the targets in the form of Prometheus's Kubernetes discovery: one for each container."""

    def target(pod: str, container: str, phase: str = "Running", **annotations: str) -> dict:
        labels = {
            "namespace": "n",
            "pod_name": pod,
            "pod_ip": "127.0.0.1",
            "pod_phase": phase,
            "pod_container_name": container,
            "pod_label_app_kubernetes_io_part_of": "mappo",
            **annotations,
        }
        named = {f"__meta_kubernetes_{name}": value for name, value in labels.items()}
        return {"targets": ["127.0.0.1"], "labels": named}

    annotation = {"pod_annotation_prometheus_io_port": str(port)}
    return [
        target("train-abc", "main", **annotation),
        target("train-abc", "wait", **annotation),
        target("train-old", "main", "Succeeded", **annotation),
        target("evaluate-abc", "main"),
        target("mappo-pushgateway-x", "pushgateway", pod_container_port_number="9091"),
    ]


def _relabelling() -> list[dict]:
    """Return the relabelling of our PodMonitor after the operator's own, as Prometheus spells it."""
    path = ROOT / "k8s" / "components" / "podmonitor" / "podmonitor.yaml"
    (endpoint,) = yaml.safe_load(path.read_text())["spec"]["podMetricsEndpoints"]
    ours = [
        {re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", key): value for key, value in rule.items()}
        for rule in endpoint["relabelings"]
    ]
    operators = [
        {"source_labels": [f"__meta_kubernetes_{source}"], "target_label": label}
        for source, label in (("namespace", "namespace"), ("pod_container_name", "container"), ("pod_name", "pod"))
    ]
    return [*operators, *ours]


def _targets(url: str) -> list[dict]:
    return get(f"{url}/api/v1/targets")["data"]["activeTargets"]


def _last(url: str, series: str, seconds: int) -> float:
    (result,) = query(url, f"last_over_time({series}[{seconds}s])")
    return float(result["value"][1])


def _metrics_of(gateway: str) -> list[str]:
    return [group["labels"] for group in get(f"{gateway}/api/v1/metrics")["data"]]


def _dcgm_page() -> bytes:
    return "".join(
        f'{name}{{gpu="0",pod="train-abc",namespace="n",container="main"}} {value}\n'
        for name, value in DCGM.items()
    ).encode()


def _exposed(config: ExperimentConfig, directory: Path) -> str:
    """Return the metrics that the stages of a real run export at their ends."""
    stages = ("train", "evaluate", "validate", "tune")
    train, evaluation, validation, tune = (Monitor(stage, "r", MonitorSettings(), print) for stage in stages)
    with train, evaluation, validation, tune:
        tune.studied({"complete": 3, "failed": 1}, 20, 0, 0.9)
        train.planned(config)
        train.began(TrainingStarted(Progress(), 1, is_resumed=False))
        checkpoint = train_here(config, directory / "run", train.iterated)
        train.saved(SaveResult("saved", 0.1, 1000))
        evaluation.evaluated(evaluate(config, checkpoint))
        validation.validated(ValidationReport("hash", [Check("name", "passed", "detail")]))
    with exported_runs() as (run_metrics, happen):
        happen()
    return "".join(part.text().decode() for part in (train, evaluation, validation, tune, run_metrics))


def _history(end: int, pages: list[str]) -> str:
    """Return OpenMetrics of two hours of a run for each page.

    Gauges are constant; counters grow up to the value on the page.
    """
    lines = []
    for number, page in enumerate(pages):
        labels_of_run = {"namespace": "n", "study": "s", "run": f"run-{number}", "pod": f"p{number}"}
        labels_of_run |= {"instance": f"10.0.0.{number}:9464", "job": "training"}
        samples = {
            (sample.name, *sorted({**sample.labels, **labels_of_run}.items())): (sample.value, family.type)
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }
        samples |= {(name, *sorted(labels_of_run.items())): (0.5, "gauge") for name in RECORDED}
        samples |= {(name, *sorted(labels_of_run.items())): (value, "gauge") for name, value in DCGM.items()}
        for (name, *labels), (value, kind) in samples.items():
            label_text = ",".join(f'{key}="{text}"' for key, text in labels)
            for timestamp in range(end - HISTORY_SECONDS, end + 1, 15):
                sample_value = _value_at(name, value, kind, timestamp, end)
                lines.append(f"{name}{{{label_text}}} {sample_value} {timestamp}")
    return "\n".join([*lines, "# EOF", ""])


def _value_at(name: str, value: float, kind: str, timestamp: int, end: int) -> float:
    if name.endswith("_timestamp_seconds"):
        return timestamp - 5
    if name == "mappo_run_gpus":
        return 1
    return value * (1 - (end - timestamp) / HISTORY_SECONDS) if kind in ("counter", "histogram") else value
