"""The settings of Prometheus and the Pushgateway, compared with pods and code."""

import pytest
import yaml
from kfp import compiler

from mappo.config import to_json
from mappo.monitoring import metrics
from pipelines.placement import MONITORING_CONFIG_MAP, POD_LABEL, PORT_ANNOTATION
from pipelines.seeds import make_seeds_pipeline
from pipelines.site import Site
from pipelines.training import make_training_pipeline
from tests.support.overlays import ROOT, rendered

K8S = ROOT / "k8s"


def _one(overlay: str, kind: str, name: str = "") -> dict:
    matches = [
        manifest
        for manifest in rendered(overlay)
        if manifest["kind"] == kind and name in manifest["metadata"]["name"]
    ]
    assert len(matches) == 1, (kind, name)
    return matches[0]


@pytest.fixture(params=["training", "seeds"])
def compiled(request, tiny, tmp_path) -> tuple[dict, dict]:
    """A compiled pipeline: its stages by name, and the Kubernetes settings of each stage."""
    make = {"training": lambda: make_training_pipeline(Site()), "seeds": lambda: make_seeds_pipeline(Site(), 0)}
    parameters = {"config": to_json(tiny), "image": "image:1"}
    if request.param == "seeds":
        parameters["seeds"] = ["0", "1"]
    path = tmp_path / "pipeline.yaml"
    compiler.Compiler().compile(make[request.param](), str(path), pipeline_parameters=parameters)
    spec, platform = yaml.safe_load_all(path.read_text())
    return spec["deploymentSpec"]["executors"], platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def test_pods_have_the_labels_and_annotations_that_the_pod_monitor_selects(compiled):
    stages, pods = compiled
    endpoint = _one("example", "PodMonitor")["spec"]
    selected = endpoint["selector"]["matchLabels"]
    for pod in pods.values():
        assert pod["podMetadata"]["labels"].items() >= selected.items()
    assert selected == dict([POD_LABEL])
    annotated = {name: pod["podMetadata"].get("annotations") for name, pod in pods.items()}
    assert {name: annotations for name, annotations in annotated.items() if annotations} == {
        "exec-train": {PORT_ANNOTATION: str(metrics.PORT)}
    }
    environment = {variable["name"]: variable["value"] for variable in stages["exec-train"]["container"]["env"]}
    assert environment == {"MAPPO_METRICS_PORT": str(metrics.PORT)}


def test_pods_find_the_pushgateway_through_the_config_map(compiled):
    config_map = _one("example", "ConfigMap", "monitoring")
    service = _one("example", "Service", "pushgateway")
    url = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert config_map["metadata"]["name"] == MONITORING_CONFIG_MAP
    assert config_map["data"] == {"pushgateway": url}
    for pod in compiled[1].values():
        (source,) = [
            source for source in pod["configMapAsEnv"] if source["configMapName"] == MONITORING_CONFIG_MAP
        ]
        assert source["optional"]
        assert {"configMapKey": "pushgateway", "envVar": "MAPPO_PUSHGATEWAY"} in source["keyToEnv"]


def test_pods_have_the_id_of_their_pipeline_run(compiled):
    for pod in compiled[1].values():
        assert pod["fieldPathAsEnv"] == [
            {"name": "MAPPO_PIPELINE_RUN", "fieldPath": "metadata.labels['pipeline/runid']"}
        ]


def test_the_scrape_interval_is_the_one_that_stages_wait_for():
    (endpoint,) = _one("example", "PodMonitor")["spec"]["podMetricsEndpoints"]
    (pushgateway,) = _one("example", "ServiceMonitor", "pushgateway")["spec"]["endpoints"]
    assert endpoint["interval"] == pushgateway["interval"] == f"{metrics.SCRAPE_SECONDS}s"
    assert "port" not in endpoint, "Kubeflow's pods declare no port, so the monitor would find no pod"
    annotation = PORT_ANNOTATION.replace(".", "_").replace("/", "_")
    assert f"__meta_kubernetes_pod_annotation_{annotation}" in str(endpoint["relabelings"])
    assert pushgateway["honorLabels"]


def test_the_service_monitor_finds_the_exporter():
    service = _one("example", "Service", "pipeline-exporter")
    pod = _one("example", "Deployment", "pipeline-exporter")["spec"]["template"]
    monitor = _one("example", "ServiceMonitor", "pipeline-exporter")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (endpoint,), (port,) = monitor["endpoints"], service["spec"]["ports"]
    assert (endpoint["port"], port["port"]) == (port["name"], metrics.EXPORTER_PORT)
    assert "honorLabels" not in endpoint, "the namespace of the exporter is that of its runs"


def test_the_service_monitor_finds_the_pushgateway():
    service, deployment = _one("example", "Service", "pushgateway"), _one("example", "Deployment", "pushgateway")
    pod = deployment["spec"]["template"]
    assert _one("example", "ServiceMonitor", "pushgateway")["spec"]["selector"]["matchLabels"].items() <= (
        service["metadata"]["labels"].items()
    )
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": service["spec"]["ports"][0]["port"]}]
    assert f"--web.listen-address=:{service['spec']['ports'][0]['port']}" in container["args"]


def test_the_pushgateway_accepts_pushes_from_pods_without_istio():
    """The pods of runs have no Istio sidecar; a sidecar of the Pushgateway would reject them."""
    label, deployment = "sidecar.istio.io/inject", _one("example", "Deployment", "pushgateway")
    assert deployment["spec"]["template"]["metadata"]["labels"][label] == "false"
    assert label not in deployment["metadata"]["labels"]
    assert label not in deployment["spec"]["selector"]["matchLabels"]


def test_the_prometheus_rule_has_the_tested_rules():
    rules = yaml.safe_load((K8S / "components" / "alerts" / "rules.yaml").read_text())
    assert _one("example-monitoring", "PrometheusRule")["spec"] == rules


@pytest.mark.parametrize("name", ["training-run", "fleet"])
def test_grafanas_sidecar_finds_the_dashboard(name):
    config_map = _one("example-monitoring", "ConfigMap", name)
    assert config_map["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert config_map["metadata"]["name"] == f"mappo-dashboard-{name}"
    expected = (K8S / "components" / "dashboards" / f"{name}.json").read_text()
    assert config_map["data"] == {f"{name}.json": expected}
    assert len(expected) < 250_000, "the limit of a ConfigMap is 1 MiB, and kubectl apply accepts a quarter of it"
